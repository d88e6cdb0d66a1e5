"""Results as one Markdown and one self-contained HTML page, with plots and the worst clips to listen to."""

import base64
from pathlib import Path

from ..data.clip_audio import read_clip
from ..data.clip_parquet import parquet_rows
from ..data.flac import flac_bytes
from ..data.skipped_clips import UnusableClip
from ..files import write_atomically
from .challenge_table import challenge_table
from .plots import plots
from .results import Run, read_run
from .tables import format_interval, format_number, render

WORST_CLIPS = 20
CLIP_SCORES = {
    "asr": "{substitutions} S, {deletions} D, {insertions} I",
    "aac": "CIDEr-D {CIDEr-D:.2f}, METEOR {METEOR:.2f}",
    "qa": "wrong",  # no other answers are listed
}


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
                rows = [[p["part"] or "(none)", str(p["clips"]), format_number(p["value"]), format_interval(p)]
                        for p in parts]  # fmt: skip
                tables[f"{metric} by {key}"] = [[key, "clips", metric, "95 % interval"], *rows]
    return tables


def worst_clips(run: Run) -> list[dict]:
    """The clips to listen to: most word errors, lowest CIDEr-D and METEOR, or wrong answers; the worst first."""
    if run.task == "asr":
        errors = [clip["substitutions"] + clip["deletions"] + clip["insertions"] for clip in run.clips]
        rows = sorted(range(len(errors)), key=lambda row: -errors[row])
        return [run.clips[row] for row in rows[:WORST_CLIPS] if errors[row]]
    if run.task == "aac":
        return sorted(run.clips, key=lambda clip: (clip["CIDEr-D"], clip["METEOR"]))[:WORST_CLIPS]
    return [clip for clip in run.clips if not clip["correct"]][:WORST_CLIPS]


def flac_base64(run: Run, rows: list[int]) -> dict[int, str]:
    """FLAC of the clips, from the data that they were evaluated on, where that is still there."""
    if not all(Path(file).suffix == ".parquet" and Path(file).exists() for file in run.files):
        return {}
    data, found = parquet_rows(run.files), {}
    for row in rows:
        try:
            found[row] = base64.b64encode(flac_bytes(read_clip(data[row]))).decode()
        except (UnusableClip, OSError):  # its line in the report tells what is wrong with it
            continue
    return found


def remarks(run: Run) -> list[str]:
    """What must be said beside a run's figures: the data's note, what was not computed, which clips are broken."""
    found = [f"Data: {run.note}"] if run.note else []
    found += [f"Not computed, {name}: {why}" for name, why in run.result.get("not_computed", {}).items()]
    found += [f"Broken clip, counted with an empty answer: {clip}" for clip in run.result["broken_clips"]]
    return found + [f"Longer than the model's input, cut: {clip}" for clip in run.result["cut_clips"]]


def section(run: Run) -> dict:
    """What both pages say of an evaluation, in order."""
    statistics = [
        f"{name}: {values['distinct_words']} distinct words, {values['mean_words']:.1f} words each; "
        f"{values['distinct_captions']:.1%} of them distinct, {values['most_frequent_caption']:.1%} the commonest"
        for name, values in run.result.get("statistics", {}).items()
    ]
    worst = [clip | {"score": CLIP_SCORES[run.task].format(**clip)} for clip in worst_clips(run)]
    rows = [[clip["id"], clip["score"], " / ".join(clip["references"]), clip["hypothesis"]] for clip in worst]
    return {
        "title": run.title,
        "size": f"{run.result['clips']} clips, {run.result['audio_seconds']} s.",
        "remarks": remarks(run) + statistics,
        "metrics": metrics_table(run),
        "breakdowns": breakdown_tables(run),
        "worst": worst,
        "worst_table": [["clip", "score", "reference", "hypothesis"], *rows],
        "audio": flac_base64(run, [clip["row"] for clip in worst]),
    }


def write_report(directories: list[Path], output: Path):
    """
    `report.md` with `plots/*.svg`, and `report.html`, which needs no other file.

    Raises:
        ValueError: for a directory without a result.
    """
    runs = [read_run(directory) for directory in directories]
    challenge, origins = challenge_table(runs)
    pictures = plots(runs)
    sections = [section(run) for run in runs if run.result is not None]
    (output / "plots").mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures.values()):
        write_atomically(output / "plots" / f"{index}.svg", picture)
    for name in ("report.md", "report.html"):
        page = render(name, challenge=challenge, origins=origins, pictures=pictures, sections=sections)
        write_atomically(output / name, page)
