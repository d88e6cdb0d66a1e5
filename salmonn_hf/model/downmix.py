"""
Several channels as one. As a rule it is their mean; but channels that would cancel each other in it are left out.

One channel may be another one inverted (a cable with its poles swapped), in whole or in part of the time or the
spectrum; or come later (two microphones), which takes a comb of frequencies out of the mean.
"""

import numpy as np

BLOCK_SAMPLES = 1 << 20  # of all channels, mixed at a time: hours of audio need little memory
WINDOW = 1024  # samples of a spectrum
WINDOWS = 256  # of a block are looked at, at most
EXCERPT = 1 << 17  # samples in which a delay is looked for
BANDS = 8  # of equal width in octaves
QUIET = 1e-4  # of the loudest channel's power: a channel that takes nothing away
CANCELLED = 0.25  # of the channels' mean power: two channels that have nothing in common keep 0.5
CANCELLED_SHARE = 0.08  # of the power of a channel, band by band
LARGEST = 1e9  # beyond it, and where samples are not finite, there is nothing to compare
COPY = 0.6  # correlation with a later or earlier copy
IN_PHASE = 0.7  # of that correlation, without any delay
FINE_BANDS = 14  # from 200 Hz on, in which two channels are compared moment by moment
LOUD = 0.01  # of a band's greatest power, and
OVER_NOISE = 10.0  # times what it mostly has: moments of a channel that another one must have as well
SOFTER = 0.06  # of the power that it would have as a copy
ALIKE = 0.3  # squared coherence; a band of unrelated channels has 0.2 at most
OWN_SHARE = 0.3  # of a channel's loud moments
CLEARER_DB = 3.0  # more between its loud and its quiet moments, for a later channel to be taken for the clearer


def mix_down(samples: np.ndarray) -> np.ndarray:
    """
    One block of channels as one channel.

    Args:
        samples (`np.ndarray` of shape `(samples, channels)`): floats.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32: the mean of the channels, less those that are a delayed copy of
        a clearer one, or would cancel it. A channel with something of its own, such as another speaker, stays.
    """
    channels = samples.shape[1]
    if channels == 1:
        return np.ascontiguousarray(samples[:, 0], dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # the caller looks for NaN and infinite samples
        mean = samples.mean(axis=1, dtype=np.float32)
    if len(samples) < WINDOW or not np.abs(samples).max() < LARGEST:
        return mean
    tracks = np.ascontiguousarray(samples.T)
    power = tracks.var(axis=1)
    tracks = tracks[power > QUIET * power.max()]
    if (tracks == tracks[:1]).all():
        return mean
    windows, excerpts = spectra(tracks), excerpt_spectra(tracks)
    kept = []
    for index in sorted(range(len(tracks)), key=lambda index: -round(range_db(tracks[index]) / CLEARER_DB)):
        for other in kept:
            delay = delay_of_copy(excerpts[index], excerpts[other])
            cancels = cancelled_share(windows[index], windows[other]) > CANCELLED_SHARE
            if (cancels or delay is not None) and not has_its_own(tracks[index], tracks[other], delay or 0):
                break
        else:
            kept.append(index)
    return mean if len(kept) == len(tracks) else tracks[kept].mean(axis=0, dtype=np.float32)


def has_its_own(track: np.ndarray, other: np.ndarray, delay: int) -> bool:
    """
    Whether a channel, which comes `delay` samples after another one, has much that the other has not, such as a
    speaker: in its loud moments, band by band, the other is soft or is not coherent with it.
    """
    own, copy = spectra(np.stack([track, np.roll(other, delay)]))
    edges = np.unique(np.geomspace(13, WINDOW // 2, FINE_BANDS + 1).round().astype(int))[:-1]
    power, copied = (np.add.reduceat(np.abs(channel) ** 2, edges, axis=1) for channel in (own, copy))
    cross = np.abs(np.add.reduceat(own * copy.conj(), edges, axis=1)) ** 2
    loud = power > np.maximum(LOUD * power.max(axis=0), OVER_NOISE * np.percentile(power, 10, axis=0))
    is_softer = copied * power.max(axis=0) < SOFTER * power * copied.max(axis=0)
    missed = (cross < ALIKE * power * copied) | is_softer
    return bool(loud.any() and missed[loud].mean() > OWN_SHARE)


def range_db(track: np.ndarray) -> float:
    """How far the quiet moments of a channel lie below its loud ones: the less, the more noise is in it."""
    levels = track[: len(track) // WINDOW * WINDOW].reshape(-1, WINDOW).var(axis=1)
    quiet, loud = np.percentile(levels, [10, 95])
    return float(10 * np.log10(max(loud, 1e-20) / max(quiet, 1e-6 * loud, 1e-20)))


def spectra(tracks: np.ndarray) -> np.ndarray:
    """Spectra of windows of each channel: `(channels, windows, frequencies)`."""
    count = tracks.shape[1] // WINDOW
    windows = tracks[:, : count * WINDOW].reshape(len(tracks), count, WINDOW)[:, :: -(-count // WINDOWS)]
    return np.fft.rfft(windows * np.hanning(WINDOW).astype(np.float32))


def excerpt_spectra(tracks: np.ndarray) -> np.ndarray:
    """One spectrum of each channel, of where they are loudest: `(channels, frequencies)`, each of power 1."""
    starts = range(0, max(1, tracks.shape[1] - EXCERPT + 1), EXCERPT)
    start = max(starts, key=lambda start: tracks[:, start : start + EXCERPT].var())
    differences = np.diff(tracks[:, start : start + EXCERPT])  # as loud at high frequencies as at low ones
    differences /= np.maximum(np.linalg.norm(differences, axis=1, keepdims=True), 1e-20)
    return np.fft.rfft(differences, 1 << (2 * differences.shape[1] - 1).bit_length())


def cancelled_share(first: np.ndarray, second: np.ndarray) -> float:
    """The share of two channels' power, averaged over bands, in windows and bands where their mean has little."""
    edges = np.unique(np.geomspace(4, WINDOW // 2, BANDS + 1).round().astype(int))[:-1]
    own = np.add.reduceat((np.abs(first) ** 2 + np.abs(second) ** 2) / 2, edges, axis=1)
    left = np.add.reduceat(np.abs((first + second) / 2) ** 2, edges, axis=1)
    total = own.sum(axis=0)
    lost = np.where(left < CANCELLED * own, own, 0).sum(axis=0)
    heard = total > 1e-6 * total.max()
    return float(np.mean(lost[heard] / total[heard])) if heard.any() else 0.0


def delay_of_copy(first: np.ndarray, second: np.ndarray) -> int | None:
    """By how many samples the first of two channels that are much more alike when moved comes later, or `None`."""
    correlation = np.abs(np.fft.irfft(first * second.conj()))
    delay = int(correlation.argmax())
    if correlation[delay] <= COPY or correlation[0] >= IN_PHASE * correlation[delay]:
        return None
    return delay if delay < len(correlation) // 2 else delay - len(correlation)
