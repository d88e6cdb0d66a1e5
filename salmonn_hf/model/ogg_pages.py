"""
Ogg files page by page (RFC 3533): where each of several joined streams begins, and whether any page is missing.

Decoders stop behind the first of joined ("chained") streams, and take one that was cut off for a short one.
"""

import struct
import zlib
from typing import BinaryIO

from .stream_part import AudioFileError, StreamPart, read_at

PAGE_HEADER = 27
BEGINS, ENDS = 2, 4  # flags of a stream's first and last page
FOREIGN_BYTES = 4096  # a tag or padding behind the last page
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_streams(stream: BinaryIO, start: int, end: int) -> list[StreamPart]:
    """
    The joined streams of a file, each with all that is multiplexed with it.

    Raises:
        AudioFileError: if a page is missing, damaged or cut short.
    """
    starts, open_streams, numbers, position = [], set(), {}, start
    while position < end:
        header = read_at(stream, position, PAGE_HEADER)
        if len(header) < PAGE_HEADER or not header.startswith(b"OggS"):
            rest = read_at(stream, position, end - position)
            if starts and not open_streams and b"OggS" not in rest and (len(rest) <= FOREIGN_BYTES or not any(rest)):
                end = position
                break
            raise AudioFileError(f"is damaged or cut short: there is no Ogg page at byte {position}")
        flags, serial, number, checksum = struct.unpack("<5xB8xIII", header[:26])
        sizes = read_at(stream, position + PAGE_HEADER, header[26])
        body = read_at(stream, position + PAGE_HEADER + header[26], sum(sizes))
        after = position + PAGE_HEADER + header[26] + sum(sizes)
        if after > end or page_checksum(header[:22] + bytes(4) + header[26:] + sizes + body) != checksum:
            raise AudioFileError(f"is damaged or cut short: the Ogg page at byte {position} is not whole")
        if flags & BEGINS:
            if not open_streams:
                starts.append(position)
            open_streams.add(serial)
        elif serial not in open_streams or number != numbers[serial] + 1:
            raise AudioFileError(f"lacks Ogg pages before byte {position}")
        numbers[serial] = number
        if flags & ENDS:
            open_streams.discard(serial)
        position = after
    if open_streams:
        raise AudioFileError("is cut short: its last Ogg page is not marked as such")
    return [StreamPart(stream, *bounds) for bounds in zip(starts, [*starts[1:], end], strict=True)]


def page_checksum(page: bytes) -> int:
    """Ogg's CRC is that of zlib with the bits the other way round, begun with 0 and not inverted."""
    reversed_crc = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reversed_crc.to_bytes(4, "little").translate(REVERSED_BITS), "big")
