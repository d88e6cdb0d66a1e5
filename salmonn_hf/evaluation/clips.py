"""The clips of an evaluation, with what is asked of each and what may be answered."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..data.clip_audio import clip_seconds_or_nan, read_clip
from ..data.clip_parquet import parquet_rows
from ..data.corpora import annotation

GROUP_COLUMNS = ("source", "kind", "speaker", "label", "task")


@dataclass
class Clip:
    """
    Args:
        id (`str`): names the clip in messages and results.
        row (`Callable[[], dict]`): reads the row of the clip, which stays in its file until it is needed.
        references (`list[str]`): accepted transcripts, captions or answers; none where they are not known.
        prompt (`str`): what is asked of it; "" for the model's own transcription prompt.
        groups (`dict[str, str]`): what scores are broken down by, e.g. its source.
    """

    id: str
    row: Callable[[], dict]
    references: list[str]
    prompt: str = ""
    groups: dict[str, str] = field(default_factory=dict)

    def waveform(self) -> np.ndarray:
        """Float32 of shape `(samples,)` at 16 kHz; an UnusableClip or OSError where the clip cannot be read."""
        return read_clip(self.row())

    def header_seconds(self) -> float:
        """The length by the file's header, 0 where that tells none: enough to put like beside like."""
        seconds = clip_seconds_or_nan(self.row())
        return 0.0 if math.isnan(seconds) else seconds


def parquet_clips(
    files: list[str],
    references: str,
    prompt: str = "",
    question: str | None = None,
    references_option: str = "text_column",
) -> list[Clip]:
    """
    Clips of Parquet files with an `audio` column, as `datasets` writes it, or of lists, see `data/clip_lists.py`.

    Args:
        references (`str`): the column of the accepted texts, a string or a list of them.
        prompt (`str`): asked of every clip.
        question (`str`, *optional*): the column of a question of each clip's own, asked instead.
        references_option (`str`): that names the column of the texts, for errors.

    Raises:
        ValueError: for a file without one of the columns, naming what it has.
    """
    data = parquet_rows(files, **{references_option: references}, question_column=question)
    clips = []
    for row, columns in enumerate(data.remove_columns("audio")):
        accepted = columns[references]
        accepted = [accepted or ""] if isinstance(accepted, str | None) else list(accepted)
        groups = {name: str(columns[name]) for name in GROUP_COLUMNS if columns.get(name)}
        name, asked = str(columns.get("clip_id") or row), columns[question] if question else prompt
        clips.append(Clip(name, partial(data.__getitem__, row), accepted, asked, groups))
    return clips


def annotation_clips(path: str, prefix: str, prompts: dict[str, str]) -> list[Clip]:
    """
    Clips of a SALMONN annotation file, named by their `testset_id` where they have one; `prompts` by task.

    Raises:
        ValueError: for an entry of a task that has no prompt.
        CorpusError: for a file that is not in that form.
    """
    clips = []
    for number, entry in enumerate(annotation.read_examples(path, prefix)):
        if entry["task"] not in prompts:
            raise ValueError(f"{path}: entry {number} is of task {entry['task']!r}; expected {', '.join(prompts)}.")
        texts = [entry["text"]] if isinstance(entry["text"], str) else []
        name, groups = str(entry.get("testset_id", number)), {"source": entry["source"]}
        clips.append(Clip(name, partial(dict, entry), texts, prompts[entry["task"]], groups))
    return clips
