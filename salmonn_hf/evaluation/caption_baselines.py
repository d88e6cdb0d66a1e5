"""Captions without a caption model: the floor that a captioner has to rise above, measured by the same engine."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from ..data.skipped_clips import UnusableClip
from .clips import Clip

BASELINES = {
    "most_frequent": "the most frequent training caption",
    "nearest": "a caption of the nearest training clip by the speech encoder",
}


class MostFrequentCaption:
    """Says of every clip what is most often said of the training clips (of several, the first in the alphabet)."""

    max_seconds = float("inf")
    device, dtype = "cpu", "none"

    def __init__(self, train: list[Clip]):
        counts = Counter(caption for clip in train for caption in clip.references)
        self.caption = min(counts, key=lambda caption: (-counts[caption], caption))

    def __call__(self, waveforms: list[np.ndarray], prompts: list[str]) -> list[str]:
        return [self.caption] * len(waveforms)


class NearestCaption:
    """
    Says of a clip the first caption of the training clip whose speech-encoder features, averaged over time and
    standardised over the training clips, have the highest cosine with its own. Training clips that cannot be read, or
    are longer than the encoder's 30 s, are not used.

    Args:
        answerer ([`Answerer`]): of whose encoder and processor the features are.
    """

    max_seconds = 30.0

    def __init__(self, train: list[Clip], answerer, batch_size: int = 16):
        self.answerer = answerer
        self.device, self.dtype = answerer.device, answerer.dtype
        pairs = [(clip, waveform) for clip, waveform in readable(train) if len(waveform) <= 30 * 16000]
        pairs.sort(key=lambda pair: -len(pair[1]))
        self.captions = [clip.references[0] for clip, _ in pairs]
        waveforms = [waveform for _, waveform in pairs]
        means = [self.mean_features(waveforms[i : i + batch_size]) for i in range(0, len(waveforms), batch_size)]
        means = torch.cat(means)
        self.mean, self.std = means.mean(0), means.std(0) + 1e-6
        self.train = self.standardised(means)

    @torch.inference_mode()
    def mean_features(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        """float32 of shape `(clips, d_model)`."""
        model = self.answerer.model
        features = self.answerer.processor.feature_extractor(waveforms, return_tensors="pt").to(model.device)
        encoded = model.encode_audio(**features)
        mask = encoded["audio_frames_mask"][..., None].float()
        return ((encoded["audio_frames"].float() * mask).sum(1) / mask.sum(1)).cpu()

    def standardised(self, means: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize((means - self.mean) / self.std, dim=-1)

    def __call__(self, waveforms: list[np.ndarray], prompts: list[str]) -> list[str]:
        similar = self.standardised(self.mean_features(waveforms)) @ self.train.T
        return [self.captions[index] for index in similar.argmax(-1).tolist()]


def readable(clips: list[Clip]) -> Iterator[tuple[Clip, np.ndarray]]:
    for clip in clips:
        try:
            yield clip, clip.waveform()
        except (UnusableClip, OSError):
            continue
