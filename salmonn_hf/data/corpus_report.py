"""What is in an index of clips: counts that grow with the vocabulary only, as a Markdown page and a plot."""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .skipped_clips import LISTED_PATHS, SkippedClips


class CorpusStatistics:
    """Lengths, words and groups of clips, a row at a time. It holds four bytes a clip, and counts."""

    def __init__(self):
        self.seconds = array("f")
        self.words, self.words_per_clip, self.characters = Counter(), Counter(), Counter()
        self.groups = {name: defaultdict(lambda: [0, 0.0]) for name in ("task", "source", "language")}

    def add(self, row: dict):
        self.seconds.append(row["seconds"])
        words = re.findall(r"[\w']+", row["text"].lower())
        self.words.update(words)
        self.words_per_clip[len(words)] += 1
        self.characters.update(row["text"])
        for name, group in self.groups.items():
            count = group[row.get(name) or ""]
            count[0] += 1
            count[1] += row["seconds"]


def table(header: list[str], rows: Iterable[Iterable]) -> str:
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def report(title: str, command: str, statistics: CorpusStatistics, dropped: SkippedClips) -> str:
    """The Markdown page; its plot and its list of dropped clips lie beside it, called by `title`."""
    seconds = np.frombuffer(statistics.seconds, dtype=np.float32)
    words, hours = statistics.words, seconds.sum(dtype=np.float64) / 3600
    clips = f"{len(seconds)} clips, {hours:.2f} hours; {dropped.counts.total()} dropped.\n"
    image = f"![seconds per clip, words per clip, hours by task]({title}.png)\n"
    page = [f"# {title}\n", f"`{command}`\n", clips, image]
    for name, group in statistics.groups.items():
        if set(group) != {""}:
            ranked = sorted(group.items(), key=lambda item: -item[1][1])
            lines = [(key or "not given", count, f"{total / 3600:.2f}") for key, (count, total) in ranked]
            page += [f"## By {name}\n", table([name, "clips", "hours"], lines)]
    quantiles = [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1]
    header = ["mean", "min", *(f"{q:.0%}" for q in quantiles[1:-1]), "max"]
    values = [seconds.mean(dtype=np.float64), *np.quantile(seconds, quantiles)]
    page += ["## Seconds per clip\n", table(header, [[f"{value:.2f}" for value in values]])]
    total, once = words.total(), sum(count == 1 for count in words.values())
    characters = "".join(sorted(statistics.characters)).replace("`", "")
    page += [
        "## Vocabulary\n",
        f"{total} words, {total / len(seconds):.1f} a clip; {len(words)} different, {once} of them once.\n",
        f"Most common: {', '.join(f'{word} ({count})' for word, count in words.most_common(20))}.\n",
        f"{len(characters)} different characters: `` {' '.join(characters[:200].split())} ``\n",
        "## Dropped\n",
    ]
    first = {reason: ", ".join(f"`{path}`" for path in paths) for reason, paths in dropped.first_paths.items()}
    rows = [(reason, count, first[reason]) for reason, count in dropped.counts.items()]
    lines = [table(["reason", "clips", f"the first {LISTED_PATHS}"], rows)]
    lines.append(f"All of them: [{title}.dropped.tsv]({title}.dropped.tsv).\n")
    return "\n".join(page + (lines if rows else ["None.\n"]))


def plot(path: Path, statistics: CorpusStatistics):
    """Histograms of seconds and words per clip, and the hours of each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    durations, words, tasks = figure.subplots(1, 3)
    durations.hist(np.frombuffer(statistics.seconds, dtype=np.float32), bins=60)
    durations.set(xlabel="seconds per clip", ylabel="clips")
    counts = statistics.words_per_clip
    words.hist(list(counts), weights=list(counts.values()), bins=min(60, max(counts) + 1))
    words.set(xlabel="words per clip", ylabel="clips")
    hours = {task or "not given": seconds / 3600 for task, (_, seconds) in statistics.groups["task"].items()}
    tasks.barh(list(hours), list(hours.values()))
    tasks.set(xlabel="hours")
    figure.savefig(path, dpi=100)
