"""Long audio cut at pauses into segments, each of which goes through the model on its own."""

import numpy as np

TARGET_SECONDS = 6.0  # a small language model transcribes short segments best: docs/nano.md
HOP_SECONDS = 0.01
SMOOTHING_HOPS = 5  # bridges the gaps between the pulses of a low voice
FORCED_CUT_HOPS = 20  # where there is no pause, the cut goes to the quietest 0.2 s
SILENCE_DBFS = -60.0
LOWEST_DB = -100.0  # digital silence
BLOCK_HOPS = 1 << 14  # looked at together, so that hours of audio need little memory


def split_at_pauses(
    waveform: np.ndarray,
    sampling_rate: int = 16_000,
    max_seconds: float = 30.0,
    target_seconds: float = TARGET_SECONDS,
    min_pause_seconds: float = 0.3,
    min_segment_seconds: float = 0.5,
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
    hop = max(1, round(HOP_SECONDS * sampling_rate))
    max_hops = int(max_seconds * sampling_rate) // hop
    target_hops = min(int(target_seconds * sampling_rate) // hop, max_hops)
    pause_hops = max(1, round(min_pause_seconds * sampling_rate / hop))
    min_hops = min(round(min_segment_seconds * sampling_rate / hop), max_hops // 4)

    levels = levels_db(waveform, hop)
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
