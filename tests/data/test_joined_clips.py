"""Joined clips: their words, pauses and lengths."""

import io

import numpy as np
import soundfile
from conftest import noise

from salmonn_hf.data.joined_clips import join_clips, speech_dataset

WORDS = ["red", "blue", "green", "one", "two", "three", "four", "five"]


def test_joined_clips_hold_all_their_words():
    """Clip by clip, in order: the waveform between two pauses is that of the clip whose word stands there."""
    clips = {word: noise(0.4 + 0.3 * (i % 4), i) for i, word in enumerate(WORDS)}
    data = speech_dataset([(clip, f"{word}.flac", word) for word, clip in clips.items()])
    joined = join_clips(data, count=3, seconds=(3.0, 6.0))
    assert joined["text"] == join_clips(data, count=3, seconds=(3.0, 6.0))["text"]
    for row in joined:
        waveform, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        words = row["text"].split()
        # Short of the shortest length by less than the longest clip and pause.
        assert rate == 16000 and len(words) > 1 and 3.0 - 1.3 - 0.6 < len(waveform) / rate <= 6.0
        for index, word in enumerate(words):
            np.testing.assert_allclose(waveform[: len(clips[word])], clips[word], atol=2**-15)
            waveform = waveform[len(clips[word]) :]
            if index < len(words) - 1:  # a pause between two clips, none at the ends
                pause = np.argmax(waveform != 0)
                assert 1600 <= pause <= 9600
                waveform = waveform[pause:]
        assert len(waveform) == 0
