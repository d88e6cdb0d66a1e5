"""Index a corpus for training: one Parquet file of its usable clips, and a page that says what is in it.

    python training/prepare_data.py librispeech LibriSpeech --split train-clean-100 --output data/libri.parquet
    python training/prepare_data.py gigaspeech GigaSpeech --split M --flac data/giga-clips --output data/giga.parquet
    python training/prepare_data.py annotation stage1_train.json --prefix data/audio --output data/stage1.parquet

The corpora are those of salmonn_hf/corpora.py: annotation, librispeech, gigaspeech, audiocaps, clotho, wavcaps,
musicnet; each one's form is described there. The Parquet file has the columns `audio` (the `datasets` Audio form: a
path, or the bytes with --embed), `text`, `task`, `question`, `source`, `language`, `testset_id`, `clip_id`, `seconds`.
Clips without text, missing, unreadable, empty, too short or too long are left out, never replaced, and listed with the
reason. Lengths are read from headers; damage further inside a file shows only with --flac or --embed, which decode it.

Written beside NAME.parquet: NAME.md and NAME.png, the report, and NAME.dropped.tsv (path, reason, detail). They appear
at the end, or not at all. Clips that --flac has written stay, and are not written again when the command is.
"""

import hashlib
import inspect
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import HfArgumentParser

from salmonn_hf.data import corpora
from salmonn_hf.data.corpora import CorpusError, UnusableClip, clip_seconds, flac_bytes, is_ready, read_clip

CORPORA = ("annotation", "librispeech", "gigaspeech", "audiocaps", "clotho", "wavcaps", "musicnet")
CHUNK_ROWS = 16  # that a thread examines at a time
ROW_GROUP_CLIPS = 200  # of embedded audio
ROW_GROUP_PATHS = 20_000
LISTED_EXAMPLES = 5
REPORTED_WORDS = 20


@dataclass
class PrepareArguments:
    output: str = field(metadata={"help": "The Parquet file to write."})
    split: str | None = field(default=None, metadata={"help": "Split or subset of the corpus."})
    prefix: str | None = field(default=None, metadata={"help": "annotation: directory that its paths are under."})
    blacklist: str | None = field(default=None, metadata={"help": "wavcaps: its list of clips in other test sets."})
    flac: str | None = field(default=None, metadata={"help": "Write clips there as 16 kHz mono FLAC, index those."})
    embed: bool = field(default=False, metadata={"help": "Put the clips into the Parquet file, as FLAC."})
    min_seconds: float = field(default=0.3, metadata={"help": "Shorter clips are dropped."})
    max_seconds: float = field(default=30.0, metadata={"help": "Longer clips are dropped."})


def schema() -> pa.Schema:
    # Imported here because it is slow.
    from datasets import Audio, Features, Value

    names = ("text", "task", "question", "source", "language", "testset_id", "clip_id")
    strings = {name: Value("string") for name in names}
    # The schema's metadata makes `load_dataset` see the column as Audio, not as a struct.
    return Features({"audio": Audio(), **strings, "seconds": Value("float32")}).arrow_schema


class DropList:
    """Clips left out, written as they come; counted, with the first few kept, by reason."""

    def __init__(self, file):
        self.file, self.counts, self.examples = file, Counter(), defaultdict(list)
        file.write("path\treason\tdetail\n")

    def __call__(self, path: str, reason: str, detail: str = ""):
        self.counts[reason] += 1
        if len(self.examples[reason]) < LISTED_EXAMPLES:
            self.examples[reason].append(path)
        self.file.write("\t".join(" ".join(value.split()) for value in (path, reason, detail)) + "\n")


class Statistics:
    """What the clips kept are like: four bytes a clip, and counts that grow with the vocabulary only."""

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


# ----------------------------------------------------------------------------------------------------------- clips


