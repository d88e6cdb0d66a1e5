"""
The audio of a row of data: how long it is, and its samples.

A row has `audio`, `{"bytes", "path"}`, of which the bytes come first. A clip that is a part of a file has `start` and
`end`, in seconds; one that further files follow has their paths as `expand_wav`.
"""

import io
import os
from functools import lru_cache

import numpy as np
import soundfile

from ..model.audio import SAMPLING_RATE, load_audio
from ..model.audio_file import AudioFileError, file_seconds
from ..model.downmix import mix_down
from .augmentation import change_speed
from .skipped_clips import UnusableClip

EXPAND_SILENCE = SAMPLING_RATE // 10  # samples between the files of `expand_wav`
END_TOLERANCE_SECONDS = 0.1  # annotated ends are rounded


@lru_cache(maxsize=256)  # parts of one file, and captions of one clip, follow each other
def _path_seconds(path: str, modified: int) -> float:
    with open(path, "rb") as stream:
        return file_seconds(stream)


@lru_cache(maxsize=256)
def _header(path: str, modified: int):
    return soundfile.info(path)


def audio_seconds(audio: dict) -> float:
    """
    The length of `{"bytes", "path"}`, without decoding it; only a FLAC whose header tells no length is decoded.

    Raises:
        UnusableClip: if it is missing, soundfile cannot read it, or it is seen to be cut short.
    """
    data, path = audio.get("bytes"), audio.get("path")
    try:
        if not (os.path.getsize(path) if data is None else data):
            return 0.0
        return _path_seconds(path, os.stat(path).st_mtime_ns) if data is None else file_seconds(io.BytesIO(data))
    except FileNotFoundError as error:
        raise UnusableClip("missing") from error
    except AudioFileError as error:
        raise UnusableClip("unreadable", str(error)) from error


def clip_seconds(row: dict) -> float:
    """
    The length of a row's clip, from the headers of its files.

    Raises:
        UnusableClip: if a file is missing or unreadable, or ends before the clip does.
    """
    seconds = audio_seconds(row["audio"])
    if "start" in row:
        if row["end"] > seconds + END_TOLERANCE_SECONDS:
            raise UnusableClip("ends after its file", f"{row['end']:.2f} s of {seconds:.2f} s")
        seconds = min(row["end"], seconds) - row["start"]
    for path in row.get("expand_wav") or ():
        seconds += EXPAND_SILENCE / SAMPLING_RATE + audio_seconds({"bytes": None, "path": path})
    return seconds


def clip_seconds_or_nan(row: dict) -> float:
    """`clip_seconds`, or NaN for a clip that is missing or unreadable."""
    try:
        return clip_seconds(row)
    except (UnusableClip, OSError):
        return float("nan")


def checked_seconds(row: dict, min_seconds: float = 0.0, max_seconds: float = float("inf")) -> float:
    """
    The length of the clip of a row that can be trained on.

    Raises:
        UnusableClip: as `clip_seconds`; if the row has no text, or the clip is empty, too short or too long.
    """
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise UnusableClip("no text", "" if row["text"] is None else repr(row["text"]))
    seconds = clip_seconds(row)
    if seconds <= 0:
        raise UnusableClip("zero length")
    if not min_seconds <= seconds <= max_seconds:
        raise UnusableClip("too short" if seconds < min_seconds else "too long", f"{seconds:.2f} s")
    return seconds


def is_flac_clip(row: dict) -> bool:
    """Whether a row's clip is one complete 16 kHz mono FLAC file, as `flac_bytes` would make of it."""
    if "start" in row or "expand_wav" in row:
        return False
    found = _header(row["audio"]["path"], os.stat(row["audio"]["path"]).st_mtime_ns)
    return (found.format, found.samplerate, found.channels) == ("FLAC", SAMPLING_RATE, 1)


def read_clip(row: dict, speed: float = 1.0) -> np.ndarray:
    """
    The clip of a row: its audio, or the part of it from `start` to `end`, or its audio and the files of `expand_wav`
    with 0.1 s of silence before each; played at `speed` times its own.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32, mono, at 16 kHz.

    Raises:
        UnusableClip: for a file that is missing, damaged or cut short.
    """
    try:
        if "start" in row:
            waveform = _read_part(row["audio"]["path"], row["start"], row["end"])
        else:
            parts = [load_audio(row["audio"])]
            for path in row.get("expand_wav") or ():
                parts += [np.zeros(EXPAND_SILENCE, np.float32), load_audio(path)]
            waveform = np.concatenate(parts) if len(parts) > 1 else parts[0]
    except UnusableClip:
        raise
    except (ValueError, OSError, soundfile.LibsndfileError) as error:  # AudioError among them
        raise UnusableClip("damaged", str(error)) from error
    return waveform if speed == 1.0 else change_speed(waveform, speed)


def _read_part(path: str, start: float, end: float) -> np.ndarray:
    modified = os.stat(path).st_mtime_ns
    try:
        found = _header(path, modified)
        rate, seconds = found.samplerate, found.frames / found.samplerate
    except soundfile.LibsndfileError:  # of some joined files
        rate, seconds = SAMPLING_RATE, 0.0
    if abs(seconds - _path_seconds(path, modified)) <= END_TOLERANCE_SECONDS:
        with soundfile.SoundFile(path) as file:
            file.seek(round(start * rate))
            samples = mix_down(file.read(round((end - start) * rate), dtype="float32", always_2d=True))
    else:  # several joined files, or a header that tells less: soundfile would stop before the end
        rate = SAMPLING_RATE
        samples = load_audio(path)[round(start * rate) : round(end * rate)]
    if len(samples) < (end - start - END_TOLERANCE_SECONDS) * rate:
        raise UnusableClip("damaged", f"{len(samples) / rate:.2f} of {end - start:.2f} s are readable")
    return load_audio({"array": samples, "sampling_rate": rate})
