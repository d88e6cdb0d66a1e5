"""What the readers of corpora share: rows, errors, and annotations as JSON and CSV, read entry by entry."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import ijson

from .skipped_clips import UnusableClip

Drop = Callable[[str, str, str], None]


class CorpusError(ValueError):
    """A corpus that is not there or not in its published form. The message names the path and what to do about it."""


def refuse(path: str, reason: str, detail: str):
    raise CorpusError(f"{path}: {UnusableClip(reason, detail)}; correct it, or leave such entries out with `drop`.")


def example(path, text, task: str, source: str, question: str = "", **optional) -> dict:
    """A row, see `salmonn_hf.data.corpora`."""
    audio = {"bytes": None, "path": str(path)}
    return {"audio": audio, "text": text, "task": task, "question": question, "source": source, **optional}


def require_file(path: str | Path, remedy: str) -> Path:
    if not Path(path).is_file():
        raise CorpusError(f"{path} does not exist; {remedy}.")
    return Path(path)


def require_directory(path: str | Path, remedy: str) -> Path:
    if not Path(path).is_dir():
        raise CorpusError(f"{path} is not a directory; {remedy}.")
    return Path(path)


def require_subset(path: str | Path, subset: str, known):
    if subset not in known:
        raise CorpusError(f"{path} has no subset {subset!r}; there are {', '.join(known)}.")


def json_items(path: Path, key: str) -> Iterator:
    """The items of the list under `key` of a JSON file, without ever holding more than one of them."""
    item = None
    with path.open("rb") as file:
        try:
            for item in ijson.items(file, f"{key}.item", use_float=True):
                yield item
        except ijson.JSONError as error:
            remedy = "if it is complete, look for NaN, which JSON writes as null"
            raise CorpusError(f"{path} is not valid JSON ({str(error).splitlines()[0]}); {remedy}.") from error
    if item is None:
        raise CorpusError(f"{path} has no items under {key!r}; check that it is the file that is meant.")


def csv_rows(path: Path, columns: list[str], drop: Drop) -> Iterator[dict]:
    """The rows of a CSV file that has at least these columns, less the rows that end before them."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or []
        if missing := [column for column in columns if column not in found]:
            raise CorpusError(f"{path} has no column {', '.join(missing)}; it has {found}. Use the published file.")
        for row in reader:
            if any(row[column] is None for column in columns):
                drop(f"{path}#{reader.line_num}", "incomplete entry", str(row)[:200])
            else:
                yield row
