"""Lists of clips of one's own as sources: CSV, TSV and JSON Lines files with a column of paths and one of texts."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

SUFFIXES = (".csv", ".tsv", ".jsonl")
FILE_COLUMNS = ("audio", "file_name", "file", "audio_filepath", "path")  # `audio_filepath` as in NeMo


def open_list(path: str | Path, audio_column: str | None = None, remedy: str = "Call it 'audio'."):
    """
    A list as a `datasets.Dataset`, with the paths, which are from the list's directory, in `audio_column`, or by
    default in "audio", whichever of `FILE_COLUMNS` they were in. `remedy` ends the error for a list without one.

    Raises:
        FileNotFoundError: if there is no such list.
        ValueError: for a list without such a column, or a line that cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {path}; check the path.")
    first = next(_entries(Path(path)), None)
    if first is None:
        raise ValueError(f"{path} has no entries; check that it is the list that is meant.")
    found = [audio_column] if audio_column else [name for name in FILE_COLUMNS if name in first]
    if not found or found[0] not in first:
        missing = f"{path} has no column {audio_column or ' or '.join(FILE_COLUMNS)}; it has {list(first)}"
        if len(first) == 1 and ";" in "".join(first):
            remedy = "Separate its columns by commas instead of semicolons, or by tabs in a .tsv."
        raise ValueError(f"{missing}. {remedy}")
    # The time of its last change makes another cache of a file that was changed.
    settings = {"path": str(path), "file_column": found[0], "audio_column": audio_column or "audio"}
    return dataset_of(_rows, settings | {"modified": os.stat(path).st_mtime_ns})


def dataset_of(rows: Callable[..., Iterator[dict]], settings: dict, features=None):
    """`datasets.Dataset.from_generator` of `rows(**settings)`, which raises what they raise."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(rows, features=features, gen_kwargs=settings)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def _rows(path: str, file_column: str, audio_column: str, modified: int) -> Iterator[dict]:
    for entry in _entries(Path(path)):
        file = entry.pop(file_column, None)
        if isinstance(entry.get("seconds"), str):
            entry["seconds"] = float(entry["seconds"] or "nan")
        audio = {"bytes": None, "path": str(Path(path).parent / file) if file else f"{path}: a line without a file"}
        yield entry | {audio_column: audio}


def _entries(path: Path) -> Iterator[dict]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        if path.suffix != ".jsonl":
            yield from csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number} is no JSON object ({error}); correct it.") from error