def flac_path(row: dict, folder: str) -> Path:
    """Where a clip is written: its name tells its sources and their age, so no other clip is ever taken for it."""
    files = [row["audio"]["path"], *row.get("expand_wav", ())]
    identity = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr([identity, row.get("start"), row.get("end")]).encode()).hexdigest()
    name = row.get("clip_id") or Path(files[0]).stem
    return Path(folder, digest[:2], f"{name}-{digest[:16]}.flac")


def write_flac(row: dict, folder: str) -> Path:
    path = flac_path(row, folder)
    if not path.exists():
        data = flac_bytes(read_clip(row))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{threading.get_ident()}")
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def prepare_row(row: dict, arguments: PrepareArguments) -> dict | UnusableClip:
    """The row as it is written, with its clip's length, path and bytes; or why it cannot be used."""
    try:
        seconds = clip_seconds(row, arguments.min_seconds, arguments.max_seconds)
        path, data = os.path.abspath(row["audio"]["path"]), None
        if not is_ready(row):
            if arguments.flac:
                path = str(write_flac(row, os.path.abspath(arguments.flac)))
            elif arguments.embed:
                data = flac_bytes(read_clip(row))
            elif "start" in row or "expand_wav" in row:
                raise CorpusError(
                    f"{path} holds more or less than one clip, which a path cannot say; give --flac DIRECTORY to have "
                    "the clips written there, or --embed to have them in the Parquet file."
                )
        if arguments.embed:
            data = data or Path(path).read_bytes()
            path = f"{row['clip_id']}.flac" if "clip_id" in row else os.path.basename(path)
    except UnusableClip as clip:
        return clip
    testset_id = None if row.get("testset_id") is None else str(row["testset_id"])
    return {**row, "audio": {"bytes": data, "path": path}, "seconds": seconds, "testset_id": testset_id}


def batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def prepare_rows(rows: Iterator[dict], arguments: PrepareArguments, drop: DropList) -> Iterator[dict]:
    """`prepare_row` of all, in order, by a few threads, which wait for disks and decoders side by side."""
    threads = min(8, os.cpu_count())
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches(rows, threads * CHUNK_ROWS):
            chunks = batches(batch, CHUNK_ROWS)
            done = pool.map(lambda chunk: [prepare_row(row, arguments) for row in chunk], chunks)
            for row, prepared in zip(batch, (result for results in done for result in results), strict=True):
                if isinstance(prepared, UnusableClip):
                    where = row["audio"]["path"] + (f"#{row['clip_id']}" if "clip_id" in row else "")
                    drop(where, prepared.reason, prepared.detail)
                else:
                    yield prepared


# ---------------------------------------------------------------------------------------------------------- report


