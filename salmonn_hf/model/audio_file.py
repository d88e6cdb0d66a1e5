"""
The samples of audio files, by libsndfile: all of them, or an error.

libsndfile stops at the end of the first of joined streams, or where a wrong header says so. Therefore the containers
are looked through first (`ogg_pages.py`, `mpeg_frames.py`, `audio_containers.py`), and it is given each stream alone.
"""

import re
from collections.abc import Iterator
from io import SEEK_END, BytesIO
from typing import BinaryIO

import numpy as np
import soundfile

from .audio_containers import FAMILIES, chunk_parts, is_padding_or_tag, plain_parts
from .downmix import BLOCK_SAMPLES
from .flac_end import flac_end
from .mpeg_frames import ENCODER_DELAY, JUNK_BYTES, frame_kind, mpeg_parts, tag_bytes
from .ogg_pages import ogg_streams
from .stream_part import AudioFileError, StreamPart, read_at

RATES = (1000, 1_000_000)  # others are no audio; resampled, a few bytes of them could fill the memory
FLAC_START = re.compile(rb"fLaC[\0\x80]\0\0\x22")  # and the head of the block that tells the length
FLAC_RATES = {4: 8000, 5: 16_000, 6: 22_050, 7: 24_000, 8: 32_000, 9: 44_100, 10: 48_000, 11: 96_000}


class UnknownFormat(AudioFileError):
    """No file that libsndfile reads."""


class _ForwardReader(soundfile.SoundFile):
    """Reads front to end. soundfile's own class seeks after each block, which a streamed FLAC does not survive."""

    def seekable(self):
        return False


def audio_streams(stream: BinaryIO) -> list[StreamPart]:
    """
    The joined streams of a file, in order; of most files one, the whole of it but tags before it and behind it.

    Raises:
        AudioFileError: if it is damaged or cut short, as far as that is seen without decoding it.
    """
    end = stream.seek(0, SEEK_END)
    start = _tags_before(stream, end)
    head = read_at(stream, start, 4)
    if head == b"OggS":
        return ogg_streams(stream, start, end)
    if head == b"fLaC":
        return _flac_streams(stream, start, end)
    if head in FAMILIES:
        return chunk_parts(stream, start, end) or [StreamPart(stream, start, end)]
    if frame_kind(read_at(stream, start, JUNK_BYTES).lstrip(b"\0"), 0):
        return list(mpeg_parts(read_at(stream, start, end - start)))
    return plain_parts(stream, start, end)


def _flac_streams(stream: BinaryIO, start: int, end: int) -> list[StreamPart]:
    end -= _tags_behind(stream, end)
    data = read_at(stream, start, end - start)
    starts = [start + found.start() for found in FLAC_START.finditer(data)]
    if starts[:1] != [start]:
        return [StreamPart(stream, start, end)]
    parts = []
    for first, last in zip(starts, [*starts[1:], end], strict=True):
        # 36 bits from the middle of byte 21: with 0, libsndfile reads on until no frame follows.
        content = data[first - start : last - start]
        _check_flac_rate(content)
        unknown = {first + 21: bytes([content[21] & 0xF0, 0, 0, 0, 0])} if len(content) > 21 else {}
        parts.append(StreamPart(stream, first, last, unknown, total=_flac_header(content)[1]))
    return parts


def _check_flac_rate(data: bytes):
    """Each frame may tell the rate too; libsndfile looks at the header of the file alone."""
    at, last = 4, False
    while not last and at + 4 <= len(data):
        last, at = data[at] >= 0x80, at + 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    head = data[at : at + 4]
    rate = FLAC_RATES.get(head[2] & 15) if len(head) == 4 and head[0] == 0xFF and head[1] >> 2 == 0x3E else None
    if rate not in (None, _flac_header(data)[0]):
        raise AudioFileError(f"is damaged: its header tells of {_flac_header(data)[0]} Hz, its frames of {rate} Hz")


