"""Parquet files of clips, in the form of `datasets`: written clip by clip, opened without decoding."""

import difflib
from collections.abc import Iterable
from glob import glob
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import complete_or_absent
from .clip_lists import SUFFIXES, open_list
from .undecoded_audio import undecoded

# Of training/prepare_data.py.
INDEX_COLUMNS = ("audio", "text", "task", "question", "source", "language", "testset_id", "clip_id", "seconds")
CLIPS_PER_GROUP, PATHS_PER_GROUP = 200, 20_000  # each group of rows, with embedded audio or paths, is held in memory


def write_clips(path: Path, rows: Iterable[dict], columns: Iterable[str], clips_per_group: int = CLIPS_PER_GROUP):
    """
    Write rows to a file that appears once it is complete: `audio` as `{"bytes", "path"}`, `seconds` as a number,
    `captions` as a list of strings, all others as strings.
    """
    from datasets import Audio, Features, List, Value  # slow to import

    types = {"audio": Audio(), "seconds": Value("float32"), "captions": List(Value("string"))}
    # The schema's metadata makes `load_dataset` see the column as Audio, not as a struct.
    schema = Features({name: types.get(name, Value("string")) for name in columns}).arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, settings = iter(rows), {"compression": "zstd", "compression_level": 1}  # the audio is compressed already
    with complete_or_absent(path) as partial, pq.ParquetWriter(partial, schema, **settings) as writer:
        while group := list(islice(rows, clips_per_group)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def open_parquet(files: Iterable[str], streaming: bool = False):
    """Parquet files, or patterns of their names, as one dataset; a ValueError names the first that is none."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset("parquet", data_files=list(files), split="train", streaming=streaming)
    except (pa.ArrowInvalid, DatasetGenerationError) as error:
        for file in (name for pattern in files for name in sorted(glob(str(pattern)))):
            try:
                pq.read_schema(file)
            except pa.ArrowInvalid as fault:
                raise ValueError(f"{file} is no Parquet file ({fault}); make or copy it again.") from error
        raise


def parquet_rows(files: list[str], *columns: str, **options: str | None):
    """
    Parquet files with an `audio` column, as `datasets` writes it, or lists (see `clip_lists.py`), as one
    `datasets.Dataset` of undecoded clips.

    Args:
        columns: the columns that are needed.
        options: the same, by the option of a command that names each.

    Raises:
        ValueError: for a column that they lack, naming those that they have and the option.
    """
    from datasets import concatenate_datasets

    if any(str(file).endswith(SUFFIXES) for file in files):
        dataset = concatenate_datasets([open_list(file) for file in files])
    else:
        dataset = open_parquet(files)
    remedies = {column: f" Name it with --{option}." for option, column in options.items()}
    for column in ("audio", *columns, *options.values()):
        if column is not None and column not in dataset.column_names:
            nearest = difflib.get_close_matches(column, dataset.column_names, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            remedy = remedies.get(column, f" Rename the column to {column!r}.")
            raise ValueError(f"{files} has no column {column!r}; it has {dataset.column_names}.{hint}{remedy}")
    return undecoded(dataset, "audio")
