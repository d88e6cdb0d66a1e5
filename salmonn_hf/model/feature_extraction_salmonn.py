"""Waveforms to Whisper's log-mel frames, each clip over its own length."""

import math

import numpy as np
from transformers import BatchFeature, WhisperFeatureExtractor

from .audio import AudioError, load_audio

# What processors hand to any feature extractor, the text's options among them; nothing is done with it here.
OF_ANY = ("padding", "truncation", "max_length", "pad_to_multiple_of", "return_attention_mask", "load_audio_backend")
OF_WHISPER = ("do_normalize", "return_token_timestamps")  # accepted where they ask for nothing


class SalmonnFeatureExtractor(WhisperFeatureExtractor):
    r"""
    Whisper's log-mel spectrogram (25 ms windows, 10 ms hop) without its padding to 30 s: a batch is padded to its
    longest clip only, and `input_features_mask` is 1 on the frames of each. A clip's features do not depend on its
    batch.

    Args:
        feature_size (`int`): mel bins; Whisper base 80, large-v3 128.
        tail_seconds (`float`): silence appended to each clip. Whisper was trained on padded audio and
            recognises a last word better with a little of it.
        pad_to_30_seconds (`bool`): SALMONN's original geometry: every clip is padded with silence to 30 s, and the
            mask is 1 on all of it. As in the model's config.
        return_input_values (`bool`): also return the waveform, for a sound encoder. As in SALMONN, a clip shorter than
            a second is padded with silence to one, and counts as so long: BEATs' first patch takes 0.175 s.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self, feature_size=80, tail_seconds=0.2, pad_to_30_seconds=False, return_input_values=False, **kwargs
    ):
        super().__init__(feature_size=feature_size, **kwargs)
        self.tail_seconds = tail_seconds
        self.pad_to_30_seconds = pad_to_30_seconds
        self.return_input_values = return_input_values

    def fetch_audio(self, audio, sampling_rate=None):
        """Decode one clip, or each clip of a list, to a 1-D float32 array at `self.sampling_rate`."""
        if isinstance(audio, (list, tuple)) and not (len(audio) > 0 and isinstance(audio[0], float)):
            return [load_audio(clip, self.sampling_rate) for clip in audio]
        return load_audio(audio, self.sampling_rate)

    def __call__(self, raw_speech, sampling_rate=None, return_tensors="np", device="cpu", **kwargs) -> BatchFeature:
        r"""
        Args:
            raw_speech (`np.ndarray` or `list[np.ndarray]`): mono clips in [-1, 1], 30 s at most each.
            sampling_rate (`int`, *optional*): of the clips; must be `self.sampling_rate`.
            return_tensors (`str`): "pt" or "np".
            device (`str`): where the spectrogram is computed.

        Returns:
            `BatchFeature`: `input_features` float32 (clips, mel bins, frames) and `input_features_mask` int (clips,
            frames); with `return_input_values` also `input_values` float32 (clips, samples), `input_values_mask`.

        Raises:
            AudioError: for a clip that is empty, longer than 30 s, not mono, or holds NaN or infinite samples.
            ValueError: for options that it does not have.
        """
        if other := [name for name in kwargs if name not in OF_ANY and not (name in OF_WHISPER and not kwargs[name])]:
            raise ValueError(f"{', '.join(other)}: SalmonnFeatureExtractor has no such option. Leave it out.")
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(
                f"The clips are sampled at {sampling_rate} Hz, but the model takes {self.sampling_rate} Hz. "
                "Resample them, e.g. with salmonn_hf.load_audio."
            )
        clips = self.fetch_audio(raw_speech if isinstance(raw_speech, (list, tuple)) else [raw_speech])
        for index, clip in enumerate(clips):
            if len(clip) > self.n_samples:
                raise AudioError(
                    f"Clip {index} lasts {len(clip) / self.sampling_rate:.1f} s; the encoder takes "
                    f'{self.chunk_length} s at most. Use pipeline("automatic-speech-recognition"), which cuts it.'
                )
        # Whole encoder frames (two hops each) only, so that the length in frames is the same alone and in any batch.
        frame = 2 * self.hop_length
        lengths = [math.ceil((len(c) + self.tail_seconds * self.sampling_rate) / frame) * frame for c in clips]
        lengths = [self.n_samples if self.pad_to_30_seconds else min(length, self.n_samples) for length in lengths]
        padded = [np.pad(clip, (0, length - len(clip))) for clip, length in zip(clips, lengths, strict=True)]
        settings = {"padding": "longest", "truncation": False, "return_attention_mask": True, "device": device}
        features = super().__call__(padded, sampling_rate=self.sampling_rate, **settings)
        data = {"input_features": features["input_features"], "input_features_mask": features["attention_mask"]}
        if self.return_input_values:
            lengths = np.array([max(len(clip), self.sampling_rate) for clip in clips])
            data["input_values"] = np.stack([np.pad(clip, (0, lengths.max() - len(clip))) for clip in clips])
            data["input_values_mask"] = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int32)
        return BatchFeature(data, tensor_type=return_tensors)


SalmonnFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["SalmonnFeatureExtractor"]
