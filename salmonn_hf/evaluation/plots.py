"""Pictures of results: errors by length and kind, captions by label, latency by part."""

import io

import numpy as np

from .results import Run, timings
from .scoring import KINDS, duration_order

LEGEND = {"loc": "outside upper left", "ncols": 3, "fontsize": 7}


def plots(runs: list[Run]) -> dict[str, str]:
    """Titles and SVG pictures of what there are results for."""
    pictures = {}
    if speech := [run for run in runs if run.task == "asr"]:
        pictures["WER by duration, with 95 % intervals"] = wer_by_duration(speech)
        counts = {run.title: run.result["metrics"]["wer"] for run in speech}
        shares = {
            title: {kind: 100 * c[kind] / max(c["words"], 1) for kind in KINDS[:3]} for title, c in counts.items()
        }
        pictures["Error types"] = stacked_bars(shares, "% of the reference words")
    for run in runs:
        labels = run.result["breakdowns"]["CIDEr-D"].get("label") if run.task == "aac" else None
        if labels:
            which = "" if len(labels) <= 40 else ", the 20 worst and 20 best"
            pictures[f"CIDEr-D by label (clips){which}: {run.title}"] = cider_by_label(labels)
    if timed := {name: timing["parts_seconds"] for run in runs for name, timing in timings(run).items()}:
        milliseconds = {name: {part: 1000 * s for part, s in parts.items()} for name, parts in timed.items()}
        pictures["Latency by part"] = stacked_bars(milliseconds, "ms")
    return pictures


def new_figure(height: float, width: float = 7):
    """A figure of so many inches and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def figure_svg(figure) -> str:
    import matplotlib

    stream = io.StringIO()
    # Without a date and with fixed ids the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "salmonn_hf", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def wer_by_duration(runs: list[Run]) -> str:
    figure, axes = new_figure(3.2)
    durations = [run.result["breakdowns"]["wer"]["duration"] for run in runs]
    order = sorted({part["part"] for parts in durations for part in parts}, key=duration_order)
    width = 0.75 / len(runs)
    for index, (run, parts) in enumerate(zip(runs, durations, strict=True)):
        parts = [part for part in parts if part["value"] is not None]
        at = [order.index(part["part"]) + index * 0.8 / len(runs) for part in parts]
        values, low, high = (np.array([100 * part[key] for part in parts]) for key in ("value", "low", "high"))
        bars = axes.bar(at, values, width, align="edge", label=run.title)
        axes.bar_label(bars, [f"n={p['clips']}" for p in parts], fontsize=7, label_type="center", color="white")
        middle = [x + width / 2 for x in at]
        axes.errorbar(middle, values, [values - low, high - values], fmt="none", ecolor="0.3", capsize=2)
    axes.set(xticks=[i + 0.4 for i in range(len(order))], xticklabels=order, ylabel="WER (%)", xlabel="clip length")
    figure.legend(**LEGEND)
    return figure_svg(figure)


def cider_by_label(parts: list[dict]) -> str:
    parts = sorted(parts, key=lambda part: part["value"])
    shown = parts if len(parts) <= 40 else parts[:20] + parts[-20:]
    figure, axes = new_figure(0.6 + 0.17 * len(shown))
    axes.barh([f"{part['part']} ({part['clips']})" for part in shown], [part["value"] for part in shown])
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="CIDEr-D", ylim=(-0.6, len(shown) - 0.4))
    return figure_svg(figure)


def stacked_bars(rows: dict[str, dict[str, float]], unit: str) -> str:
    """A bar for each row, of its parts, one behind the other."""
    figure, axes = new_figure(0.9 + 0.5 * len(rows))
    left = np.zeros(len(rows))
    for part in next(iter(rows.values())):
        widths = [parts[part] for parts in rows.values()]
        axes.barh(list(rows), widths, left=left, label=part)
        left += widths
    axes.set(xlabel=unit)
    axes.invert_yaxis()
    figure.legend(**LEGEND)
    return figure_svg(figure)
