"""Clips of several sources as training examples: which come in an epoch, what each is asked, how it is augmented."""

import hashlib
import itertools

import numpy as np
import torch

from . import tasks
from .augmentation import Augmentation
from .corpora import UnusableClip
from .feature_cache import FeatureCache, clip_key
from .sources import ClipTable, Source, row_texts, row_waveform


class ClipDataset(torch.utils.data.Dataset):
    """
    Examples of all tables, one table after another.

    `dataset[index]` is a clip as it is, with its task's test prompt: what evaluation sees. `dataset[pass, index]`, as
    `MixtureSampler` asks, is what training sees in that pass over the clip's source: with a prompt, a text and an
    augmentation drawn by `seed`, `pass` and `index` alone, so that every process, and a run that is resumed, draws
    the same.

    An example is `{"clip", "messages", "task", "text", "texts", "path", "seconds"}`. `clip` holds the encoders' frames
    from the cache, or their inputs (see `encode_clips`), and `masked_frames`, bool `(frames,)`, where some are to be
    masked; `messages` is `None` where the processor's own request for a transcript is meant; `texts` are all that the
    clip has, and `text` is the one drawn, or the first. Of a clip that cannot be decoded it is
    `{"path", "skipped": reason}`.

    Args:
        tables (`list[ClipTable]`).
        feature_extractor ([`SalmonnFeatureExtractor`]).
        cache ([`FeatureCache`], *optional*): looked into for clips that are not augmented; those of the others change
            with every pass.
        augmentation ([`Augmentation`], *optional*).
        masked_frames (`float`): share of the encoder frames to mask, see `frame_mask`.
        system (`str`, *optional*), system_turn (`bool`): as in `tasks.messages`.
        seed (`int`).

    Raises:
        ValueError: if there is no clip at all.
    """

    def __init__(
        self,
        tables: list[ClipTable],
        feature_extractor,
        cache: FeatureCache | None = None,
        augmentation: Augmentation | None = None,
        masked_frames: float = 0.0,
        system: str | None = None,
        system_turn: bool = True,
        seed: int = 0,
    ):
        self.tables = tables
        self.feature_extractor = feature_extractor
        self.cache = cache
        self.augmentation = augmentation or Augmentation()
        self.masked_frames = masked_frames
        self.system, self.system_turn = system, system_turn
        self.seed = seed
        self.starts = np.cumsum([0, *map(len, tables)])
        if tables and not len(self):
            raise ValueError(f"No usable clip in {', '.join(table.source.path for table in tables)}; see the reasons.")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        draw, index = item if isinstance(item, tuple) else (None, item)
        row, source, seconds = self.row(index)
        return self.example(row, source, draw, int(index), seconds)

    def row(self, index: int) -> tuple[dict, Source, float]:
        """A clip's row, its source and its length in seconds."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        table, place = self.tables[part], index - int(self.starts[part])
        return table[place], table.source, float(table.seconds[place])

    def example(self, row: dict, source: Source, draw: int | None, index: int, seconds: float) -> dict:
        """The example of a row, see above; `seconds` is how long its clip is."""
        path = row["audio"]["path"] or f"clip {index} of {source.path}"
        try:
            clip = self.clip(row, source.speed, draw, index)
        except UnusableClip as error:
            return {"path": path, "skipped": str(error)}
        texts = row_texts(row)
        task = source.task or row.get("task")
        messages = self.messages(task, row.get("question") or "", draw, index) if task else None
        return {
            "clip": clip,
            "messages": messages,
            "task": task or "asr",
            "text": source.choose_text(texts, 0 if draw is None else self._seed(draw, index, "text")),
            "texts": texts,
            "path": path,
            "seconds": seconds,
        }

    def clip(self, row: dict, speed: float, draw: int | None, index: int) -> dict:
        augmentation = self.augmentation if draw is not None else Augmentation()
        augments = augmentation != Augmentation()
        if augments and augmentation.augmented_share < 1:
            rng = np.random.default_rng(self._seed(draw, index, "augments"))
            augments = rng.random() < augmentation.augmented_share
        clip = {}
        try:
            if self.cache is not None and not augments:
                clip["key"] = clip_key(row, speed)
                clip |= self.cache.get(clip["key"]) or {}
            if "audio_frames" not in clip:
                waveform = row_waveform(row, speed)
                if augments:
                    rng = np.random.default_rng(self._seed(draw, index, "waveform"))
                    waveform = augmentation.augment(waveform, rng)
                features = self.feature_extractor([waveform], return_tensors="pt")
                if augments:
                    generator = torch.Generator().manual_seed(self._seed(draw, index, "features"))
                    features["input_features"] = augmentation.mask_features(
                        features["input_features"], features["input_features_mask"], generator
                    )
                clip |= {name: features[name][0] for name in ("input_features", "input_values") if name in features}
        except (ValueError, OSError) as error:  # AudioError among them
            raise UnusableClip("damaged", str(error)) from error
        if draw is not None and self.masked_frames:
            generator = torch.Generator().manual_seed(self._seed(draw, index, "frames"))
            clip["masked_frames"] = frame_mask(num_frames(clip), self.masked_frames, generator)
        return clip

    def messages(self, task: str, question: str, draw: int | None, index: int) -> list[dict]:
        return tasks.messages(
            task,
            question,
            system=self.system,
            draw=None if draw is None else (self.seed, draw, index),
            system_turn=self.system_turn,
        )

    def _seed(self, draw: int, index: int, what: str) -> int:
        digest = hashlib.sha256(f"{self.seed} {draw} {index} {what}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def lengths(self) -> np.ndarray:
        """Seconds of each example, the measure of its cost."""
        return np.concatenate([table.seconds for table in self.tables])

    def tasks(self) -> set[str]:
        """The tasks of all examples."""
        return set().union(*(table.tasks() for table in self.tables))

    def task_of_each(self) -> list[str]:
        """The tasks of all examples, one after another."""
        return [task for table in self.tables for task, _ in table.tasks_and_texts()]

    def texts(self):
        """The texts of all examples, one after another; of a clip with several, all."""
        for table in self.tables:
            yield from table.texts()


def num_frames(clip: dict) -> int:
    """Frames of the speech encoder (20 ms each) that a clip has, or will have."""
    if "audio_frames" in clip:
        return len(clip["audio_frames"])
    return (clip["input_features"].shape[-1] + 1) // 2


def frame_mask(frames: int, share: float, generator: torch.Generator, span: int = 6) -> torch.Tensor:
    """
    `(frames,)`, true on about `share` of them, in runs of `span` (120 ms): SpecAugment's time masking (Park et al.,
    2019) on encoder features, as wav2vec 2.0 is fine-tuned with.
    """
    count = int(frames * share / span + torch.rand((), generator=generator))
    starts = torch.randint(max(frames - span, 1), (count, 1), generator=generator)
    masked = torch.zeros(frames, dtype=torch.bool)
    masked[(starts + torch.arange(min(span, frames))).flatten()] = True
    return masked


class MixtureSampler(torch.utils.data.Sampler):
    """
    Which clips come in an epoch, and in which order, as pairs `(pass, index)` for `ClipDataset`.

    A source of weight w gives round(w · clips) of its clips: it is gone through in a random order again and again, a
    new order each pass, and every epoch goes on where the last one ended. So no clip comes a second time before all of
    its source have come.

    The epoch is shuffled; then, within 50 steps, clips of similar length are put together, since a batch costs what
    its longest clip does. All is drawn by seed and epoch: nothing has to be kept to resume.

    Args:
        dataset ([`ClipDataset`]).
        step_size (`int`): clips of an optimizer step, over all processes and accumulated batches.
        seed (`int`).
        group_by_length (`bool`): `False` leaves the shuffled order as it is.
    """

    STEPS_SORTED = 50

    def __init__(self, dataset: ClipDataset, step_size: int, seed: int = 0, group_by_length: bool = True):
        self.sizes = [len(table) for table in dataset.tables]
        self.counts = [
            round(table.source.weight * size) for table, size in zip(dataset.tables, self.sizes, strict=True)
        ]
        self.lengths = dataset.lengths
        self.step_size, self.seed, self.group_by_length = step_size, seed, group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self):
        for number, index in zip(*self._epoch(), strict=True):
            yield int(number), int(index)

    def _epoch(self) -> tuple[np.ndarray, np.ndarray]:
        """Passes and indices in the epoch's order. Apart from `__iter__`, which would hold all that is drawn here."""
        passes, indices, start = [], [], 0
        for part, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if count:
                numbers, places = np.divmod(np.arange(self.epoch * count, (self.epoch + 1) * count), size)
                for number in np.unique(numbers):
                    order = np.random.default_rng([self.seed, part, int(number)]).permutation(size)
                    indices.append(start + order[places[numbers == number]])
                passes.append(numbers)
            start += size
        passes, indices = np.concatenate(passes), np.concatenate(indices)
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(indices))
        if self.group_by_length:
            order = self._grouped(order, self.lengths[indices[order]], rng)
        return passes[order], indices[order]

    def _grouped(self, order: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        grouped = np.empty_like(order)
        for start in range(0, len(order), self.step_size * self.STEPS_SORTED):
            part = slice(start, start + self.step_size * self.STEPS_SORTED)
            chunk = order[part][np.argsort(-lengths[part], kind="stable")]
            steps = chunk[: len(chunk) // self.step_size * self.step_size].reshape(-1, self.step_size)
            grouped[part] = np.concatenate([rng.permutation(steps).reshape(-1), chunk[steps.size :]])
        return grouped


class StreamedClips(torch.utils.data.IterableDataset):
    """
    Clips of sources that are read as they come, pass after pass without end: in each pass each source to its end,
    shuffled among `buffer` of its clips and mixed by weight, in an order drawn by seed and pass.

    What it gives is not yet an example but the arguments of `ClipDataset.example`, which the collator asks for: a
    process need not decode what another trains on.

    Args:
        clips ([`ClipDataset`]): makes the examples; without tables of its own.
        sources (`list[Source]`).
        buffer (`int`): clips.
        min_seconds, max_seconds (`float`): shorter and longer clips are skipped, where a source has their `seconds`.

    Attributes:
        read_over (`int`): so many clips are given as `None`, which is not decoded: a run that is resumed was trained
            on them.
    """

    def __init__(
        self,
        clips: ClipDataset,
        sources: list[Source],
        buffer: int = 1000,
        min_seconds: float = 0.0,
        max_seconds: float = 30.0,
    ):
        self.clips, self.sources, self.buffer = clips, sources, buffer
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self.streams = [source.open() for source in sources]
        self.read_over = 0

    def mixed(self, number: int):
        """Sources and rows of a pass: the source of each is drawn by weight from those that have not ended."""
        running = []
        for part, (source, stream) in enumerate(zip(self.sources, self.streams, strict=True)):
            rng = np.random.default_rng([self.clips.seed, number, part])
            running.append((source, iter(stream.shuffle(generator=rng, buffer_size=self.buffer))))
        rng = np.random.default_rng([self.clips.seed, number])
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
        for number in itertools.count():
            before = given
            for index, (source, row) in enumerate(self.mixed(number)):
                yield None if given < self.read_over else self.item(source, row, number, index)
                given += 1
            if given == before:  # a worker process that has no file of its own
                return

    def item(self, source: Source, row: dict, number: int, index: int):
        seconds = row.get("seconds")
        reason = None
        if not row_texts(row):
            reason = "no text"
        elif seconds is not None and not self.min_seconds <= seconds <= self.max_seconds:
            reason = f"too {'short' if seconds < self.min_seconds else 'long'} ({seconds:.2f} s)"
        if reason:
            return {"path": row["audio"]["path"] or f"clip {index} of {source.path}", "skipped": reason}
        return row, source, number, index, seconds or 0.0
