"""
Long audio cut at pauses into segments, each of which goes through the model on its own, without the silence around it.
"""

from dataclasses import dataclass

import numpy as np

TARGET_SECONDS = 6.0  # a small language model transcribes short segments best: docs/nano.md
HOP_SECONDS = 0.01
SMOOTHING_HOPS = 5  # bridges the gaps between the pulses of a low voice
FORCED_CUT_HOPS = 20  # where there is no pause, the cut goes to the quietest 0.2 s
SILENCE_DBFS = -60.0
LOWEST_DB = -100.0  # digital silence
BLOCK_HOPS = 1 << 14  # looked at together, so that hours of audio need little memory
LONG_PAUSE_HOPS = 100  # at the edge of a segment, from which it is cut off
MARGIN_HOPS = 30  # of a long pause, what stays beside the speech
LOUDEST_HOPS = 20  # a word lasts 0.2 s at least
SPEECH_RANGE_DB = 35.0  # between the loudest and the softest speech of a segment
NOISE_RANGE_DB = 6.0  # by which the level of a steady noise varies
LEAST_RANGE_DB = 12.0  # of a segment's levels, where it has more than noise alone


@dataclass
class Segment:
    """
    Part of a waveform, by its first sample and the first one after it: what the model is given, `start` and `end`, and
    where in it there is more than background, `speech_start` and `speech_end`.
    """

    start: int
    end: int
    speech_start: int
    speech_end: int


