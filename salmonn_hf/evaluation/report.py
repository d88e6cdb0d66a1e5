"""Results as one Markdown and one self-contained HTML page, with plots and the worst clips to listen to."""

import base64
import html
from collections.abc import Iterator
from pathlib import Path

from ..data.clip_audio import read_clip
from ..data.clip_parquet import parquet_rows
from ..data.flac import flac_bytes
from ..data.skipped_clips import UnusableClip
from ..files import write_atomically
from .challenge_table import challenge_table
from .plots import plots
from .results import Run, read_run
from .tables import format_interval, format_number, html_table, markdown_table

WORST_CLIPS = 20


def metrics_table(run: Run) -> list[list[str]]:
    note = [run.note] if run.note else []
    rows = [["metric", "value", "95 % interval", "counts", *(["data"] if note else [])]]
    for name, metric in run.result["metrics"].items():
        counts = ", ".join(f"{metric[k]} {k}" for k in metric if k not in ("value", "low", "high"))
        rows.append([name, format_number(metric["value"]), format_interval(metric), counts, *note])
    return rows


def breakdown_tables(run: Run) -> dict[str, list[list[str]]]:
    """A table for each breakdown of no more than 20 parts; CIDEr-D by label is plotted."""
    tables = {}
    for metric, breakdowns in run.result.get("breakdowns", {}).items():
        for key, parts in breakdowns.items():
            if len(parts) <= 20:
                rows = [[key, "clips", metric, "95 % interval"]]
                for part in parts:
                    name, score = part["part"] or "(none)", format_number(part["value"])
                    rows.append([name, str(part["clips"]), score, format_interval(part)])
                tables[f"{metric} by {key}"] = rows
    return tables


def worst_clips(run: Run) -> list[dict]:
    """The clips to listen to: most word errors, lowest CIDEr-D and METEOR, or wrong answers; the worst first."""
    keys = {
        "asr": lambda clip: -(clip["substitutions"] + clip["deletions"] + clip["insertions"]),
        "aac": lambda clip: (clip["CIDEr-D"], clip["METEOR"]),
        "qa": lambda clip: clip["correct"],
    }
    worst = sorted(run.clips, key=keys[run.task])[:WORST_CLIPS]
    if run.task == "asr":
        return [clip for clip in worst if keys["asr"](clip) < 0]
    return [clip for clip in worst if not clip.get("correct")]


def clip_score(run: Run, clip: dict) -> str:
    if run.task == "asr":
        return f"{clip['substitutions']} S, {clip['deletions']} D, {clip['insertions']} I"
    if run.task == "aac":
        return f"CIDEr-D {clip['CIDEr-D']:.2f}, METEOR {clip['METEOR']:.2f}"
    return "right" if clip["correct"] else "wrong"


def clip_audio(run: Run, rows: list[int]) -> dict[int, bytes]:
    """FLAC of the clips, from the data that they were evaluated on, where that is still there."""
    files = run.result["settings"]["data"]
    if not all(Path(file).suffix == ".parquet" and Path(file).exists() for file in files):
        return {}
    data, found = parquet_rows(files), {}
    for row in rows:
        try:
            found[row] = flac_bytes(read_clip(data[row]))
        except (UnusableClip, OSError):  # its line in the report tells what is wrong with it
            continue
    return found


def remarks(run: Run) -> list[str]:
    """What must be said beside a run's figures: the data's note, what was not computed, which clips are broken."""
    found = [f"Data: {run.note}"] if run.note else []
    found += [f"Not computed, {name}: {why}" for name, why in run.result.get("not_computed", {}).items()]
    found += [f"Broken clip, counted with an empty answer: {clip}" for clip in run.result["broken_clips"]]
    return found + [f"Longer than the model's input, cut: {clip}" for clip in run.result["cut_clips"]]


def statistics_lines(run: Run) -> list[str]:
    return [
        f"{name}: {values['distinct_words']} distinct words, {values['mean_words']:.1f} words each; "
        f"{values['distinct_captions']:.1%} of them distinct, {values['most_frequent_caption']:.1%} the commonest"
        for name, values in run.result.get("statistics", {}).items()
    ]


# Pages


