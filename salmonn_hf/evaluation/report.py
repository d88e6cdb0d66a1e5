"""Results of `evaluation.py` as one Markdown and one self-contained HTML page: the challenge's table, scores with
their intervals, plots, and the worst clips to listen to."""

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path

from ..data.clip_parquet import parquet_rows
from ..data.flac import flac_bytes
from ..files import write_atomically
from ..model.audio import AudioError, load_audio
from .engine import read_lines
from .scoring import duration_order

WORST_CLIPS = 20


@dataclass(frozen=True)
class PublishedSystem:
    """Figures that others report of their own systems: WER and SPIDEr as fractions, gigabytes, seconds."""

    name: str
    spider: float
    wer: float
    memory: float
    ttft: float | None
    tpot: float | None


# From the READMEs of the challenge's teams (boostcampaitech7, level 4), and of nota-github/audiolm-trainer for the
# baseline; SALMONN-7B as cv-16 measured it. Where a README gives TTFT and TPOT as one figure, it stands under TTFT.
PUBLISHED_SYSTEMS = (
    PublishedSystem("nota baseline", 0.2027, 0.0634, 9.18, 0.206, 0.045),
    PublishedSystem("seed (cv-03)", 0.3049, 0.0642, 5.32, 0.356, 0.107),
    PublishedSystem("nlp-07", 0.3615, 0.0699, 3.83, 0.172, 0.038),
    PublishedSystem("cv-16", 0.3549, 0.0530, 4.09, 0.36, None),
    PublishedSystem("nlp-12", 0.3304, 0.0770, 4.05, 0.846, None),
    PublishedSystem("SALMONN-7B", 0.485, 0.051, 15.75, None, None),
)
PUBLISHED_ORIGIN = (
    "self-reported on V100 GPUs over the challenge's split (LibriSpeech test-other, AudioCaps; SPIDEr with one "
    "reference a clip); TTFT of cv-16 and nlp-12 includes TPOT"
)


DIGITS = (4, 4, 2, 3, 3)  # of SPIDEr, WER, GB, s, s


@dataclass
class Run:
    """
    What one directory holds: a `result.json` of an evaluation with its predictions and scores, or an
    `efficiency.json` of `eval/run_efficiency.py`.
    """

    directory: Path
    result: dict | None
    efficiency: dict | None
    clips: list[dict]

    @property
    def model(self) -> str:
        return (self.efficiency if self.result is None else self.result)["settings"]["model"]

    @property
    def task(self) -> str:
        return "" if self.result is None else self.result["settings"]["task"]

    @property
    def title(self) -> str:
        data = ", ".join(Path(file).name for file in self.result["settings"]["data"])
        names = {"asr": "speech recognition", "aac": "captioning", "qa": "questions"}
        return f"{Path(self.model).name}: {names[self.task]}, {data}"


def read_run(directory: Path) -> Run:
    """
    Raises:
        ValueError: if the directory holds no result.
    """
    found = {name: directory / f"{name}.json" for name in ("result", "efficiency")}
    if not any(file.exists() for file in found.values()):
        raise ValueError(
            f"{directory} holds neither result.json nor efficiency.json; give the --output of a finished evaluation."
        )
    result, efficiency = (json.loads(file.read_text()) if file.exists() else None for file in found.values())
    predictions, scores = (read_lines(directory / f"{name}.jsonl") for name in ("predictions", "scores"))
    clips = [prediction | score for prediction, score in zip(predictions, scores, strict=True)]
    return Run(directory, result, efficiency, clips)


