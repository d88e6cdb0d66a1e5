"""Joined clips: their words, pauses and lengths."""

import io

import numpy as np
import soundfile
from conftest import noise

from salmonn_hf.data.joined_clips import join_clips, speech_dataset

WORDS = ["red", "blue", "green", "one", "two"]


def test_joined_clips_hold_all_their_words():
    data = speech_dataset([(noise(0.4 + 0.3 * (i % 4), i), f"{i}.flac", WORDS[i % 5]) for i in range(8)])
    joined = join_clips(data, count=3, seconds=(3.0, 6.0))
    assert joined["text"] == join_clips(data, count=3, seconds=(3.0, 6.0))["text"]
    for row in joined:
        waveform, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        words = row["text"].split()
        assert rate == 16000 and 0.4 * len(words) <= len(waveform) / rate <= 6.1 and set(words) <= set(WORDS)
        silent = np.abs(waveform) < 1e-4
        runs = np.diff(np.flatnonzero(np.diff(np.r_[0, silent, 0])))[::2]
        assert (runs > 1000).sum() == len(words) - 1  # a pause between two clips, none at the ends
