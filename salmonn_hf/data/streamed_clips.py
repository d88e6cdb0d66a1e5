"""Streamed sources: for data that does not fit on the disk."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from .clip_dataset import ClipDataset
from .sources import Source
from .text_choice import row_texts


@dataclass(eq=False)
class StreamedClips(torch.utils.data.IterableDataset):
    """
    Clips of streamed sources, pass after pass without end. Each pass goes through every source, shuffled among
    `buffer` of its clips and mixed by weight; the order depends on seed and pass.

    An item is not yet an example but the arguments of `ClipDataset.example`, which the collator calls: a process need
    not decode what another trains on.

    Args:
        clips: makes the examples; without tables of its own.
        min_seconds, max_seconds: shorter and longer clips are skipped, where a source has their `seconds`.

    Attributes:
        skip_first (`int`): so many clips are given as `None`, not decoded: a resumed run was trained on them before.
    """

    clips: ClipDataset
    sources: list[Source]
    buffer: int = 1000
    min_seconds: float = 0.0
    max_seconds: float = 30.0

    def __post_init__(self):
        self.streams = [source.open() for source in self.sources]
        self.skip_first = 0

    def mixed(self, pass_number: int):
        """Sources and rows of a pass: the source of each is drawn by weight from those that have not ended."""
        running = []
        for part, (source, stream) in enumerate(zip(self.sources, self.streams, strict=True)):
            rng = np.random.default_rng([self.clips.seed, pass_number, part])
            running.append((source, iter(stream.shuffle(generator=rng, buffer_size=self.buffer))))
        rng = np.random.default_rng([self.clips.seed, pass_number])
        while running:
            weights = np.array([source.weight for source, _ in running])
            chosen = rng.choice(len(running), p=weights / weights.sum())
            source, rows = running[chosen]
            row = next(rows, None)
            if row is None:
                del running[chosen]
            else:
                yield source, row

    def __iter__(self):
        given = 0
        for pass_number in itertools.count():
            before = given
            for index, (source, row) in enumerate(self.mixed(pass_number)):
                yield None if given < self.skip_first else self.item(source, row, pass_number, index)
                given += 1
            if given == before:  # a worker process that has no file of its own
                return

    def item(self, source: Source, row: dict, pass_number: int, index: int):
        seconds = row.get("seconds")
        if not row_texts(row):
            reason = "no text"
        elif seconds is not None and not self.min_seconds <= seconds <= self.max_seconds:
            reason = f"too {'short' if seconds < self.min_seconds else 'long'} ({seconds:.2f} s)"
        else:
            return row, source, pass_number, index, seconds or 0.0
        return {"path": source.clip_name(row, index), "skipped": reason}