def _tags_behind(stream: BinaryIO, end: int) -> int:
    """The length of the ID3 and APE tags at the end of a file."""
    length = 128 if end >= 128 and read_at(stream, end - 128, 3) == b"TAG" else 0
    footer = read_at(stream, end - length - 32, 32) if end - length >= 32 else b""
    if footer.startswith(b"APETAGEX"):
        length += int.from_bytes(footer[12:16], "little") + (32 if footer[23] & 0x80 else 0)
    return min(length, end)


def _open(part: StreamPart) -> _ForwardReader:
    part.seek(0)
    try:
        file = _ForwardReader(part)
        if part.frames is not None and part.counted and file.frames < part.frames:
            file.close()
            file = _ForwardReader(BytesIO(part.counted))
    except (soundfile.LibsndfileError, TypeError) as error:
        raise UnknownFormat(f"is no audio file ({error})") from error
    if not RATES[0] <= file.samplerate <= RATES[1]:
        file.close()
        raise AudioFileError(f"has a sampling rate of {file.samplerate} Hz", "correct what made it")
    return file


def sample_blocks(part: StreamPart) -> Iterator[tuple[int, np.ndarray]]:
    """
    The samples of one of `audio_streams`, some at a time: sampling rate and float32 of shape `(samples, channels)`.

    Raises:
        UnknownFormat: if libsndfile does not know it.
        AudioFileError: if it is damaged or cut short.
    """
    with _open(part) as file:
        frames, promised = 0, file.frames if part.total is None else part.total
        at_once = max(1, BLOCK_SAMPLES // file.channels)
        try:
            while True:
                # Not beyond the end: what is behind it may be no FLAC.
                rest = promised - frames if part.total and frames < promised else at_once
                block = file.read(min(at_once, rest), dtype="float32", always_2d=True)
                if not len(block):
                    break
                frames += len(block)
                yield file.samplerate, block
        except soundfile.LibsndfileError as error:
            if not part.total or frames != promised:
                raise AudioFileError(f"is damaged or cut short ({error})") from error
            _check_behind_flac(part)
    if file.subtype.startswith("MPEG"):
        promised = (promised if part.frames is None else part.frames) - ENCODER_DELAY
    if frames < promised:
        raise AudioFileError(f"is damaged or cut short: {frames} of its {promised} samples are readable")


def _check_behind_flac(part: StreamPart):
    data = read_at(part.stream, part.start, part.end - part.start)
    end = flac_end(data, part.total)
    if end is not None and not is_padding_or_tag(part, end, len(data)):
        fault = f"is a FLAC of {part.total} samples, and {len(data) - end} bytes follow its end"
        raise AudioFileError(fault, "cut them off, or give what they are as a file of its own")


def file_seconds(stream: BinaryIO) -> float:
    """
    The length of a file, without decoding it. That of a FLAC is what its header tells, of which more may follow; it
    is decoded only if the header tells none.

    Raises:
        AudioFileError: as `audio_streams` and `sample_blocks`.
    """
    start = _tags_before(stream, stream.seek(0, SEEK_END))
    if FLAC_START.match(read_at(stream, start, 8)):
        rate, total = _flac_header(read_at(stream, start, 26))
        if rate and total:
            return total / rate
    seconds = 0.0
    for part in audio_streams(stream):
        with _open(part) as file:
            rate, frames = file.samplerate, file.frames
        if part.total == 0:
            frames = sum(len(block) for _, block in sample_blocks(part))
        seconds += (part.total or frames) / rate
    return seconds


def _tags_before(stream: BinaryIO, end: int) -> int:
    """The length of the ID3 tags at the start of a file."""
    start = 0
    while read_at(stream, start, 3) == b"ID3" and start < end:
        start += tag_bytes(read_at(stream, start, 10), 0) or end
    return min(start, end)


def _flac_header(data: bytes) -> tuple[int, int]:
    """Sampling rate and number of samples (0: unknown), by the first 26 bytes."""
    return int.from_bytes(data[18:21], "big") >> 4, int.from_bytes(data[21:26], "big") & (1 << 36) - 1