def blocks(runs: list[Run], pictures: dict[str, str]) -> Iterator[tuple[str, object]]:
    """What both pages hold, in order: the kind of each block and its content."""
    table, origins = challenge_table(runs)
    yield from (("h1", "Evaluation"), ("table", table), ("remarks", origins))
    for title in pictures:
        yield from (("h2", title), ("picture", title))
    for run in runs:
        if run.result is None:
            continue
        yield from (("h2", run.title), ("text", f"{run.result['clips']} clips, {run.result['audio_seconds']} s."))
        yield from (("remarks", remarks(run) + statistics_lines(run)), ("table", metrics_table(run)))
        for title, rows in breakdown_tables(run).items():
            yield from (("h3", title), ("table", rows))
        worst = worst_clips(run)
        yield from (("h3", f"The worst {len(worst)} clips"), ("clips", (run, worst)))


def report_markdown(runs: list[Run], pictures: dict[str, str]) -> str:
    found = []
    for kind, content in blocks(runs, pictures):
        if kind in ("h1", "h2", "h3"):
            found.append(f"{'#' * int(kind[1])} {content}")
        elif kind == "text":
            found.append(content)
        elif kind == "remarks":
            found.append("\n".join(f"- {remark}" for remark in content))
        elif kind == "picture":
            found.append(f"![{content}](plots/{list(pictures).index(content)}.svg)")
        elif kind == "table":
            found.append(markdown_table(content))
        else:
            run, clips = content
            rows = [["clip", "score", "reference", "hypothesis"]]
            rows += [[c["id"], clip_score(run, c), " / ".join(c["references"]), c["hypothesis"]] for c in clips]
            found.append(markdown_table(rows))
    return "\n\n".join(filter(None, found)) + "\n"


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2330; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #d5dae2; padding: .3rem .7rem; text-align: left; vertical-align: top; }
th { background: #f3f5f8; } h2 { margin-top: 2.5rem; } svg { max-width: 100%; height: auto; }
.clip { border: 1px solid #d5dae2; border-radius: 6px; padding: .6rem .9rem; margin: .6rem 0; }
.clip b { display: inline-block; min-width: 6rem; } .error { color: #a11; } audio { height: 2rem; width: 100%; }
.remark { color: #555; }
"""


def report_html(runs: list[Run], pictures: dict[str, str]) -> str:
    body = []
    for kind, content in blocks(runs, pictures):
        if kind in ("h1", "h2", "h3"):
            body.append(f"<{kind}>{html.escape(content)}</{kind}>")
        elif kind == "text":
            body.append(f"<p>{html.escape(content)}</p>")
        elif kind == "remarks":
            body += [f"<p class='remark'>{html.escape(remark)}</p>" for remark in content]
        elif kind == "picture":
            body.append(pictures[content])
        elif kind == "table":
            body.append(html_table(content))
        else:
            run, clips = content
            audio = clip_audio(run, [clip["row"] for clip in clips])
            body += [html_clip(run, clip, audio.get(clip["row"])) for clip in clips]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Evaluation</title>"
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def html_clip(run: Run, clip: dict, audio: bytes | None) -> str:
    lines = [f"<p><b>{html.escape(clip['id'])}</b> {html.escape(clip_score(run, clip))}, {clip['seconds']:.1f} s</p>"]
    if audio is not None:
        source = base64.b64encode(audio).decode()
        lines += [f"<audio controls preload='none' src='data:audio/flac;base64,{source}'></audio>"]
    else:
        lines += ["<p class='remark'>The clip's audio is not at hand.</p>"]
    if clip.get("prompt"):
        lines += [f"<p><b>asked</b> {html.escape(clip['prompt'])}</p>"]
    lines += [f"<p><b>reference</b> {html.escape(text)}</p>" for text in clip["references"]]
    if "error" in clip:
        lines += [f"<p class='error'><b>broken</b> {html.escape(clip['error'])}</p>"]
    lines += [f"<p><b>hypothesis</b> {html.escape(clip['hypothesis'])}</p>"]
    return f"<div class='clip'>{''.join(lines)}</div>"


def write_report(directories: list[Path], output: Path):
    """
    `report.md` with `plots/*.svg`, and `report.html`, which needs no other file.

    Raises:
        ValueError: for a directory without a result.
    """
    runs = [read_run(directory) for directory in directories]
    pictures = plots(runs)
    (output / "plots").mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures.values()):
        write_atomically(output / "plots" / f"{index}.svg", picture)
    write_atomically(output / "report.md", report_markdown(runs, pictures))
    write_atomically(output / "report.html", report_html(runs, pictures))
