"""Augmentation of training audio: speed, noise and gain of the waveform, masks on its log-mel frames."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from transformers.hf_argparser import HfArg

from ..model.audio import SAMPLING_RATE, load_audio

MAX_SECONDS = 30.0  # that the encoder takes


@dataclass(frozen=True)
class Augmentation:
    """
    Ranges to draw from, as fields of a recipe. The defaults change nothing: each part is on where it has a range, and
    evaluation uses none of them.

    Raises:
        ValueError: for a value that cannot be drawn from, naming the field.
        FileNotFoundError: for a noise file that is not there.
    """

    augmented_share: float = HfArg(default=1.0, help="Share of clips augmented; the others may come from the cache.")
    speed_factors: list[float] = HfArg(default_factory=list, help="One is drawn for each clip (Ko et al., 2015).")
    snr_db: list[float] = HfArg(default_factory=list, help="Range of the ratio of clip to noise, in dB, e.g. 5 25.")
    noise_probability: float = HfArg(default=0.5, help="Share of the clips that get noise.")
    noise_files: list[str] = HfArg(default_factory=list, help="Audio files; without any, noise is white or pink.")
    gain_db: list[float] = HfArg(default_factory=list, help="Lowest and highest gain, in dB, e.g. -12 6.")
    time_masks: int = HfArg(default=0, help="SpecAugment: masks over time for each clip.")
    time_mask_frames: int = HfArg(default=70, help="Their greatest width, in frames of 10 ms.")
    time_mask_share: float = HfArg(default=0.2, help="Their greatest width, as a share of the clip.")
    frequency_masks: int = HfArg(default=0, help="SpecAugment: masks over mel bins for each clip.")
    frequency_mask_bins: int = HfArg(default=15, help="Their greatest width, in mel bins.")

    def __post_init__(self):
        for name in ("snr_db", "gain_db"):
            values = getattr(self, name)
            if len(values) not in (0, 2) or list(values) != sorted(values):
                raise ValueError(f"{name} is {values}; give the lowest and the highest value, or none.")
        if any(speed <= 0 for speed in self.speed_factors):
            raise ValueError(f"speed_factors is {self.speed_factors}; give positive factors such as 0.9 1.0 1.1.")
        for name in ("augmented_share", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to 1.")
        for file in self.noise_files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"noise_files has {file}, which is no file; check the path.")
        if self.time_masks * self.time_mask_share >= 1:
            masks = f"{self.time_masks} time masks of up to {self.time_mask_share} of a clip"
            raise ValueError(f"{masks} could cover all of it; lower time_masks or time_mask_share.")

    def augment(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """
        A clip at another speed, in noise, and louder or softer, in this order.

        The gain is lowered where a sample would otherwise go past full scale, so that nothing is clipped; so is the
        level of a clip that noise, or resampling, takes past it. The ratio of clip to noise stays as drawn. All that
        is random comes from `rng`.

        Args:
            waveform (`np.ndarray`): `(samples,)`, float, at 16 kHz, full scale [-1, 1]. It is left as it is.

        Returns:
            `np.ndarray` of shape `(samples / speed,)`, float32, in [-1, 1]. Silence stays silence.

        Raises:
            AudioError: for a noise file that cannot be read.
        """
        if self.speed_factors:
            speed = float(rng.choice(self.speed_factors))
            if len(waveform) / speed <= MAX_SECONDS * SAMPLING_RATE:
                waveform = change_speed(waveform, speed)
        if self.snr_db and rng.random() < self.noise_probability:
            noise = self._noise(len(waveform), rng)
            waveform = add_noise(waveform, noise, rng.uniform(*self.snr_db))
        gain = 10 ** (rng.uniform(*self.gain_db) / 20) if self.gain_db else 1.0
        full_scale = 1 / max(float(np.abs(waveform).max()), 1e-30)  # silence has no peak
        return (waveform * np.float64(min(gain, full_scale))).astype(np.float32)

    def mask_features(self, features: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        SpecAugment (Park et al., Interspeech 2019) without time warping: spans of frames and of mel bins are replaced
        by the clip's mean, the paper's 0 of normalised features. A width is drawn from 0 to its limit, then a start
        from the places where the span fits. The default widths are its policy SM, which suits short clips.

        Args:
            features (`torch.Tensor`): `(clips, mel bins, frames)` of log-mel energies, right-padded. Left as it is.
            mask (`torch.Tensor`): `(clips, frames)`, 1 on each clip's own frames, 0 on its padding, left unmasked.
            generator (`torch.Generator`): on the device of `features`.

        Returns:
            `torch.Tensor` of the shape and dtype of `features`. Never are all frames, nor all bins, of a clip masked.

        Raises:
            ValueError: if the spans together could cover all bins.
        """
        _, bins, frames = features.shape
        if self.frequency_masks * self.frequency_mask_bins >= bins:
            masks = f"{self.frequency_masks} frequency masks of up to {self.frequency_mask_bins} bins"
            raise ValueError(f"{masks} could cover all {bins} mel bins; lower frequency_masks or frequency_mask_bins.")
        own, lengths = mask.bool()[:, None], mask.bool().sum(-1)
        widest = (lengths.double() * self.time_mask_share).long().clamp(max=self.time_mask_frames)
        times = _spans(widest, lengths, self.time_masks, frames, generator)
        widest = torch.full_like(lengths, self.frequency_mask_bins)
        frequencies = _spans(widest, torch.full_like(lengths, bins), self.frequency_masks, bins, generator)
        masked = times[:, None] | frequencies[:, :, None]
        total = features.float().masked_fill(~own, 0.0).sum((1, 2), keepdim=True)
        mean = total / (lengths * bins)[:, None, None]
        return torch.where(masked & own, mean.to(features.dtype), features)

    def _noise(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        if not self.noise_files:
            return (white_noise if rng.random() < 0.5 else pink_noise)(samples, rng)
        noise = load_audio(self.noise_files[rng.integers(len(self.noise_files))])
        start = rng.integers(max(len(noise) - samples, 0) + 1)
        return np.resize(noise[start:], samples)  # repeats a noise that is shorter than the clip


def change_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """A `(samples,)` waveform at `speed` times tempo and pitch: `(samples / speed,)` (Ko et al., Interspeech 2015)."""
    return soxr.resample(waveform, speed, 1.0)


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """
    A `(samples,)` waveform with noise of the same shape, at `10 · log10(power of waveform / power of noise)` of
    `snr_db`, powers being mean squares over all of the clip. A silent clip stays silent; silent noise adds nothing.
    """
    signal_power, noise_power = (np.mean(np.square(x, dtype=np.float64)) for x in (waveform, noise))
    if noise_power == 0:
        return waveform
    return waveform + np.sqrt(signal_power / noise_power / 10 ** (snr_db / 10)) * noise


def white_noise(samples: int, rng: np.random.Generator) -> np.ndarray:
    """`(samples,)` of equal power at every frequency."""
    return rng.standard_normal(samples)


def pink_noise(samples: int, rng: np.random.Generator) -> np.ndarray:
    """`(samples,)` of power proportional to 1 / frequency, as in many natural backgrounds; its mean is 0."""
    spectrum = np.fft.rfft(white_noise(samples, rng))
    frequency = np.arange(len(spectrum))
    return np.fft.irfft(np.where(frequency > 0, spectrum / np.sqrt(np.maximum(frequency, 1)), 0), samples)


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


def _spans(widest: torch.Tensor, lengths: torch.Tensor, count: int, size: int, generator) -> torch.Tensor:
    """`(clips, size)`, true on `count` spans for each clip, up to `widest` wide, in the first `lengths` places."""
    # In double precision, for a product with a number below 1 to stay below the integer.
    draws = torch.rand((2, len(lengths), count), generator=generator, device=lengths.device, dtype=torch.float64)
    widths = (draws[0] * (widest[:, None] + 1)).long()
    starts = (draws[1] * (lengths[:, None] - widths + 1)).long()
    places = torch.arange(size, device=lengths.device)
    return ((places >= starts[..., None]) & (places < (starts + widths)[..., None])).any(1)
