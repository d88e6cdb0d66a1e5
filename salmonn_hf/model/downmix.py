"""
Several channels as one. As a rule it is their mean; but channels that would cancel each other in it are left out.

One channel may be another one inverted (a cable with its poles swapped), in whole or in part of the time or the
spectrum; or come later (two microphones), which takes a comb of frequencies out of the mean.
"""

import numpy as np

BLOCK_SAMPLES = 1 << 20  # of all channels, mixed at a time: hours of audio need little memory
WINDOW = 1024  # samples of a spectrum
BANDS = 8  # of equal width in octaves
CANCELLED = 0.25  # of the channels' mean power: two channels that have nothing in common keep 0.5
CANCELLED_SHARE = 0.15  # of the power of a channel, band by band
COPY = 0.6  # correlation with a later or earlier copy
IN_PHASE = 0.7  # of that correlation, without any delay
PREFERRED = 2.0  # times the power that a later channel must have to be taken for the loudest


def mix_down(samples: np.ndarray) -> np.ndarray:
    """
    One block of channels as one channel.

    Args:
        samples (`np.ndarray` of shape `(samples, channels)`): floats.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32: the mean of the channels, less those that are a delayed copy of
        the loudest, or would cancel it.
    """
    channels = samples.shape[1]
    if channels == 1:
        return np.ascontiguousarray(samples[:, 0], dtype=np.float32)
    mean = samples.mean(axis=1, dtype=np.float32)
    if len(samples) < WINDOW or not np.isfinite(mean).all():
        return mean
    power = samples.var(axis=0, dtype=np.float64)
    loudest = int(np.argmax(power > power.max() / PREFERRED))
    others = [index for index in range(channels) if index != loudest and power[index] > 1e-4 * power[loudest]]
    reference = samples[:, loudest]
    spoilt = [index for index in others if cancels(reference, samples[:, index])]
    if not spoilt:
        return mean
    return samples[:, [index for index in range(channels) if index not in spoilt]].mean(axis=1, dtype=np.float32)


def cancels(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the mean of two channels lacks much of what both have."""
    if np.array_equal(first, second):
        return False
    return cancelled_share(first, second) > CANCELLED_SHARE or is_delayed_copy(first, second)


def cancelled_share(first: np.ndarray, second: np.ndarray) -> float:
    """The share of the power, the mean over bands of the spectrum, that is where the mean of the two has little."""
    count = len(first) // WINDOW
    window = np.hanning(WINDOW).astype(np.float32)
    spectra = [np.fft.rfft(channel[: count * WINDOW].reshape(count, WINDOW) * window) for channel in (first, second)]
    mean = (spectra[0] + spectra[1]) / 2
    edges = np.unique(np.geomspace(4, WINDOW // 2, BANDS + 1).round().astype(int))[:-1]
    own = np.add.reduceat(sum(np.abs(spectrum) ** 2 for spectrum in spectra) / 2, edges, axis=1)
    left = np.add.reduceat(np.abs(mean) ** 2, edges, axis=1)
    total = own.sum(axis=0)
    lost = np.where(left < CANCELLED * own, own, 0).sum(axis=0)
    heard = total > 1e-6 * total.max()
    return float(np.mean(lost[heard] / total[heard])) if heard.any() else 0.0


def is_delayed_copy(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two channels are much more alike when one of them is moved."""
    whitened = [np.diff(channel) for channel in (first, second)]  # as loud at high frequencies as at low ones
    length = 1 << (2 * len(first) - 1).bit_length()
    products = np.fft.rfft(whitened[0], length) * np.fft.rfft(whitened[1], length).conj()
    norm = np.sqrt(np.prod([np.square(channel, dtype=np.float64).sum() for channel in whitened]))
    if norm == 0:
        return False
    correlation = np.abs(np.fft.irfft(products, length)) / norm
    return bool(correlation.max() > COPY and correlation[0] < IN_PHASE * correlation.max())
