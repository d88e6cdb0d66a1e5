"""Clips as FLAC files."""

import io

import numpy as np
import soundfile

from ..model.audio import SAMPLING_RATE


def flac_bytes(waveform: np.ndarray) -> bytes:
    """A float waveform at 16 kHz as a 16-bit FLAC file: lossless for what was 16-bit mono at that rate."""
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
