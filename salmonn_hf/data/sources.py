"""
Where training data comes from: the `sources` of a recipe, each opened as a memory-mapped dataset of undecoded clips.

    sources:
      - {path: data/librispeech.parquet, task: asr}
      - {path: data/stage1_train.json, prefix: data/audio, weight: 0.5}
      - {path: someone/sounds, columns: {text: captions}, task: audiocaption}
"""

import difflib
import json
import os
from dataclasses import dataclass, field, fields
from glob import glob
from pathlib import Path

from .clip_lists import SUFFIXES, dataset_of, open_list
from .clip_parquet import open_parquet
from .column_mapping import COLUMNS, map_columns
from .corpora import annotation
from .task_prompts import TRAIN_PROMPTS
from .text_choice import most_typical

LIST_REMEDY = "Call it 'audio', or map it: columns: {audio: NAME} of a source."


@dataclass(frozen=True)
class Source:
    """
    One source of clips, as a recipe has it.

    Args:
        path (`str`): a Parquet file (or a pattern of several), a `.csv`, `.tsv` or `.jsonl` list of files and their
            texts, a SALMONN annotation `.json`, a directory (of Parquet files, or an audiofolder with a metadata
            file), or the name of a `datasets` dataset on the hub. A `.txt` is text alone, a sentence a line, which a
            language model behind a projector that transcribes learns to copy: audio goes with none of it.
        prefix (`str`): of an annotation file: the directory that its paths are under.
        name, split (`str`): configuration and split of a dataset.
        columns (`dict[str, str]`): what the source calls `audio`, `text`, `task`, `question` and `seconds` where it is
            not that. `text` may hold a list of texts, such as five captions, of which each pass draws one.
        weight (`float`): how often each clip comes in an epoch: with 0.5 every second one, the others in the next
            epoch; with 2 all of them twice. Of streams: their share of the clips.
        task (`str`, *optional*): one of SALMONN's, for all rows. Without it and without a `task` column, each is to be
            transcribed, with the processor's own request instead of a prompt of the task.
        speed (`float`): factor on the speed of the clips, tempo and pitch alike.
        typical_text (`bool`): of a list of texts take the one that has most in common with the others, in every pass.
        replace (`dict[str, str]`): strings in the texts of an answer, and what the model is to write in their place;
            for what the audio does not tell, such as three dots where a full stop would do.
        streaming (`bool`): read it row by row, without an index: for what does not fit on the disk.

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
    replace: dict[str, str] = field(default_factory=dict)
    streaming: bool = False

    def __post_init__(self):
        _check_names(f"columns of source {self.path!r}: column", self.columns, COLUMNS)
        _check_names(f"source {self.path!r}: task", [] if self.task is None else [self.task], TRAIN_PROMPTS)
        if min(self.weight, self.speed) <= 0:
            found = f"has weight {self.weight} and speed {self.speed}"
            raise ValueError(f"Source {self.path!r} {found}; both must be above 0. Leave out a source not to be used.")
        if self.prefix and not self.path.endswith(".json"):
            raise ValueError(f"Source {self.path!r} has a prefix, which only an annotation .json takes; remove it.")
        if self.streaming and (self.path.endswith((".json", *SUFFIXES)) or self.speed != 1.0):
            raise ValueError(f"Source {self.path!r}: an annotation .json, a list or a speed cannot be streamed.")

        if self.is_text and (self.task or self.streaming or self.speed != 1.0 or self.columns):
            raise ValueError(
                f"Source {self.path!r} is text alone, without task, columns, speed or streaming; remove it."
            )

    @property
    def is_text(self) -> bool:
        """Whether it is text alone, without audio."""
        return self.path.endswith(".txt")

    @classmethod
    def parse(cls, settings: str | dict) -> "Source":
        """A source from a recipe's mapping, or from the same as JSON on the command line."""
        if isinstance(settings, str):
            try:
                settings = json.loads(settings)
            except json.JSONDecodeError as error:
                message = f'The source {settings!r} is not JSON ({error}); give e.g. {{"path": ...}}.'
                raise ValueError(message) from error
        _check_names("sources: key", settings, [entry.name for entry in fields(cls)])
        if "path" not in settings:
            raise ValueError(f"The source {settings} has no path; give one.")
        return cls(**settings)

    def clip_name(self, row: dict, index: int) -> str:
        """What a row's clip is called where it is skipped: its file, or its number."""
        return (row.get("audio") or {}).get("path") or f"clip {index} of {self.path}"

    def replaced(self, texts: list[str]) -> list[str]:
        """Texts with what `replace` names replaced."""
        for old, new in self.replace.items():
            texts = [text.replace(old, new) for text in texts]
        return texts

    def choose_text(self, texts: list[str], number: int = 0) -> str:
        """One of a clip's texts: the most typical, or the one at `number`, counted round and round."""
        if self.typical_text:
            return texts[most_typical([text.lower().split() for text in texts])]
        return texts[number % len(texts)]

    def open(self):
        """Its rows as a `datasets.Dataset` (or `IterableDataset`) of undecoded clips; of `COLUMNS`, those it has."""
        from datasets import Features, List, Value, load_dataset

        if self.path.endswith(".json"):
            # The time of its last change makes another cache of a file that was changed.
            arguments = {"path": self.path, "prefix": self.prefix, "modified": os.stat(self.path).st_mtime_ns}
            strings = {name: Value("string") for name in ("text", "task", "question")}
            audio = {"bytes": Value("binary"), "path": Value("string")}
            features = Features({"audio": audio, **strings, "expand_wav": List(Value("string"))})
            dataset = dataset_of(_annotation_rows, arguments, features)
        elif self.path.endswith((".parquet", ".txt")):
            if "://" not in self.path and not glob(self.path):
                remedy = "other data is named by --train_files, --eval_file or --sources"
                raise FileNotFoundError(
                    f"There is no {self.path}. A recipe's head says which files to bring; {remedy}."
                )
            if self.is_text:
                dataset = load_dataset("text", data_files=self.path, split="train")
            else:
                dataset = open_parquet([self.path], self.streaming)
        elif self.path.endswith(SUFFIXES):
            dataset = open_list(self.path, self.columns.get("audio"), LIST_REMEDY)
        elif metadata := _audiofolder_metadata(self.path, self.split):
            dataset = open_list(metadata, self.columns.get("audio"), LIST_REMEDY)
        else:
            dataset = load_dataset(self.path, self.name, split=self.split, streaming=self.streaming)
        return map_columns(dataset, self.columns, self.path, ("text",) if self.is_text else ("audio", "text"))


def _audiofolder_metadata(directory: str, split: str) -> Path | None:
    """Of an audiofolder, its metadata file. Not left to `datasets`, whose own reader needs torchcodec."""
    folders, names = (Path(directory, split), Path(directory)), ("metadata.csv", "metadata.jsonl")
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _annotation_rows(path: str, prefix: str, modified: int):
    """Rows of an annotation file; its entries without a path become rows without a text, which are skipped by name."""
    broken = []
    for row in annotation.read_examples(path, prefix, drop=lambda where, *_: broken.append(where)):
        yield {"expand_wav": []} | {name: row[name] for name in COLUMNS if name in row}
    for where in broken:
        yield {"audio": {"bytes": None, "path": where}, "text": None, "task": "asr", "question": "", "expand_wav": []}


def _check_names(what: str, names, known):
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown {what} {name!r}. Did you mean {nearest!r}?")
