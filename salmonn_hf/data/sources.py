"""
Where training data comes from: the `sources` of a recipe, each read as a table of undecoded clips.

    sources:
      - {path: data/librispeech.parquet, task: asr}
      - {path: data/stage1_train.json, prefix: data/audio, weight: 0.5}
      - {path: someone/sounds, columns: {text: captions}, task: audiocaption}

Nothing but the lengths of the clips is held in memory: rows stay in the memory-mapped files of `datasets`.
"""

import difflib
import io
import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import soundfile

from ..model.audio import UNKNOWN_FRAMES, AudioError, load_audio
from ..model.sound_summary import most_typical
from . import corpora
from .augmentation import change_speed
from .corpora import UnusableClip, read_clip
from .tasks import TRAIN_PROMPTS, is_transcript

logger = logging.getLogger(__name__)

COLUMNS = ("audio", "text", "task", "question", "seconds", "expand_wav")
SCANNED_ROWS = 50_000  # at a time
SCANNED_CLIPS = 500  # at a time, where their audio has to be looked at


def parquet_rows(files: list[str], *columns: str):
    """
    Parquet files with an `audio` column, as `datasets` writes it, as one `datasets.Dataset` of undecoded clips.

    Args:
        columns: what else the files must have.

    Raises:
        ValueError: for a column that they lack, naming those that they have.
    """
    from datasets import Audio, load_dataset

    dataset = load_dataset("parquet", data_files=list(files), split="train")
    for column in ("audio", *columns):
        if column not in dataset.column_names:
            raise ValueError(f"{files} has no column {column!r}; it has {dataset.column_names}.")
    return dataset.cast_column("audio", Audio(decode=False))


