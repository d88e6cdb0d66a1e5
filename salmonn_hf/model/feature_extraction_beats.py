"""Waveforms to BEATs' input: as they are, checked and padded. The model makes the mel filterbank itself."""

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor

from .audio import AudioError, load_audio


class BeatsFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Args:
        feature_size, sampling_rate, padding_value: as for `SequenceFeatureExtractor`.
        min_samples (`int`): of a clip; the default is what one patch of 16 frames of 25 ms every 10 ms takes.
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(self, feature_size=1, sampling_rate=16_000, padding_value=0.0, min_samples=2800, **kwargs):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.min_samples = min_samples

    def __call__(self, raw_speech, sampling_rate=None, padding=True, return_tensors=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            raw_speech: one clip or a list of clips, each anything that [`load_audio`] takes: an array
                at 16 kHz, path, bytes, dict.
            sampling_rate (`int`, *optional*): of arrays; must be `self.sampling_rate`.
            padding, return_tensors, **kwargs: as for `SequenceFeatureExtractor.pad`.

        Returns:
            `BatchFeature`: `input_values` float32 (clips, samples) and `attention_mask` int32 (clips, samples).

        Raises:
            AudioError: for a clip that is empty or too short for one patch, or holds NaN or infinite samples.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(
                f"The clips are sampled at {sampling_rate} Hz, but the model takes {self.sampling_rate} Hz. "
                "Resample them, e.g. with salmonn_hf.load_audio."
            )
        batched = isinstance(raw_speech, (list, tuple)) and not (raw_speech and isinstance(raw_speech[0], float))
        clips = [load_audio(clip, self.sampling_rate) for clip in (raw_speech if batched else [raw_speech])]
        for index, clip in enumerate(clips):
            if len(clip) < self.min_samples:
                raise AudioError(
                    f"Clip {index} has {len(clip)} samples; BEATs needs {self.min_samples} "
                    f"({1000 * self.min_samples / self.sampling_rate:.0f} ms) for one patch. Give longer audio, or "
                    "append silence."
                )
        features = BatchFeature({"input_values": [clip.astype(np.float32, copy=False) for clip in clips]})
        return self.pad(features, padding=padding, return_attention_mask=True, return_tensors=return_tensors, **kwargs)


__all__ = ["BeatsFeatureExtractor"]
