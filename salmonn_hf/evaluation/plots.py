"""Pictures of results: errors by length and kind, captions by label, latency by part."""

import io

from .results import Run, timings
from .scoring import duration_order


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