def speech_segments(
    waveform: np.ndarray,
    sampling_rate: int = 16_000,
    max_seconds: float = 30.0,
    target_seconds: float = TARGET_SECONDS,
) -> list[Segment]:
    r"""
    The segments of [`split_at_pauses`] that are not silent, each without the long pauses at its two edges: beside many
    seconds of nothing a model that was trained on clips of speech loses words, or makes some up.

    Args: as of [`split_at_pauses`].
    """
    hop = hop_samples(sampling_rate)
    levels = levels_db(waveform, hop) if len(waveform) else np.zeros(0, np.float32)
    segments = []
    for start, end in split_at_pauses(waveform, sampling_rate, max_seconds, target_seconds, levels=levels):
        if is_silent(waveform[start:end]):
            continue
        first = start // hop
        of_segment = levels[first : first + -(-(end - start) // hop)]
        active = np.flatnonzero(of_segment >= background_threshold_db(of_segment))
        begins, ends = int(active[0]), int(active[-1]) + 1  # the loudest hops are always active
        kept_from = 0 if begins < LONG_PAUSE_HOPS else begins - MARGIN_HOPS
        kept_to = len(of_segment) if len(of_segment) - ends < LONG_PAUSE_HOPS else ends + MARGIN_HOPS
        places = (min(start + place * hop, end) for place in (kept_from, kept_to, begins, ends))
        segments.append(Segment(*places))
    return segments


def background_threshold_db(levels: np.ndarray) -> float:
    """
    Below this level there is no speech, not even a soft word: far below the loudest, or near the level of what is
    always there. Lower than [`pause_threshold_db`], since what is below it may be lost, and not only be cut through.
    """
    rank = -min(LOUDEST_HOPS, len(levels))
    loudest = np.partition(levels, rank)[rank]
    noise = np.percentile(levels, 5)
    softest = loudest - SPEECH_RANGE_DB
    return softest if loudest - noise < LEAST_RANGE_DB else max(softest, noise + NOISE_RANGE_DB)


def split_at_pauses(
    waveform: np.ndarray,
    sampling_rate: int = 16_000,
    max_seconds: float = 30.0,
    target_seconds: float = TARGET_SECONDS,
    min_pause_seconds: float = 0.3,
    min_segment_seconds: float = 0.5,
    levels: np.ndarray | None = None,
) -> list[tuple[int, int]]:
    r"""
    Cut a waveform into segments, in the middle of pauses. Together the segments are the whole waveform: none of it is
    lost and none is in two of them.

    A segment ends at the longest pause that leaves it between a third of `target_seconds` and `target_seconds` long;
    if there is none, at the first pause after that; failing that, at an earlier one. A rest that is no longer than
    `target_seconds`, or no longer than `max_seconds` and without a pause, stays whole; a longer one without a pause is
    cut at the quietest moment of the second half of `max_seconds`.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): mono.
        sampling_rate (`int`): in Hz.
        max_seconds (`float`): no segment is longer. At least 0.1.
        target_seconds (`float`): the length to stay below where the pauses allow it.
        min_pause_seconds (`float`): shorter gaps, as before a plosive, are no pauses.
        min_segment_seconds (`float`): no cut leaves a shorter piece, unless `max_seconds` is below four times this.
        levels (`np.ndarray`, *optional*): of the same waveform, where `levels_db` has computed them already.

    Returns:
        `list[tuple[int, int]]`: the first sample of each segment and the first one after it, in order; none for an
        empty waveform.

    Raises:
        ValueError: if `max_seconds` is below 0.1.
    """
    if max_seconds < 10 * HOP_SECONDS:
        raise ValueError(f"max_seconds is {max_seconds}; a segment must be allowed {10 * HOP_SECONDS} s at least.")
    if len(waveform) == 0:
        return []
    hop = hop_samples(sampling_rate)
    max_hops = int(max_seconds * sampling_rate) // hop
    target_hops = min(int(target_seconds * sampling_rate) // hop, max_hops)
    pause_hops = max(1, round(min_pause_seconds * sampling_rate / hop))
    min_hops = min(round(min_segment_seconds * sampling_rate / hop), max_hops // 4)

    levels = levels_db(waveform, hop) if levels is None else levels
    cuts = [0]
    while len(levels) - cuts[-1] > target_hops:
        rest = levels[cuts[-1] :]
        first, last = max(min_hops, 1), min(max_hops, len(rest) - min_hops)
        cut = choose_pause(rest[:max_hops], len(rest) > max_hops, first, last, target_hops, pause_hops)
        if cut is None and len(rest) <= max_hops:
            break
        cuts.append(cuts[-1] + (quietest_moment(rest, last // 2, last) if cut is None else cut))
    starts = [cut * hop for cut in cuts]
    return list(zip(starts, [*starts[1:], len(waveform)], strict=True))


def hop_samples(sampling_rate: int) -> int:
    return max(1, round(HOP_SECONDS * sampling_rate))


def levels_db(waveform: np.ndarray, hop: int) -> np.ndarray:
    """The smoothed level of each `hop` samples (the last may be fewer), float32, in dB re full scale, without DC."""
    powers = []
    for start in range(0, len(waveform), BLOCK_HOPS * hop):
        block = waveform[start : start + BLOCK_HOPS * hop]
        whole = len(block) // hop * hop
        powers.append(block[:whole].reshape(-1, hop).var(axis=1))
        if whole < len(block):
            powers.append(block[whole:].var(keepdims=True))
    padded = np.pad(np.concatenate(powers), SMOOTHING_HOPS // 2, mode="edge")
    power = np.convolve(padded, np.full(SMOOTHING_HOPS, 1 / SMOOTHING_HOPS), "valid")
    return (10 * np.log10(np.maximum(power, 10 ** (LOWEST_DB / 10)))).astype(np.float32)


def choose_pause(levels, continues: bool, first: int, last: int, target_hops: int, pause_hops: int) -> int | None:
    """
    The hop from `first` to `last` at which to end a segment that starts at `levels[0]`, or None if there is no pause.
    `continues`: whether the audio continues after `levels`. Silence up to its very end, as at its very start, is no
    pause between words, and cut off it would only be a segment without any.
    """
    quiet = np.concatenate([[False], levels < pause_threshold_db(levels), [False]])
    edges = np.flatnonzero(quiet[1:] != quiet[:-1])
    begins, ends = edges[::2], edges[1::2]
    centers, lengths = (begins + ends) // 2, ends - begins
    usable = (lengths >= pause_hops) & (begins > 0) & (continues | (ends < len(levels)))
    usable &= (first <= centers) & (centers <= last)
    centers, lengths = centers[usable], lengths[usable]

    comfortable = (target_hops // 3 <= centers) & (centers <= target_hops)
    if comfortable.any():
        return int(centers[comfortable][lengths[comfortable].argmax()])
    if (centers > target_hops).any():
        return int(centers[centers > target_hops][0])
    return int(centers[-1]) if len(centers) else None


def pause_threshold_db(levels: np.ndarray) -> float:
    """Below this level nobody speaks: 25 dB under the loudest speech, but above the background noise."""
    noise, speech = np.percentile(levels, [5, 98])
    return max(speech - 25, noise + 0.3 * (speech - noise))


def quietest_moment(levels: np.ndarray, first: int, last: int) -> int:
    """The middle of the quietest `FORCED_CUT_HOPS` between two hops."""
    width = min(FORCED_CUT_HOPS, last - first)
    averages = np.convolve(levels[first:last], np.full(width, 1 / width), "valid")
    return first + int(averages.argmin()) + width // 2


def is_silent(waveform: np.ndarray, threshold_dbfs: float = SILENCE_DBFS) -> bool:
    """Whether no sample lies further than `threshold_dbfs` from the middle: nothing in it is worth a transcript."""
    return len(waveform) == 0 or float(np.ptp(waveform)) / 2 < 10 ** (threshold_dbfs / 20)
