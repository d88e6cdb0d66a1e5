"""The usable clips of a source as a table: nothing but their lengths is held in memory."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .clip_audio import clip_seconds_or_nan
from .skipped_clips import SkippedClips
from .sources import Source
from .task_prompts import is_transcript
from .text_choice import row_texts

REASONS = ("no text", "unreadable", "zero length", "too short", "too long")
SCANNED_ROWS = 50_000  # at a time
CHARACTERS_PER_SECOND = 15  # of speech
SCANNED_CLIPS = 500  # at a time, where their audio has to be looked at


class ClipTable:
    """
    The usable clips of a source: `table[i]` is a row, `{"audio": {"bytes", "path"}, "text", "task", "question", ...}`.

    Args:
        rows (`datasets.Dataset`, *optional*): the source's rows, if not those of `source.open()`.
        min_seconds, max_seconds (`float`): shorter and longer clips are skipped.
        skipped ([`SkippedClips`], *optional*): where they are listed.
        max_clips (`int`, *optional*): no more than the first so many.

    Attributes:
        usable_rows (`np.ndarray` of int64, shape `(clips,)`): their places among all rows.
        seconds (`np.ndarray` of float32, shape `(clips,)`): how long they are. From the `seconds` column, else from
            the headers of the files, which takes a while for many: `training/prepare_data.py` makes an index.
    """

    def __init__(self, source: Source, rows=None, min_seconds=0.0, max_seconds=30.0, skipped=None, max_clips=None):
        self.source, self.rows = source, source.open() if rows is None else rows
        skipped = skipped if skipped is not None else SkippedClips()
        measured = (_text_seconds if source.is_text else _seconds)(self.rows) / source.speed
        short, long = measured < min_seconds, measured > max_seconds
        conditions = (~_has_text(self.rows), np.isnan(measured), measured <= 0, short, long)  # as in REASONS
        reasons = np.select(conditions, range(len(REASONS)), -1)
        for index in np.flatnonzero(reasons >= 0).tolist():
            skipped.add(source.clip_name(self.rows[index], index), REASONS[reasons[index]], f"{measured[index]:.2f} s")
        self.usable_rows = np.flatnonzero(reasons < 0)[:max_clips]
        self.seconds = measured[self.usable_rows].astype(np.float32)

    def __len__(self) -> int:
        return len(self.usable_rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[int(self.usable_rows[index])]

    def tasks(self) -> set[str]:
        """The tasks of the usable clips; "asr" where none is named."""
        if self.source.task or "task" not in self.rows.column_names:
            return {self.source.task or "asr"}
        return {task for task, _ in self.tasks_and_texts()}

    def transcripts(self):
        """The texts of the clips whose task is to transcribe them, one after another; of a clip with several, all."""
        for task, texts in self.tasks_and_texts():
            if is_transcript(task):
                yield from texts

    def tasks_and_texts(self):
        """The task and the texts of each usable clip, one after another."""
        usable, start = np.isin(np.arange(len(self.rows)), self.usable_rows), 0
        columns = ["text"] + ["task"] * (not self.source.task and "task" in self.rows.column_names)
        for batch in self.rows.select_columns(columns).iter(SCANNED_ROWS):
            tasks = batch.get("task") or [self.source.task] * len(batch["text"])
            for is_usable, task, text in zip(usable[start:], tasks, batch["text"], strict=False):
                if is_usable:
                    yield task or "asr", [text] if isinstance(text, str) else text
            start += len(tasks)


def _has_text(rows) -> np.ndarray:
    batches = rows.select_columns("text").iter(SCANNED_ROWS)
    return np.array([bool(row_texts({"text": text})) for batch in batches for text in batch["text"]], dtype=bool)


def _text_seconds(rows) -> np.ndarray:
    """How long texts would take to be said, float64."""
    return np.array([len(text or "") / CHARACTERS_PER_SECOND for text in rows["text"]], dtype=np.float64)


def _seconds(rows) -> np.ndarray:
    """Lengths, float64; NaN for a clip that is missing or unreadable."""
    measured = [np.zeros(0)]  # of no rows
    if "seconds" in rows.column_names:
        batches = rows.select_columns("seconds").with_format("numpy").iter(SCANNED_ROWS)
        return np.concatenate([*measured, *(np.asarray(batch["seconds"], dtype=np.float64) for batch in batches)])
    columns = [name for name in ("audio", "expand_wav") if name in rows.column_names]
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for batch in rows.select_columns(columns).iter(SCANNED_CLIPS):
            entries = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            measured.append(np.array(list(pool.map(clip_seconds_or_nan, entries)), dtype=np.float64))
    return np.concatenate(measured)