def table(header: list[str], rows: Iterable[Iterable]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def report(title: str, command: str, statistics: Statistics, drop: DropList) -> str:
    """The Markdown page; its plot and its list of dropped clips lie beside it, called by `title`."""
    seconds = np.frombuffer(statistics.seconds, dtype=np.float32)
    dropped, words = drop.counts.total(), statistics.words.total()
    page = [f"# {title}\n", f"`{command}`\n"]
    page.append(f"{len(seconds)} clips, {seconds.sum(dtype=np.float64) / 3600:.2f} hours; {dropped} dropped.\n")
    page.append(f"![seconds per clip, words per clip, hours by task]({title}.png)\n")
    for name, group in statistics.groups.items():
        if set(group) != {""}:
            ranked = sorted(group.items(), key=lambda item: -item[1][1])
            lines = [(key or "not given", count, f"{total / 3600:.2f}") for key, (count, total) in ranked]
            page += [f"## By {name}\n", table([name, "clips", "hours"], lines)]
    quantiles = [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1]
    header = ["mean", "min", *(f"{q:.0%}" for q in quantiles[1:-1]), "max"]
    values = [seconds.mean(dtype=np.float64), *np.quantile(seconds, quantiles)]
    page += ["## Seconds per clip\n", table(header, [[f"{value:.2f}" for value in values]])]
    once = sum(count == 1 for count in statistics.words.values())
    common = ", ".join(f"{word} ({count})" for word, count in statistics.words.most_common(REPORTED_WORDS))
    characters = "".join(sorted(statistics.characters)).replace("`", "")
    page += [
        "## Vocabulary\n",
        f"{words} words, {words / len(seconds):.1f} a clip; {len(statistics.words)} different, {once} of them once.\n",
        f"Most common: {common}.\n",
        f"{len(characters)} different characters: `` {' '.join(characters[:200].split())} ``\n",
    ]
    page.append("## Dropped\n")
    if dropped:
        examples = (", ".join(f"`{path}`" for path in drop.examples[reason]) for reason in drop.counts)
        lines = zip(drop.counts, drop.counts.values(), examples, strict=True)
        page.append(table(["reason", "clips", f"the first {LISTED_EXAMPLES}"], lines))
        page.append(f"All of them: [{title}.dropped.tsv]({title}.dropped.tsv).\n")
    else:
        page.append("None.\n")
    return "\n".join(page)


def plot(path: Path, statistics: Statistics):
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


# ---------------------------------------------------------------------------------------------------------- output


def write_parquet(path: Path, rows: Iterator[dict], row_group: int, statistics: Statistics):
    with pq.ParquetWriter(path, schema(), compression="zstd", compression_level=1) as writer:
        for batch in batches(rows, row_group):
            writer.write_table(pa.Table.from_pylist(batch, schema=writer.schema))
            for row in batch:
                statistics.add(row)


def prepare(corpus: str, root: str, arguments: PrepareArguments, command: str = "") -> Statistics:
    """Write the four files. Raises CorpusError, leaving nothing, if there is no corpus, or no usable clip in it."""
    reader = getattr(corpora, corpus)
    options = {name: getattr(arguments, name) for name in ("split", "prefix", "blacklist") if getattr(arguments, name)}
    if unknown := set(options) - set(inspect.signature(reader).parameters):
        raise CorpusError(f"{corpus} has no --{', --'.join(sorted(unknown))}; leave it away.")
    output = Path(os.path.abspath(arguments.output))
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=output.parent, prefix=".partial-"))
    try:
        statistics = Statistics()
        with open(work / "index.dropped.tsv", "w", encoding="utf-8") as file:
            drop = DropList(file)
            rows = prepare_rows(reader(root, **options, drop=drop), arguments, drop)
            row_group = ROW_GROUP_CLIPS if arguments.embed else ROW_GROUP_PATHS
            write_parquet(work / "index.parquet", rows, row_group, statistics)
        if not statistics.seconds:
            reasons = (f"{count} {reason} (first {drop.examples[reason][0]})" for reason, count in drop.counts.items())
            raise CorpusError(f"{root} has no usable clip: {'; '.join(reasons)}. Check the paths and the limits.")
        (work / "index.md").write_text(report(output.stem, command, statistics, drop), encoding="utf-8")
        plot(work / "index.png", statistics)
        for suffix in (".dropped.tsv", ".png", ".md", ".parquet"):
            os.replace(work / f"index{suffix}", output.with_suffix(suffix))
    finally:
        shutil.rmtree(work)
    return statistics


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(PrepareArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("root", help="The corpus's directory, or the annotation file.")
    arguments, given = parser.parse_args_into_dataclasses(argv)
    if not arguments.output.endswith(".parquet"):
        parser.error(f"--output {arguments.output} must end in .parquet")
    command = shlex.join(["python", "training/prepare_data.py", *argv])
    statistics = prepare(given.corpus, given.root, arguments, command)
    hours = sum(statistics.seconds) / 3600
    print(f"{len(statistics.seconds)} clips, {hours:.2f} hours; see {Path(arguments.output).with_suffix('.md')}")


if __name__ == "__main__":
    main()
