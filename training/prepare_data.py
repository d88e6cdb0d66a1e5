"""Index a corpus for training: one Parquet file of its usable clips, and a page that says what is in it.

    python training/prepare_data.py librispeech LibriSpeech --split train-clean-100 --output data/libri.parquet
    python training/prepare_data.py gigaspeech GigaSpeech --split M --flac data/giga-clips --output data/giga.parquet
    python training/prepare_data.py annotation stage1_train.json --prefix data/audio --output data/stage1.parquet
    python training/prepare_data.py jsonl eval/recordings/recordings.jsonl --output data/recordings.parquet

The corpora are the files of salmonn_hf/data/corpora, which describe each one's form. The Parquet file has `audio` (the
`datasets` Audio form: a path, or the bytes with --embed), `text`, `task`, `question`, `source`, `language`,
`testset_id`, `clip_id` and `seconds`. Clips without text, missing, unreadable, empty, too short or too long are left
out and listed with the reason. Lengths are read from headers; damage inside a file shows only with --flac or --embed.

Written beside NAME.parquet: NAME.md and NAME.png, the report, and NAME.dropped.tsv (path, reason, detail). They appear
at the end, or not at all. Clips that --flac has written stay, and are not written again when the command is.
"""

import hashlib
import inspect
import os
import pkgutil
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from salmonn_hf.data import corpora
from salmonn_hf.data.clip_audio import checked_seconds, is_flac_clip, read_clip
from salmonn_hf.data.clip_parquet import CLIPS_PER_GROUP, INDEX_COLUMNS, PATHS_PER_GROUP, write_clips
from salmonn_hf.data.corpus_files import CorpusError
from salmonn_hf.data.corpus_report import CorpusStatistics, plot, report
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.data.skipped_clips import SkippedClips, UnusableClip
from salmonn_hf.files import write_atomically
from salmonn_hf.terminal import command

ROWS_AT_A_TIME = 128  # that the threads examine


@dataclass
class PrepareArguments:
    output: str = HfArg(help="The Parquet file to write.")
    split: str | None = HfArg(default=None, help="Split or subset of the corpus.")
    prefix: str | None = HfArg(default=None, help="annotation: directory that its paths are under.")
    blacklist: str | None = HfArg(default=None, help="wavcaps: its list of clips in other test sets.")
    flac: str | None = HfArg(default=None, help="Write clips there as 16 kHz mono FLAC, index those.")
    embed: bool = HfArg(default=False, help="Put the clips into the Parquet file, as FLAC.")
    min_seconds: float = HfArg(default=0.3, help="Shorter clips are dropped.")
    max_seconds: float = HfArg(default=30.0, help="Longer clips are dropped.")


def write_flac(row: dict, folder: str) -> Path:
    """Write a clip once. Its name depends on its files and their age, so it never stands for another clip."""
    files = [row["audio"]["path"], *row.get("expand_wav", ())]
    identity = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr([identity, row.get("start"), row.get("end")]).encode()).hexdigest()
    name = row.get("clip_id") or Path(files[0]).stem
    path = Path(folder, digest[:2], f"{name}-{digest[:16]}.flac")
    if not path.exists():
        data = flac_bytes(read_clip(row))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return path


def prepare_row(arguments: PrepareArguments, row: dict) -> dict | UnusableClip:
    """The row as it is written, with its clip's length, path and bytes; or why it cannot be used."""
    try:
        seconds = checked_seconds(row, arguments.min_seconds, arguments.max_seconds)
        path, data = os.path.abspath(row["audio"]["path"]), None
        if not is_flac_clip(row):
            if arguments.flac:
                path = str(write_flac(row, os.path.abspath(arguments.flac)))
            elif arguments.embed:
                data = flac_bytes(read_clip(row))
            elif "start" in row or "expand_wav" in row:
                remedy = "give --flac DIRECTORY to have the clips written there, or --embed for the Parquet file"
                raise CorpusError(f"{path} holds more or less than one clip, so its path is not enough; {remedy}.")
        if arguments.embed:
            data = data or Path(path).read_bytes()
            path = f"{row['clip_id']}.flac" if "clip_id" in row else os.path.basename(path)
    except UnusableClip as clip:
        return clip
    testset_id = None if row.get("testset_id") is None else str(row["testset_id"])
    return {**row, "audio": {"bytes": data, "path": path}, "seconds": seconds, "testset_id": testset_id}


def prepare_rows(rows: Iterator[dict], arguments: PrepareArguments, dropped, statistics) -> Iterator[dict]:
    """`prepare_row` of all, in order, by a few threads, which wait for disks and decoders side by side."""
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        while batch := list(islice(rows, ROWS_AT_A_TIME)):
            for row, prepared in zip(batch, pool.map(partial(prepare_row, arguments), batch), strict=True):
                if isinstance(prepared, UnusableClip):
                    where = row["audio"]["path"] + (f"#{row['clip_id']}" if "clip_id" in row else "")
                    dropped.add(where, prepared.reason, prepared.detail)
                else:
                    statistics.add(prepared)
                    yield prepared


def prepare(corpus: str, root: str, arguments: PrepareArguments, command: str = "") -> CorpusStatistics:
    """Write the four files. Raises CorpusError, leaving nothing, if there is no corpus, or no usable clip in it."""
    read_examples = import_module(f"{corpora.__name__}.{corpus}").read_examples
    options = {name: getattr(arguments, name) for name in ("split", "prefix", "blacklist") if getattr(arguments, name)}
    if unknown := set(options) - set(inspect.signature(read_examples).parameters):
        raise CorpusError(f"{corpus} has no --{', --'.join(sorted(unknown))}; remove it.")
    output = Path(os.path.abspath(arguments.output))
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=output.parent, prefix=".partial-"))
    try:
        statistics, dropped = CorpusStatistics(), SkippedClips(work / "index.dropped.tsv")
        rows = prepare_rows(read_examples(root, **options, drop=dropped.add), arguments, dropped, statistics)
        group = CLIPS_PER_GROUP if arguments.embed else PATHS_PER_GROUP
        write_clips(work / "index.parquet", rows, INDEX_COLUMNS, group)
        if not statistics.seconds:
            first = dropped.first_paths
            reasons = (f"{count} {reason} (first {first[reason][0]})" for reason, count in dropped.counts.items())
            raise CorpusError(f"{root} has no usable clip: {'; '.join(reasons)}. Check the paths and the limits.")
        (work / "index.md").write_text(report(output.stem, command, statistics, dropped), encoding="utf-8")
        plot(work / "index.png", statistics)
        for suffix in (".dropped.tsv", ".png", ".md", ".parquet"):
            os.replace(work / f"index{suffix}", output.with_suffix(suffix))
    finally:
        shutil.rmtree(work)
    return statistics


@command
def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(PrepareArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("corpus", choices=[module.name for module in pkgutil.iter_modules(corpora.__path__)])
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
