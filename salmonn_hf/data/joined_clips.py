"""Longer clips, made by joining short ones: real recordings are longer than the lines of a dialogue."""

import numpy as np

from ..model.audio import SAMPLING_RATE, load_audio
from .flac import flac_bytes


def speech_dataset(rows: list[tuple[np.ndarray, str, str]]):
    """Rows of waveform at 16 kHz, file name and text as a `datasets.Dataset` of undecoded `audio` and `text`."""
    from datasets import Dataset, Features, Value

    # An undecoded Audio column is this struct; `datasets` itself encodes one only with torchcodec.
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string")})
    examples = [
        {"audio": {"bytes": flac_bytes(waveform), "path": name}, "text": text} for waveform, name, text in rows
    ]
    return Dataset.from_list(examples, features=features)


def join_clips(dataset, count: int, seconds: tuple[float, float], seed: int = 0):
    """
    `count` longer clips, made of random clips of `dataset` with 0.1 to 0.6 s of silence between them, until a length
    drawn from `seconds` is reached.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        target, parts, texts = rng.uniform(*seconds) * SAMPLING_RATE, [], []
        while True:
            row = dataset[int(rng.integers(len(dataset)))]
            waveform = load_audio(row["audio"])
            silence = np.zeros(int(rng.uniform(0.1, 0.6) * SAMPLING_RATE), np.float32)
            if parts and sum(map(len, [*parts, silence, waveform])) > target:
                break
            parts += [silence, waveform]
            texts.append(row["text"].strip())
        rows.append((np.concatenate(parts[1:]), f"joined-{seed}-{index}.flac", " ".join(texts)))
    return speech_dataset(rows)