def timings(run: Run) -> dict[str, dict]:
    """
    What `eval/run_efficiency.py` measured of each system, the run's own model first: gigabytes, median seconds to the
    first token, by part as well, and per further token, and how they were measured. Empty without such a file.
    """
    if run.efficiency is None:
        return {}
    settings, machine = run.efficiency["settings"], run.efficiency["machine"]
    found = {}
    for name, system in run.efficiency["systems"].items():
        protocol = system["protocol"]
        found[name] = {
            "memory_gb": system["peak_memory"] / 1e9,
            "ttft_seconds": protocol["ttft"]["p50"],
            "tpot_seconds": protocol["tpot"]["p50"],
            "parts_seconds": protocol["ttft_by_part"],
            "file": f"{run.directory}/efficiency.json",
            "protocol": (
                f"batch 1, {protocol['seconds_of_audio']:g} s of speech, {system['audio_tokens']} audio tokens, "
                f"{system['dtype'].removeprefix('torch.')}, {machine['device']}, {machine['threads']} threads, median "
                f"of {settings['rounds']} rounds"
            ),
        }
    return found


# Tables


def number(value, digits: int = 4) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def challenge_table(runs: list[Run]) -> tuple[list[list[str]], list[str]]:
    """The rows of the challenge's table, published systems first, and where each of our figures came from."""
    rows = [["system", "AAC (SPIDEr)", "ASR (WER)", "Memory (GB)", "TTFT (s)", "TPOT (s)", "origin"]]
    for system in PUBLISHED_SYSTEMS:
        figures = (system.spider, system.wer, system.memory, system.ttft, system.tpot)
        rows.append([system.name, *map(number, figures, DIGITS), "published"])
    origins = [f"published: {PUBLISHED_ORIGIN}"]

    def add(name: str, scores: dict, timing: dict, sources: list[str]):
        figures = [scores.get("aac"), scores.get("asr")]
        figures += [timing.get(key) for key in ("memory_gb", "ttft_seconds", "tpot_seconds")]
        rows.append([name, *map(number, figures, DIGITS), f"measured [{len(origins)}]"])
        sources = sources + ([f"memory and times: {timing['protocol']} ({timing['file']})"] if timing else [])
        origins.append(f"measured [{len(origins)}]: " + ("; ".join(sources) or "nothing measured"))

    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        evaluations = [run for run in own if run.result is not None and run.task in ("asr", "aac")]
        systems = next((list(timings(run).items()) for run in own if run.efficiency is not None), [])
        timing = systems[0][1] if systems else {}
        datasets = dict.fromkeys(tuple(run.result["settings"]["data"]) for run in evaluations if run.task == "asr")
        for data in datasets or [None]:
            scores, sources = {}, []
            for run in evaluations:
                metric = run.result["metrics"].get({"asr": "wer", "aac": "SPIDEr"}[run.task])
                if run.task == "aac" or tuple(run.result["settings"]["data"]) == data:
                    scores[run.task] = metric["value"] if metric else None
                    sources.append(describe_origin(run))
            add(Path(model).name, scores, timing, sources)
        for name, other in systems[1:]:  # measured beside the model
            add(name, {}, other, [])
    return rows, origins


def describe_origin(run: Run) -> str:
    data = ", ".join(Path(file).name for file in run.result["settings"]["data"])
    note = f"; {run.result['settings']['note']}" if run.result["settings"].get("note") else ""
    kind = {"asr": "WER", "aac": "captions", "qa": "questions"}[run.task]
    missing = "" if run.task == "asr" or "SPIDEr" in run.result["metrics"] else "; no SPIDEr was computed"
    return f"{kind}: {run.result['clips']} clips of {data}{note}{missing} ({run.directory}/result.json)"


def metrics_table(run: Run) -> list[list[str]]:
    note = run.result["settings"].get("note", "")
    rows = [["metric", "value", "95 % interval", "counts", *(["data"] if note else [])]]
    for name, metric in run.result["metrics"].items():
        counts = ", ".join(f"{metric[k]} {k}" for k in metric if k not in ("value", "low", "high"))
        interval = f"{number(metric['low'])} to {number(metric['high'])}"
        rows.append([name, number(metric["value"]), interval, counts, *([note] if note else [])])
    return rows


def breakdown_tables(run: Run) -> dict[str, list[list[str]]]:
    """A table for each breakdown of no more than 20 parts; CIDEr-D by label is plotted."""
    tables = {}
    for metric, breakdowns in run.result.get("breakdowns", {}).items():
        for key, parts in breakdowns.items():
            if len(parts) <= 20:
                rows = [[key, "clips", metric, "95 % interval"]]
                for part in parts:
                    interval = f"{number(part['low'])} to {number(part['high'])}"
                    rows.append([part["part"] or "(none)", str(part["clips"]), number(part["value"]), interval])
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


