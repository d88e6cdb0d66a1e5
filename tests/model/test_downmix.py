"""Several channels as one: their mean, unless they would cancel each other in it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_audio import RATE, encoded, tone

from salmonn_hf.model.audio import load_audio
from salmonn_hf.model.downmix import BLOCK_SAMPLES, mix_down

RECORDINGS = Path(__file__).parents[2] / "eval" / "recordings"
SPEECH = soundfile.read(RECORDINGS / "librivox-austen-880.flac", dtype="float32")[0]
OTHER = np.resize(soundfile.read(RECORDINGS / "cards-005.flac", dtype="float32")[0], len(SPEECH))


def noise(decibels: float) -> np.ndarray:
    """Relative to the speech."""
    level = SPEECH.std() * 10 ** (decibels / 20)
    return (np.random.default_rng(0).standard_normal(len(SPEECH)) * level).astype(np.float32)


def delayed(samples: int) -> np.ndarray:
    return np.concatenate([np.zeros(samples, np.float32), SPEECH[: len(SPEECH) - samples]])


def inverted(low: float, high: float) -> np.ndarray:
    """The speech with the frequencies between two inverted."""
    spectrum, frequencies = np.fft.rfft(SPEECH), np.fft.rfftfreq(len(SPEECH), 1 / RATE)
    spectrum[(frequencies >= low) & (frequencies < high)] *= -1
    return np.fft.irfft(spectrum, len(SPEECH)).astype(np.float32)


def partly_inverted(first: float, last: float) -> np.ndarray:
    """The speech with a part of the time inverted."""
    channel = SPEECH.copy()
    channel[int(first * len(SPEECH)) : int(last * len(SPEECH))] *= -1
    return channel


CANCELLING = {
    "inverted": -SPEECH,
    "inverted and softer": -0.5 * SPEECH,
    "inverted and louder": -2 * SPEECH,
    "inverted, with noise": -SPEECH + noise(-10),
    "inverted, with loud noise": -SPEECH + noise(0),
    "second half inverted": partly_inverted(0.5, 1),
    "a moment inverted": partly_inverted(0.3, 0.5),
    "low frequencies inverted": inverted(0, 1000),
    "high frequencies inverted": inverted(1000, 9000),
    "middle frequencies inverted": inverted(500, 2000),
    **{f"delayed by {samples / 16} ms": delayed(samples) for samples in (3, 8, 16, 80, 800, 8000)},
    "delayed and softer": 0.5 * delayed(16),
    "delayed and inverted": -delayed(16),
    "delayed, with noise": delayed(160) + noise(-20),
}


@pytest.mark.parametrize("name", CANCELLING)
def test_of_channels_that_cancel_each_other_one_is_taken(name):
    second = CANCELLING[name].astype(np.float32)
    mixed = mix_down(np.stack([SPEECH, second], axis=1))
    kept = SPEECH if "noise" in name else (SPEECH, second)
    assert any(np.array_equal(mixed, channel) for channel in (kept if isinstance(kept, tuple) else (kept,)))
    turned = mix_down(np.stack([second, SPEECH], axis=1))
    assert np.array_equal(turned, SPEECH if "noise" in name else second)


MEAN = {
    "the same": SPEECH,
    "softer": 0.3 * SPEECH,
    "silent": 0 * SPEECH,
    "nearly silent": 1e-3 * noise(0),
    "noise": noise(0),
    "the same with noise": SPEECH + noise(-5),
    "another voice": OTHER,
    "both voices": SPEECH + 0.5 * OTHER,
    "a little inverted": -0.1 * SPEECH,
    "a constant": np.full_like(SPEECH, 0.2),
}


@pytest.mark.parametrize("name", MEAN)
def test_of_other_channels_the_mean_is_taken(name):
    stereo = np.stack([SPEECH, MEAN[name].astype(np.float32)], axis=1)
    for samples in (stereo, stereo[:, ::-1]):
        np.testing.assert_array_equal(mix_down(samples), samples.mean(axis=1))


def test_every_kind_of_source_is_mixed_alike():
    stereo = np.stack([SPEECH, -SPEECH])

    class AudioDecoder:
        def get_all_samples(self):
            return type("Samples", (), {"data": torch.tensor(stereo), "sample_rate": RATE})

    sources = [stereo, stereo.T, torch.tensor(stereo), stereo.tolist(), {"array": stereo, "sampling_rate": RATE}]
    sources += [AudioDecoder(), encoded(stereo.T, subtype="FLOAT"), {"bytes": encoded(stereo.T, subtype="FLOAT")}]
    for source in sources:
        np.testing.assert_array_equal(load_audio(source), SPEECH)
    halves = np.round(stereo * 32767).astype(np.int16)
    np.testing.assert_array_equal(load_audio(halves), halves[0] / np.float32(32768))


def test_a_surround_recording_loses_none_of_its_channels_but_those_that_cancel():
    rng = np.random.default_rng(1)
    surround = np.stack([SPEECH, *(0.05 * rng.standard_normal((5, len(SPEECH))))], axis=1).astype(np.float32)
    np.testing.assert_array_equal(mix_down(surround), surround.mean(axis=1))
    surround[:, 1] = -SPEECH
    kept = np.ascontiguousarray(surround[:, [0, 2, 3, 4, 5]].T).mean(axis=0)
    np.testing.assert_allclose(mix_down(surround), kept, atol=1e-7)


def test_a_long_file_is_mixed_block_by_block():
    stereo = np.stack([tone(seconds=40), tone(550, seconds=40)], axis=1)
    stereo[BLOCK_SAMPLES // 2 :, 1] = -stereo[BLOCK_SAMPLES // 2 :, 0]
    mixed, at = load_audio(encoded(stereo, subtype="FLOAT")), BLOCK_SAMPLES // 2
    np.testing.assert_array_equal(mixed[:at], stereo[:at].mean(axis=1))
    np.testing.assert_array_equal(mixed[at:], stereo[at:, 0])
    np.testing.assert_array_equal(load_audio(stereo), mixed)


@pytest.mark.parametrize("name", ["inverted noise", "delayed noise", "inverted hum", "crosstalk", "inverted talk"])
def test_two_speakers_on_two_channels_both_stay(name):
    """One after the other, with something in both channels that cancels or comes later."""
    silence = np.zeros(RATE // 2, np.float32)
    second = OTHER * SPEECH.std() / OTHER.std()
    first = np.concatenate([SPEECH, silence, 0 * second])
    second = np.concatenate([0 * SPEECH, silence, second])
    level = SPEECH.std() * 0.3
    hiss = (np.random.default_rng(0).standard_normal(len(first)) * level).astype(np.float32)
    hum = (np.sin(2 * np.pi * 50 / RATE * np.arange(len(first))) * 4 * level).astype(np.float32)
    channels = {
        "inverted noise": (first + hiss, second - hiss),
        "delayed noise": (first + hiss, second + np.roll(hiss, 20)),
        "inverted hum": (first + hum, second - hum),
        "crosstalk": (first + 0.1 * np.roll(second, 40), second + 0.1 * np.roll(first, 40)),
        "inverted talk": (first - 0.1 * second, second - 0.1 * first),
    }[name]
    samples = np.stack(channels, axis=1)
    assert np.array_equal(mix_down(samples), samples.mean(axis=1))
