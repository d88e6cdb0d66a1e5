"""What synthetic speech shares, whatever speaks it: silence around it, degradation, and its rows."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from salmonn_hf.data import augmentation
from salmonn_hf.data.clip_parquet import write_clips
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.model.audio import SAMPLING_RATE

COLUMNS = ("audio", "text", "clip_id", "source", "speaker", "seconds")
MIN_SECONDS, MAX_SECONDS = 0.5, 12.0
MIN_WORDS_PER_SECOND = 1.0  # below it the voice spelled something out
PEAK = 0.9  # of full scale


def trim(samples: np.ndarray, margin: float = 0.02) -> np.ndarray:
    """Cut the engine's silence off both ends. It is nearly digital: a low threshold keeps soft consonants there."""
    loud = np.flatnonzero(np.abs(samples) > 0.004 * np.abs(samples).max(initial=0))
    if not loud.size:
        return samples[:0]
    extra = int(margin * SAMPLING_RATE)
    return samples[max(loud[0] - extra, 0) : loud[-1] + extra + 1]


def add_reverb(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small room: the direct sound, then quiet noise that falls by 60 dB in the reverberation time."""
    reverberation_time = rng.uniform(0.1, 0.4)
    seconds = np.arange(int(reverberation_time * SAMPLING_RATE)) / SAMPLING_RATE
    response = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / reverberation_time)
    response[: int(0.002 * SAMPLING_RATE)] = 0  # nothing can echo before the nearest wall
    response *= 10 ** (rng.uniform(-18, -6) / 20) / np.linalg.norm(response)  # against the direct sound, in dB
    response[0] = 1
    size = 1 << (len(samples) + len(response) - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)[: len(samples)]


def divide_spectrum(samples: np.ndarray, by) -> np.ndarray:
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLING_RATE)
    return np.fft.irfft(np.fft.rfft(samples) / by(frequencies), len(samples))


def add_noise(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(len(samples))
    if rng.random() < 0.5:  # pink: power falls with frequency
        noise = divide_spectrum(noise, lambda frequencies: np.sqrt(np.maximum(frequencies, 50)))
    return augmentation.add_noise(samples, noise, rng.uniform(15, 35))


def low_pass(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cutoff = rng.uniform(3500, 8000)
    return divide_spectrum(samples, lambda frequencies: np.sqrt(1 + (frequencies / cutoff) ** 16))


def with_silence(samples: np.ndarray, text: str, rng, max_words_per_second: float) -> np.ndarray | None:
    """Speech with a moment of silence on either side; None if it is too slow, too fast, too short or too long."""
    words_per_second = len(text.split()) / max(len(samples) / SAMPLING_RATE, 1e-3)
    if not MIN_WORDS_PER_SECOND <= words_per_second <= max_words_per_second:
        return None
    before, after = (np.zeros(int(rng.uniform(0, 0.3) * SAMPLING_RATE)) for _ in range(2))
    samples = np.concatenate([before, samples, after])
    return samples if MIN_SECONDS <= len(samples) / SAMPLING_RATE <= MAX_SECONDS else None


def degrade(samples: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """The samples with some of room, noise and a narrower band, and a gain in dB to give them."""
    for effect in (add_reverb, add_noise, low_pass):
        if rng.random() < 0.5:
            samples = effect(samples, rng)
    return samples, rng.uniform(-20, 0)


def row(samples: np.ndarray, degraded: bool, rng, text: str, clip_id: str, source: str, speaker: str) -> dict:
    """A clip as it is written: at 16 kHz, and at one peak before it is degraded, since the voices differ in level."""
    samples, gain_db = degrade(samples, rng) if degraded else (samples, 0.0)
    samples = samples * (PEAK / np.abs(samples).max() * 10 ** (gain_db / 20))
    audio, seconds = {"bytes": flac_bytes(samples), "path": f"{clip_id}.flac"}, len(samples) / SAMPLING_RATE
    return dict(zip(COLUMNS, (audio, text, clip_id, source, speaker, seconds), strict=True))


def write_speech(path: Path, rows: Iterable[dict]):
    """Write a file of clips, and print what it holds."""
    started = time.monotonic()
    write_clips(path, rows, COLUMNS)
    elapsed = time.monotonic() - started
    clips = pq.read_table(path, columns=["text", "source", "speaker", "seconds"]).to_pandas()
    clips["words"] = clips["text"].str.split().str.len()
    clips["words per second"] = clips["words"] / clips["seconds"]
    print(f"{len(clips)} clips, {clips['seconds'].sum() / 3600:.2f} hours, made in {elapsed:.0f} s")
    print(clips[["seconds", "words", "words per second"]].describe([0.05, 0.25, 0.5, 0.75, 0.95]).round(2).to_string())
    print(f"{clips['source'].nunique()} voices, {clips['speaker'].nunique()} speakers")
