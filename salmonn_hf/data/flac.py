"""Clips as FLAC files."""

import io

import numpy as np
import soundfile

from ..model.audio import SAMPLING_RATE


def flac_bytes(waveform: np.ndarray) -> bytes:
    """A waveform at 16 kHz, float, as a 16-bit FLAC file: lossless for what was 16-bit mono at that rate."""
    file = io.BytesIO()
    # Scaled here: libsndfile reads 16-bit samples with a factor of 1/32768, but writes floats with 32767.
    samples = np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
