"""Captions that say that somebody speaks and how it sounds, for clips that are perhaps made worse for it."""

from pathlib import Path

import numpy as np
import yaml
from speech_clips import divide_spectrum

from salmonn_hf.data.augmentation import add_noise
from salmonn_hf.model.audio import SAMPLING_RATE

CAPTIONS = yaml.safe_load(Path(__file__).with_name("speech_questions.yaml").read_text(encoding="utf-8"))["captions"]
DEEP_HZ, HIGH_HZ = 125.0, 190.0  # what lies between is neither
TELEPHONE_SHARE, NOISE_SHARE, NOISE_DB = 0.3, 0.3, (0.0, 12.0)


def median_pitch(samples: np.ndarray) -> float | None:
    """Median of the pitch in Hz of voiced frames, by autocorrelation; None for fewer than ten."""
    size, hop = SAMPLING_RATE // 25, SAMPLING_RATE // 50
    if len(samples) < 10 * size:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    frames = frames - frames.mean(1, keepdims=True)
    power = (frames**2).sum(1)
    frames = frames[power > 0.05 * np.quantile(power, 0.95)]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(size), 2 * size)) ** 2
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)
    correlation = np.fft.irfft(spectra)[:, : size // 2] / window[: size // 2]
    correlation /= np.maximum(correlation[:, :1], 1e-12)
    shortest, longest = SAMPLING_RATE // 400, SAMPLING_RATE // 65
    within = correlation[:, shortest:longest]
    within = within[within.max(1) > 0.6]
    if len(within) < 10:
        return None
    # The first lag that is nearly the best, then its peak: twice a period fits as well as a period.
    first = (within > 0.92 * within.max(1, keepdims=True)).argmax(1)
    peaks = [lag + int(row[lag : lag + 12].argmax()) for lag, row in zip(first, within, strict=True)]
    return float(np.median(SAMPLING_RATE / (np.array(peaks) + shortest)))


def telephone(samples: np.ndarray) -> np.ndarray:
    """Only what lies between 300 and 3,400 Hz, in the 8 bits of a telephone's mu-law."""
    high_pass, low_pass = lambda hz: 1 + (300 / np.maximum(hz, 1)) ** 8, lambda hz: 1 + (hz / 3400) ** 24
    samples = divide_spectrum(samples, lambda hz: np.sqrt(high_pass(hz) * low_pass(hz)))
    scale = np.abs(samples).max(initial=1e-9)
    bits = np.round(127 * np.log1p(255 * np.abs(samples) / scale) / np.log(256)) / 127
    return np.sign(samples) * scale * (256**bits - 1) / 255


def noise_for(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White, or pink, whose power falls with frequency."""
    noise = rng.standard_normal(len(samples))
    if rng.random() < 0.5:
        return noise
    return divide_spectrum(noise, lambda frequencies: np.sqrt(np.maximum(frequencies, 50)))


def caption(samples: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """A clip, perhaps made worse; what is said of it; which kind that is."""
    pitch = median_pitch(samples)
    voice = "voice" if pitch is None or DEEP_HZ < pitch < HIGH_HZ else "deep" if pitch <= DEEP_HZ else "high"
    text, drawn = str(rng.choice(CAPTIONS[voice])), rng.random()
    if drawn > TELEPHONE_SHARE + NOISE_SHARE:
        return samples, f"{text}.", voice
    over = "telephone" if drawn < TELEPHONE_SHARE else "noise"
    if over == "telephone":
        samples = telephone(samples)
    else:
        samples = add_noise(samples, noise_for(samples, rng), rng.uniform(*NOISE_DB))
        samples = samples / max(1.0, float(np.abs(samples).max()))
    return samples, f"{text}, {rng.choice(CAPTIONS[over])}.", f"{voice}, {over}"
