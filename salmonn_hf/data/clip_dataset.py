"""Clips of several sources as examples: what each is asked, which of its texts is the answer, how it is augmented."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from ..model.feature_extraction_salmonn import SalmonnFeatureExtractor
from . import task_prompts
from .augmentation import Augmentation, frame_mask
from .clip_audio import read_clip
from .clip_table import ClipTable
from .encoder_features import num_frames
from .feature_cache import FeatureCache, clip_key
from .skipped_clips import UnusableClip
from .sources import Source
from .text_choice import row_texts


@dataclass(eq=False)
class ClipDataset(torch.utils.data.Dataset):
    """
    Examples of all tables, one table after another.

    `dataset[index]` is a clip as it is, with its task's test prompt, for evaluation. `dataset[pass, index]`, a pair of
    `MixtureSampler`, is for training in that pass over the clip's source: with a prompt, a text and an augmentation
    drawn by `seed`, `pass` and `index` alone, so that every process, and a resumed run, draws the same.

    An example is `{"clip", "messages", "task", "text", "texts", "path", "seconds"}`. `clip` holds the encoders' frames
    from the cache, or their inputs (see `encode_clips`), and `masked_frames`, bool `(frames,)`, where some are to be
    masked; of text alone it is `{"text"}`. `messages` is `None` where the processor's own request for a transcript is
    meant; `texts` are all that the clip has, and `text` is the one drawn, or the first. Of a clip that cannot be
    decoded it is `{"path", "skipped": reason}`.

    Args:
        cache: of clips that are not augmented; the others change with every pass.
        masked_frames: share of the encoder frames to mask, see `frame_mask`.
        system, system_turn: as in `task_prompts.messages`.

    Raises:
        ValueError: if there is no clip at all.
    """

    tables: list[ClipTable]
    feature_extractor: SalmonnFeatureExtractor
    cache: FeatureCache | None = None
    augmentation: Augmentation = Augmentation()
    masked_frames: float = 0.0
    system: str | None = None
    system_turn: bool = True
    seed: int = 0

    def __post_init__(self):
        self.starts = np.cumsum([0, *map(len, self.tables)])
        if self.tables and not len(self):
            paths = ", ".join(table.source.path for table in self.tables)
            raise ValueError(f"No usable clip in {paths}; see the reasons.")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        pass_number, index = item if isinstance(item, tuple) else (None, item)
        row, source, seconds = self.row(index)
        return self.example(row, source, pass_number, int(index), seconds)

    def row(self, index: int) -> tuple[dict, Source, float]:
        """A clip's row, its source and its length in seconds."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        table, place = self.tables[part], index - int(self.starts[part])
        return table[place], table.source, float(table.seconds[place])

    def example(self, row: dict, source: Source, pass_number: int | None, index: int, seconds: float) -> dict:
        """The example of a row, see above; `seconds` is how long its clip is."""
        path = source.clip_name(row, index)
        texts = source.replaced(row_texts(row))
        try:
            clip = {"text": texts[0]} if source.is_text else self.clip(row, source.speed, pass_number, index)
        except UnusableClip as error:
            return {"path": path, "skipped": str(error)}
        task = source.task or row.get("task")
        draw = None if pass_number is None else (self.seed, pass_number, index)
        text = source.choose_text(texts, 0 if draw is None else self._seed(pass_number, index, "text"))
        prompt = {"system": self.system, "draw": draw, "system_turn": self.system_turn}
        messages = task_prompts.messages(task, row.get("question") or "", **prompt) if task else None
        example = {"clip": clip, "messages": messages, "task": task or "asr", "text": text, "texts": texts}
        return example | {"path": path, "seconds": seconds}

    def clip(self, row: dict, speed: float, pass_number: int | None, index: int) -> dict:
        augmentation = self.augmentation if pass_number is not None else Augmentation()
        augments = augmentation != Augmentation()
        if augments and augmentation.augmented_share < 1:
            share = np.random.default_rng(self._seed(pass_number, index, "augments")).random()
            augments = share < augmentation.augmented_share
        clip = {}
        try:
            if self.cache is not None and not augments:
                clip["key"] = clip_key(row, speed)
                clip |= self.cache.get(clip["key"]) or {}
            if "audio_frames" not in clip:
                waveform = read_clip(row, speed)
                if augments:
                    rng = np.random.default_rng(self._seed(pass_number, index, "waveform"))
                    waveform = augmentation.augment(waveform, rng)
                features = self.feature_extractor([waveform], return_tensors="pt")
                if augments:
                    generator = torch.Generator().manual_seed(self._seed(pass_number, index, "features"))
                    mels, mask = features["input_features"], features["input_features_mask"]
                    features["input_features"] = augmentation.mask_features(mels, mask, generator)
                clip |= {name: features[name][0] for name in ("input_features", "input_values") if name in features}
        except (ValueError, OSError) as error:  # AudioError among them
            raise UnusableClip("damaged", str(error)) from error
        if pass_number is not None and self.masked_frames:
            generator = torch.Generator().manual_seed(self._seed(pass_number, index, "frames"))
            clip["masked_frames"] = frame_mask(num_frames(clip), self.masked_frames, generator)
        return clip

    def _seed(self, pass_number: int, index: int, what: str) -> int:
        digest = hashlib.sha256(f"{self.seed} {pass_number} {index} {what}".encode()).digest()
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
