"""Segments of made-up speech whose pauses are known, and of audio that has none."""

import tracemalloc

import numpy as np
import pytest

from salmonn_hf.model.segmentation import is_silent, speech_segments, split_at_pauses

RATE = 16_000


def talk(seconds, rng, level=0.2):
    """Syllables of noise, 0.2 s each, with gaps of 60 ms: no pause in it."""
    samples = rng.standard_normal(int(seconds * RATE)).astype(np.float32) * level
    samples[np.arange(len(samples)) % (RATE // 5) < RATE * 0.06] *= 0.01
    return samples


def talk_with_pauses(rng, phrases, background=0.001, level=0.2, shortest_pause=0.4):
    """Phrases of 1 to 4 s and the pauses between them, as (first, last + 1) samples."""
    parts, pauses, position = [], [], 0
    for _ in range(phrases):
        phrase = talk(rng.uniform(1, 4), rng, level)
        pause = np.zeros(int(rng.uniform(shortest_pause, 1.2) * RATE), np.float32)
        pauses.append((position + len(phrase), position + len(phrase) + len(pause)))
        position = pauses[-1][1]
        parts += [phrase, pause]
    waveform = np.concatenate(parts[:-1])  # ends with speech
    return waveform + background * rng.standard_normal(len(waveform)).astype(np.float32), pauses[:-1]


def assert_tiles(segments, length, max_samples):
    assert segments[0][0] == 0 and segments[-1][1] == length
    assert all(end == start for (_, end), (start, _) in zip(segments, segments[1:], strict=False))
    assert all(0 < end - start <= max_samples for start, end in segments)


def random_audio(rng):
    length = int(rng.integers(1, 100 * RATE))
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros(length, np.float32)
    if kind == 1:
        return np.sin(np.arange(length, dtype=np.float32) * 0.1)
    if kind == 2:
        return talk(length / RATE, rng)
    if kind == 3:
        return talk_with_pauses(rng, phrases=1 + length // (4 * RATE))[0]
    gate = np.repeat(rng.integers(0, 2, length // 1000 + 1), 1000)[:length]
    return (rng.standard_normal(length) * gate * 10 ** rng.uniform(-4, 0)).astype(np.float32)


@pytest.mark.parametrize("seed", range(40))
def test_segments_are_the_whole_waveform_and_none_is_too_long(seed):
    rng = np.random.default_rng(seed)
    waveform = random_audio(rng)
    max_seconds, target_seconds = rng.uniform(0.1, 40), rng.uniform(0.05, 40)
    segments = split_at_pauses(waveform, RATE, max_seconds, target_seconds)
    assert_tiles(segments, len(waveform), max_seconds * RATE)
    if max_seconds >= 2 and len(segments) > 1:
        assert min(end - start for start, end in segments) >= 0.49 * RATE


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100])
def test_other_rates(rate):
    waveform = np.random.default_rng(0).standard_normal(70 * rate).astype(np.float32)
    assert_tiles(split_at_pauses(waveform, rate), len(waveform), 30 * rate)


@pytest.mark.parametrize("background", [0.0, 0.001, 0.02], ids=["digital silence", "quiet room", "noisy room"])
@pytest.mark.parametrize("offset", [0.0, 0.3], ids=["centred", "with DC"])
def test_every_cut_is_in_the_middle_of_a_pause(background, offset):
    waveform, pauses = talk_with_pauses(np.random.default_rng(1), 60, background)
    segments = split_at_pauses(waveform + np.float32(offset), RATE, target_seconds=12)
    assert_tiles(segments, len(waveform), 12 * RATE)  # pauses are never 4 s apart, so the target is always met
    assert len(segments) < 2 * len(waveform) / (12 * RATE) + 2
    for start, _ in segments[1:]:
        distance = min(abs(start - (first + last) / 2) for first, last in pauses)
        assert distance < 0.05 * RATE


def test_a_quiet_speaker_after_a_loud_one_is_not_taken_for_a_pause():
    rng = np.random.default_rng(2)
    loud, loud_pauses = talk_with_pauses(rng, 30, background=0.0003, level=0.3)
    quiet, quiet_pauses = talk_with_pauses(rng, 30, background=0.0003, level=0.008)
    pauses = loud_pauses + [(len(loud) + first, len(loud) + last) for first, last in quiet_pauses]
    pauses.append((len(loud) - RATE // 10, len(loud) + RATE // 10))
    segments = split_at_pauses(np.concatenate([loud, quiet]), RATE)
    inside = [any(first <= start <= last for first, last in pauses) for start, _ in segments[1:]]
    assert sum(inside) >= len(inside) - 1  # where one takes over from the other, either may be misjudged


def test_the_longest_pause_is_preferred():
    rng = np.random.default_rng(3)
    silence = np.zeros(RATE, np.float32)
    for lengths, middle in (((0.5, 1.0), 10.0), ((1.0, 0.5), 5.5)):
        first, second = (silence[: int(length * RATE)] for length in lengths)
        waveform = np.concatenate([talk(5, rng), first, talk(4, rng), second, talk(6, rng)])
        assert split_at_pauses(waveform, RATE, target_seconds=12)[0][1] == pytest.approx(middle * RATE, abs=RATE // 20)


def test_digital_silence_somewhere_does_not_hide_the_pauses_in_room_noise():
    waveform, pauses = talk_with_pauses(np.random.default_rng(8), 8, background=0.001)
    segments = split_at_pauses(np.concatenate([np.zeros(3 * RATE, np.float32), waveform]), RATE)
    assert len(segments) > 1
    for start, _ in segments[1:]:
        assert any(first < start - 3 * RATE < last for first, last in pauses)


def test_without_a_pause_the_quietest_moment_is_cut():
    waveform = talk(40, np.random.default_rng(4))
    dip = slice(int(21.0 * RATE), int(21.25 * RATE))  # too short for a pause, but quieter than the gaps
    waveform[dip] *= 0.001
    (_, cut), _ = split_at_pauses(waveform, RATE)
    assert dip.start < cut < dip.stop


def test_a_pause_beyond_the_target_is_better_than_none():
    rng = np.random.default_rng(5)
    waveform = np.concatenate([talk(20, rng), np.zeros(RATE // 2, np.float32), talk(15, rng)])
    assert split_at_pauses(waveform, RATE)[0][1] == pytest.approx(20.25 * RATE, abs=RATE // 20)


def test_what_stays_whole():
    rng = np.random.default_rng(6)
    short, _ = talk_with_pauses(rng, 3)
    assert split_at_pauses(short[: 12 * RATE], RATE, target_seconds=12) == [(0, min(len(short), 12 * RATE))]
    no_pause = talk(29, rng)
    assert split_at_pauses(no_pause, RATE) == [(0, len(no_pause))]
    # Silence around speech is no pause between words, and a word at the end is not left alone with less than 0.5 s.
    silence = np.zeros(3 * RATE, np.float32)
    for waveform in (
        np.concatenate([silence, talk(12, rng), silence]),
        np.concatenate([talk(12, rng), silence[: RATE // 2], talk(0.2, rng)]),
    ):
        assert split_at_pauses(waveform, RATE, target_seconds=12) == [(0, len(waveform))]


def test_edges():
    assert split_at_pauses(np.zeros(0, np.float32)) == []
    assert split_at_pauses(np.zeros(1, np.float32)) == [(0, 1)]
    with pytest.raises(ValueError, match="max_seconds is 0.05"):
        split_at_pauses(np.zeros(RATE, np.float32), max_seconds=0.05)


def test_long_audio_needs_little_memory():
    waveform = np.tile(talk_with_pauses(np.random.default_rng(7), 20)[0], 25)[: 1200 * RATE]
    assert len(waveform) == 1200 * RATE
    tracemalloc.start()
    segments = split_at_pauses(waveform, RATE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_tiles(segments, len(waveform), 12 * RATE)
    assert peak < waveform.nbytes / 2


def room_tone(seconds, rng, dbfs=-60):
    """Noise with more of low frequencies."""
    tone = np.convolve(rng.standard_normal(int(seconds * RATE)), np.ones(8), "same")
    return (tone / tone.std() * 10 ** (dbfs / 20)).astype(np.float32)


@pytest.mark.parametrize("dbfs", [-200, -60, -45], ids=["digital silence", "quiet room", "noisy room"])
@pytest.mark.parametrize("seed", range(6))
def test_long_silence_is_cut_off_and_speech_keeps_its_times(seed, dbfs):
    rng = np.random.default_rng(seed)
    talks = [talk(rng.uniform(0.5, 5), rng, level=0.1) for _ in range(3)]
    parts, times = [], []
    for speech in talks:
        parts.append(np.zeros(int(rng.uniform(3, 60) * RATE), np.float32))
        begin = sum(map(len, parts))
        times.append((begin, begin + len(speech)))
        parts.append(speech)
    waveform = np.concatenate([*parts, np.zeros(int(rng.uniform(3, 60) * RATE), np.float32)])
    waveform = waveform + room_tone(len(waveform) / RATE + 1, rng, dbfs)[: len(waveform)]
    segments = speech_segments(waveform, RATE)
    for first, last in times:
        (segment,) = [segment for segment in segments if segment.start <= first < segment.end]
        assert segment.start <= first and last - 0.06 * RATE <= segment.end  # a talk may end with one of its gaps
        assert segment.end - segment.start < last - first + 1.2 * RATE
        assert abs(segment.speech_start - first) < 0.1 * RATE and abs(segment.speech_end - last) < 0.1 * RATE


def test_soft_words_at_the_edge_are_no_silence():
    """30 dB below the loudest, and 12 dB above the room's noise."""
    rng = np.random.default_rng(9)
    loud, soft, pause = talk(2, rng, 0.3), talk(2, rng, 0.3) * 10 ** (-30 / 20), np.zeros(int(0.2 * RATE), np.float32)
    waveform = np.concatenate([soft, pause, loud, pause, soft])
    waveform = waveform + room_tone(len(waveform) / RATE, rng, -54)[: len(waveform)]
    (segment,) = speech_segments(waveform, RATE, target_seconds=12)
    assert (segment.start, segment.end) == (0, len(waveform))
    assert segment.speech_start < 0.1 * RATE and segment.speech_end > len(waveform) - 0.1 * RATE


def test_short_pauses_at_the_edges_stay():
    rng, pause = np.random.default_rng(10), np.zeros(int(0.9 * RATE), np.float32)
    waveform = np.concatenate([pause, talk(2, rng), pause])
    (segment,) = speech_segments(waveform, RATE)
    assert (segment.start, segment.end) == (0, len(waveform))


@pytest.mark.parametrize("seed", range(20))
def test_speech_segments_lie_in_those_of_the_whole(seed):
    waveform = random_audio(np.random.default_rng(seed))
    parts = [part for part in split_at_pauses(waveform, RATE) if not is_silent(waveform[slice(*part)])]
    segments = speech_segments(waveform, RATE)
    assert len(segments) == len(parts)
    for (start, end), segment in zip(parts, segments, strict=True):
        assert start <= segment.start <= segment.speech_start < segment.speech_end <= segment.end <= end
    assert speech_segments(np.zeros(0, np.float32)) == speech_segments(np.zeros(RATE, np.float32)) == []


@pytest.mark.parametrize(
    ("waveform", "silent"),
    [
        (np.zeros(100), True),
        (np.full(100, 0.3), True),  # DC alone
        (np.array([0, 0.0009, -0.0009]), True),
        (np.array([0, 0.0011, -0.0011]), False),
        (np.zeros(0), True),
        (np.sin(np.arange(100)), False),
    ],
)
def test_is_silent(waveform, silent):
    assert is_silent(waveform) is silent