# Plots


def figure_svg(figure) -> str:
    import matplotlib.pyplot as plt

    stream = io.StringIO()
    # Without a date and with fixed ids the same results give the same file.
    with plt.rc_context({"svg.hashsalt": "salmonn_hf", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    plt.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def plots(runs: list[Run]) -> dict[str, str]:
    """Titles and SVG pictures of what there are results for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = {}
    speech = [run for run in runs if run.task == "asr"]
    if speech:
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        order = list(dict.fromkeys(p["part"] for run in speech for p in run.result["breakdowns"]["wer"]["duration"]))
        order.sort(key=duration_order)
        for index, run in enumerate(speech):
            parts = [p for p in run.result["breakdowns"]["wer"]["duration"] if p["value"] is not None]
            at = [order.index(part["part"]) + index * 0.8 / len(speech) for part in parts]
            bars = axes.bar(at, [100 * p["value"] for p in parts], 0.75 / len(speech), align="edge", label=run.title)
            axes.bar_label(bars, [f"n={p['clips']}" for p in parts], fontsize=7, label_type="center", color="white")
            spread = [[100 * (p["value"] - p["low"]) for p in parts], [100 * (p["high"] - p["value"]) for p in parts]]
            middle = [x + 0.375 / len(speech) for x in at]
            axes.errorbar(middle, [100 * p["value"] for p in parts], spread, fmt="none", ecolor="0.3", capsize=2)
        axes.set(
            xticks=[i + 0.4 for i in range(len(order))], xticklabels=order, ylabel="WER (%)", xlabel="clip length"
        )
        figure.legend(loc="outside upper left", ncols=3, fontsize=7)
        pictures["WER by duration, with 95 % intervals"] = figure_svg(figure)

        figure, axes = plt.subplots(figsize=(7, 0.9 + 0.5 * len(speech)), layout="constrained")
        left = [0.0] * len(speech)
        for kind in ("substitutions", "deletions", "insertions"):
            counts = [run.result["metrics"]["wer"] for run in speech]
            shares = [100 * count[kind] / max(count["words"], 1) for count in counts]
            axes.barh([run.title for run in speech], shares, left=left, label=kind)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.set(xlabel="% of the reference words")
        axes.invert_yaxis()
        figure.legend(loc="outside upper left", ncols=3, fontsize=7)
        pictures["Error types"] = figure_svg(figure)

    for run in runs:
        labels = run.result["breakdowns"]["CIDEr-D"].get("label") if run.task == "aac" else None
        if labels:
            labels = sorted(labels, key=lambda part: part["value"])
            shown = labels if len(labels) <= 40 else labels[:20] + labels[-20:]
            figure, axes = plt.subplots(figsize=(7, 0.6 + 0.17 * len(shown)), layout="constrained")
            axes.barh([f"{part['part']} ({part['clips']})" for part in shown], [part["value"] for part in shown])
            axes.tick_params(axis="y", labelsize=7)
            axes.set(xlabel="CIDEr-D", ylim=(-0.6, len(shown) - 0.4))
            which = "" if shown is labels else ", the 20 worst and 20 best"
            pictures[f"CIDEr-D by label (clips){which}: {run.title}"] = figure_svg(figure)

    timed = {name: timing["parts_seconds"] for run in runs for name, timing in timings(run).items()}
    if timed:
        figure, axes = plt.subplots(figsize=(7, 0.9 + 0.5 * len(timed)), layout="constrained")
        left = [0.0] * len(timed)
        for part in next(iter(timed.values())):
            widths = [1000 * parts[part] for parts in timed.values()]
            axes.barh(list(timed), widths, left=left, label=part)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="ms")
        figure.legend(loc="outside upper left", ncols=3, fontsize=7)
        pictures["Latency by part"] = figure_svg(figure)
    return pictures


# Pages


def clip_audio(run: Run, rows: list[int]) -> dict[int, bytes]:
    """FLAC of the clips, from the data that they were evaluated on, where that is still there."""
    files = run.result["settings"]["data"]
    if not all(Path(file).suffix == ".parquet" and Path(file).exists() for file in files):
        return {}
    data, found = parquet_rows(files), {}
    for row in rows:
        try:
            found[row] = flac_bytes(load_audio(data[row]["audio"]))
        except (AudioError, OSError):  # its line in the report tells what is wrong with it
            continue
    return found


def markdown_table(rows: list[list[str]]) -> str:
    def line(cells):
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(rows[0]), line(["---"] * len(rows[0])), *map(line, rows[1:])])


def html_table(rows: list[list[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def remarks(run: Run) -> list[str]:
    """What must be said beside a run's figures: the data's note, what was not computed, which clips are broken."""
    found = [f"Data: {note}"] if (note := run.result["settings"].get("note")) else []
    found += [f"Not computed, {name}: {why}" for name, why in run.result.get("not_computed", {}).items()]
    found += [f"Broken clip, counted with an empty answer: {clip}" for clip in run.result["broken_clips"]]
    return found + [f"Longer than the model hears, cut: {clip}" for clip in run.result["cut_clips"]]


def statistics_line(run: Run) -> list[str]:
    return [
        f"{name}: {values['distinct_words']} distinct words, {values['mean_words']:.1f} words each; "
        f"{values['distinct_captions']:.1%} of them distinct, {values['most_frequent_caption']:.1%} the commonest"
        for name, values in run.result.get("statistics", {}).items()
    ]


def report_markdown(runs: list[Run], pictures: dict[str, str]) -> str:
    table, origins = challenge_table(runs)
    lines = ["# Evaluation", "", markdown_table(table), "", *(f"- {origin}" for origin in origins), ""]
    for index, title in enumerate(pictures):
        lines += [f"## {title}", "", f"![{title}](plots/{index}.svg)", ""]
    for run in runs:
        if run.result is None:
            continue
        lines += [f"## {run.title}", "", f"{run.result['clips']} clips, {run.result['audio_seconds']} s.", ""]
        lines += [f"- {remark}" for remark in remarks(run) + statistics_line(run)]
        lines += ["", markdown_table(metrics_table(run)), ""]
        for title, rows in breakdown_tables(run).items():
            lines += [f"### {title}", "", markdown_table(rows), ""]
        rows = [["clip", "score", "reference", "hypothesis"]]
        rows += [
            [
                clip["id"],
                clip_score(run, clip),
                " / ".join(clip["references"]),
                clip["hypothesis"],
            ]
            for clip in worst_clips(run)
        ]
        lines += [
            f"### The worst {len(rows) - 1} clips",
            "",
            markdown_table([[" ".join(c.split()) for c in r] for r in rows]),
            "",
        ]
    return "\n".join(lines)


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
    table, origins = challenge_table(runs)
    body = ["<h1>Evaluation</h1>", html_table(table)]
    body += [f"<p class='remark'>{html.escape(origin)}</p>" for origin in origins]
    for title, picture in pictures.items():
        body += [f"<h2>{html.escape(title)}</h2>", picture]
    for run in runs:
        if run.result is None:
            continue
        body += [f"<h2>{html.escape(run.title)}</h2>"]
        body += [f"<p>{run.result['clips']} clips, {run.result['audio_seconds']} s.</p>"]
        body += [f"<p class='remark'>{html.escape(remark)}</p>" for remark in remarks(run) + statistics_line(run)]
        body += [html_table(metrics_table(run))]
        for title, rows in breakdown_tables(run).items():
            body += [f"<h3>{html.escape(title)}</h3>", html_table(rows)]
        worst = worst_clips(run)
        audio = clip_audio(run, [clip["row"] for clip in worst])
        body += [f"<h3>The worst {len(worst)} clips</h3>"]
        body += [html_clip(run, clip, audio.get(clip["row"])) for clip in worst]
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