@dataclass(frozen=True)
class Source:
    """
    One source of clips.

    Args:
        path (`str`): a Parquet file (or a pattern of several), a SALMONN annotation `.json`, a directory (of Parquet
            files, or an audiofolder with a metadata file), or the name of a `datasets` dataset on the hub.
        prefix (`str`): of an annotation file: the directory that its paths are under.
        name, split (`str`): configuration and split of a dataset.
        columns (`dict[str, str]`): what the source calls `audio`, `text`, `task`, `question` and `seconds` where it is
            not that. `text` may hold a list of texts, such as five captions, of which each pass draws one.
        weight (`float`): how often each clip is taken in an epoch: with 0.5 every second one, the others in the next
            epoch; with 2 all of them twice. Of streams: their share of the clips.
        task (`str`, *optional*): one of SALMONN's, for all rows. Without it and without a `task` column, each is to be
            transcribed, and asked for in the processor's own words instead of a prompt drawn from the task's.
        speed (`float`): play the clips at so many times their speed.
        typical_text (`bool`): of a list of texts take that which has most in common with the others, in every pass.
        streaming (`bool`): read it as it comes, without an index: for what does not fit on the disk.

    Raises:
        ValueError: for a key, a column or a task that there is not, with the nearest one.
    """

    path: str
    prefix: str = ""
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    task: str | None = None
    speed: float = 1.0
    typical_text: bool = False
    streaming: bool = False

    def __post_init__(self):
        for column in self.columns:
            _check_name(f"columns of source {self.path!r}: column", column, COLUMNS)
        if self.task is not None:
            _check_name(f"source {self.path!r}: task", self.task, TRAIN_PROMPTS)
        if self.weight <= 0 or self.speed <= 0:
            raise ValueError(
                f"Source {self.path!r} has weight {self.weight} and speed {self.speed}; both must be above 0. Leave "
                "out a source that is not to be used."
            )
        if self.prefix and not self.path.endswith(".json"):
            raise ValueError(f"Source {self.path!r} has a prefix, which only an annotation .json takes; remove it.")
        if self.streaming and (self.path.endswith(".json") or self.speed != 1.0):
            raise ValueError(f"Source {self.path!r}: an annotation .json or a speed cannot be streamed.")

    @classmethod
    def parse(cls, settings: str | dict) -> "Source":
        """A source from a recipe's mapping, or from the same as JSON on the command line."""
        if isinstance(settings, str):
            try:
                settings = json.loads(settings)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'The source {settings!r} is not JSON ({error}); give e.g. {{"path": ...}}.'
                ) from error
        for key in settings:
            _check_name("sources: key", key, [entry.name for entry in fields(cls)])
        if "path" not in settings:
            raise ValueError(f"The source {settings} has no path; say where it is.")
        return cls(**settings)

    def choose_text(self, texts: list[str], number: int = 0) -> str:
        """One of a clip's texts: the most typical, or that of a `number`, counted round and round."""
        if self.typical_text:
            return texts[most_typical([text.lower().split() for text in texts])]
        return texts[number % len(texts)]

    def open(self):
        """Its rows as a `datasets.Dataset` (or `IterableDataset`) of undecoded clips; of `COLUMNS`, those it has."""
        from datasets import Audio, Dataset, Value, load_dataset

        if self.path.endswith(".json"):
            # The time of its last change makes another cache of a file that was changed.
            arguments = {"path": self.path, "prefix": self.prefix, "modified": os.stat(self.path).st_mtime_ns}
            dataset = Dataset.from_generator(_annotation_rows, gen_kwargs=arguments)
        elif self.path.endswith(".parquet"):
            dataset = load_dataset("parquet", data_files=self.path, split="train", streaming=self.streaming)
        elif metadata := _audiofolder_metadata(self.path, self.split):
            form = {".csv": "csv", ".jsonl": "json"}[metadata.suffix]
            dataset = load_dataset(form, data_files=str(metadata), split="train")
            paths = [str(metadata.parent / name) for name in dataset["file_name"]]
            dataset = dataset.remove_columns("file_name").add_column("audio", paths)
        else:
            dataset = load_dataset(self.path, self.name, split=self.split, streaming=self.streaming)
        found = dataset.column_names
        theirs = {ours: self.columns.get(ours, ours) for ours in COLUMNS}
        for ours, column in theirs.items():
            if column not in found and (ours in ("audio", "text") or ours in self.columns):
                nearest = difflib.get_close_matches(column, found, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(
                    f"{self.path} has no column {column!r}; it has {found}.{hint} Map it: columns: {{{ours}: NAME}}."
                )
        theirs = {ours: column for ours, column in theirs.items() if column in found}
        if not self.path.endswith(".json"):
            # Of a stream, `datasets` would encode an Audio column anew, undecoded or not, which needs torchcodec; and
            # decode it when it renames columns, if it were not cast before.
            undecoded = {"bytes": Value("binary"), "path": Value("string")} if self.streaming else Audio(decode=False)
            dataset = dataset.cast_column(theirs["audio"], undecoded)
        dataset = dataset.select_columns(list(theirs.values()))
        return dataset.rename_columns({column: ours for ours, column in theirs.items() if column != ours})


def _audiofolder_metadata(directory: str, split: str) -> Path | None:
    """Of an audiofolder, its metadata file. Not left to `datasets`, whose own reader needs torchcodec."""
    names = ("metadata.csv", "metadata.jsonl")
    places = [Path(directory, split, name) for name in names] + [Path(directory, name) for name in names]
    return next((place for place in places if place.is_file()), None)


def _annotation_rows(path: str, prefix: str, modified: int):
    """Rows of an annotation file; its entries without a path become rows that are skipped by name."""
    dropped = []
    for row in corpora.annotation(path, prefix, drop=lambda *entry: dropped.append(entry)):
        yield {name: row.get(name) for name in ("audio", "text", "task", "question")} | {
            "expand_wav": row.get("expand_wav") or []
        }
    for where, _, _ in dropped:
        yield {"audio": {"bytes": None, "path": where}, "text": None, "task": "asr", "question": "", "expand_wav": []}


def _check_name(what: str, name: str, known):
    if name not in known:
        nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
        raise ValueError(f"Unknown {what} {name!r}. Did you mean {nearest!r}?")


class SkippedClips:
    """
    Clips that cannot be trained on, with the reason. None is ever put in another's place.

    Args:
        path (`str`, *optional*): a tab-separated file of path, reason and detail, written anew.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = path
        self.entries: list[tuple[str, str, str]] = []
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text("path\treason\tdetail\n", encoding="utf-8")
            except OSError as error:
                raise OSError(f"Cannot write {path} ({error}); name a directory that can be written.") from error

    def add(self, path: str, reason: str, detail: str = ""):
        self.entries.append((path, reason, detail))
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\t".join(" ".join(value.split()) for value in (path, reason, detail)) + "\n")

    def report(self):
        for reason, count in Counter(reason for _, reason, _ in self.entries).items():
            first = next(path for path, other, _ in self.entries if other == reason)
            logger.warning(
                "skipped %d clips: %s (first %s)%s", count, reason, first, f"; see {self.path}" * bool(self.path)
            )


class ClipTable:
    """
    The usable clips of a source: `table[i]` is a row, `{"audio": {"bytes", "path"}, "text", "task", "question", ...}`.

    Args:
        source ([`Source`]).
        rows (`datasets.Dataset`, *optional*): the source's rows, if not those of `source.open()`.
        min_seconds, max_seconds (`float`): shorter and longer clips are skipped.
        skipped ([`SkippedClips`], *optional*): where they are listed.

    Attributes:
        kept (`np.ndarray` of int64, shape `(clips,)`): the rows that are usable.
        seconds (`np.ndarray` of float32, shape `(clips,)`): how long they are. From the `seconds` column, else from
            the headers of the files, which takes a while for many: `training/prepare_data.py` makes an index.
    """

    def __init__(
        self,
        source: Source,
        rows=None,
        min_seconds: float = 0.0,
        max_seconds: float = 30.0,
        skipped: SkippedClips | None = None,
    ):
        self.source = source
        self.rows = source.open() if rows is None else rows
        skipped = skipped if skipped is not None else SkippedClips()
        measured = _seconds(self.rows) / source.speed
        usable = np.ones(len(self.rows), dtype=bool)
        reasons = {}
        for index in np.flatnonzero(~_has_text(self.rows)):
            reasons[int(index)] = "no text"
        for index in np.flatnonzero(~(measured > 0)):
            reasons.setdefault(int(index), "unreadable" if np.isnan(measured[index]) else "zero length")
        for index in np.flatnonzero((measured > 0) & (measured < min_seconds)):
            reasons.setdefault(int(index), "too short")
        for index in np.flatnonzero(measured > max_seconds):
            reasons.setdefault(int(index), "too long")
        for index, reason in sorted(reasons.items()):
            usable[index] = False
            row = self.rows[index]
            skipped.add(row["audio"]["path"] or f"{source.path}#{index}", reason, f"{measured[index]:.2f} s")
        self.kept = np.flatnonzero(usable)
        self.seconds = measured[self.kept].astype(np.float32)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict:
        return self.rows[int(self.kept[index])]

    def tasks(self) -> set[str]:
        """The tasks of the usable clips; "asr" where none is named."""
        if self.source.task or "task" not in self.rows.column_names:
            return {self.source.task or "asr"}
        return {task for task, _ in self.tasks_and_texts()}

    def texts(self):
        """The texts of all usable clips, one after another; of a clip with several, all."""
        for _, texts in self.tasks_and_texts():
            yield from texts

    def transcripts(self):
        """As `texts`, of the clips whose task is to transcribe them."""
        for task, texts in self.tasks_and_texts():
            if is_transcript(task):
                yield from texts

    def tasks_and_texts(self):
        """The task and the texts of each usable clip, one after another."""
        kept = np.zeros(len(self.rows), dtype=bool)
        kept[self.kept] = True
        start = 0
        columns = ["text"] + ["task"] * (not self.source.task and "task" in self.rows.column_names)
        for batch in self.rows.select_columns(columns).iter(SCANNED_ROWS):
            tasks = batch.get("task") or [self.source.task] * len(batch["text"])
            for is_kept, task, text in zip(kept[start:], tasks, batch["text"], strict=False):
                if is_kept:
                    yield task or "asr", [text] if isinstance(text, str) else text
            start += len(batch["text"])


def _has_text(rows) -> np.ndarray:
    found = []
    for batch in rows.select_columns("text").iter(SCANNED_ROWS):
        for text in batch["text"]:
            texts = text if isinstance(text, list) else [text]
            found.append(any(isinstance(one, str) and one.strip() for one in texts))
    return np.array(found, dtype=bool)


def _seconds(rows) -> np.ndarray:
    """Lengths, float64; NaN for a clip that is missing or unreadable."""
    measured = [np.zeros(0)]
    if "seconds" in rows.column_names:
        for batch in rows.select_columns("seconds").with_format("numpy").iter(SCANNED_ROWS):
            measured.append(np.asarray(batch["seconds"], dtype=np.float64))
        return np.concatenate(measured)
    columns = [name for name in ("audio", "expand_wav") if name in rows.column_names]
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for batch in rows.select_columns(columns).iter(SCANNED_CLIPS):
            entries = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            measured.append(np.array(list(pool.map(row_seconds, entries)), dtype=np.float64))
    return np.concatenate(measured)


def row_seconds(row: dict) -> float:
    """The length of a row's clip by its header; NaN for one that is missing or unreadable."""
    try:
        if row["audio"]["bytes"] is None:
            parts = [row["audio"]["path"], *(row.get("expand_wav") or ())]
            silence = (len(parts) - 1) * corpora.EXPAND_SILENCE / corpora.SAMPLING_RATE
            return sum(corpora.file_seconds(path) for path in parts) + silence
        if not row["audio"]["bytes"]:
            return 0.0
        found = soundfile.info(io.BytesIO(row["audio"]["bytes"]))
        if found.frames in (0, UNKNOWN_FRAMES):  # a FLAC's header also says 0 where its writer could not seek back
            return _decoded_seconds(row["audio"])
        return found.frames / found.samplerate
    except (UnusableClip, soundfile.LibsndfileError, ValueError, OSError):
        return float("nan")


def _decoded_seconds(audio: dict) -> float:
    try:
        return len(load_audio(audio)) / corpora.SAMPLING_RATE
    except AudioError:
        return 0.0


def row_texts(row: dict) -> list[str]:
    """The texts of a row's clip that are not empty."""
    texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
    return [text for text in texts if text and text.strip()]


def row_waveform(row: dict, speed: float = 1.0) -> np.ndarray:
    """
    A row's clip, `(samples,)`, float32 at 16 kHz, played at `speed` times its own.

    Raises:
        UnusableClip: for one that cannot be decoded.
    """
    if row.get("expand_wav"):
        waveform = read_clip(row)
    else:
        try:
            waveform = load_audio(row["audio"])
        except (ValueError, OSError) as error:  # AudioError among them
            raise UnusableClip("damaged", str(error)) from error
    return waveform if speed == 1.0 else change_speed(waveform, speed)
