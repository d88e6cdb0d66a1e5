"""
Where the last frame of a FLAC ends, which no header tells: where the checksum of a frame, over itself, becomes 0.

Frames and their checksums: https://www.rfc-editor.org/rfc/rfc9639#name-frame-structure
"""

import re
from io import BytesIO

import soundfile

SYNC = re.compile(rb"(?=\xff[\xf8\xf9])")
BLOCK_SIZES = {1: 192} | {2 + n: 576 << n for n in range(4)} | {8 + n: 256 << n for n in range(8)}
CODED_BYTES = {6: 1, 7: 2, 12: 1, 13: 2, 14: 2}  # behind the number: a block size (6, 7), a rate (12 to 14)


def _checksums(polynomial: int, bits: int) -> list[int]:
    table = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
        table.append(value)
    return table


CRC_8, CRC_16 = _checksums(0x107, 8), _checksums(0x18005, 16)


def flac_end(data: bytes, total: int) -> int | None:
    """The length of the FLAC of `total` samples with which `data` begins, or `None` if its last frame is not found."""
    block = int.from_bytes(data[10:12], "big")
    starts = [found.start() for found in SYNC.finditer(data, 42)]
    start = next((start for start in starts if _last_sample(data[start : start + 16], block) == total), None)
    if start is None:
        return None
    checksum = 0
    for end, byte in enumerate(data[start:], start + 1):
        checksum = (checksum << 8 & 0xFFFF) ^ CRC_16[checksum >> 8 ^ byte]
        if checksum == 0 and end > start + 8 and _is_readable(data[:end], total):  # by chance it is 0 before too
            return end
    return None


def _last_sample(head: bytes, block: int) -> int | None:
    """The number of samples to the end of the frame with this header, in a stream of so many in a block."""
    head = head.ljust(16, b"\0")
    size_code, rate_code = head[2] >> 4, head[2] & 15
    number_bytes = 1 if head[4] < 0x80 else 8 - (head[4] ^ 0xFF).bit_length()
    at = 4 + number_bytes
    size_bytes = CODED_BYTES.get(size_code, 0) if size_code < 8 else 0
    end = at + size_bytes + (CODED_BYTES.get(rate_code, 0) if rate_code >= 12 else 0)
    checksum = 0
    for byte in head[: end + 1]:
        checksum = CRC_8[checksum ^ byte]
    if checksum or end >= len(head) or size_code == 0:
        return None
    number = head[4] & (0x7F if number_bytes == 1 else 0x7F >> number_bytes)
    for byte in head[5:at]:
        number = number << 6 | byte & 0x3F
    size = BLOCK_SIZES.get(size_code) or 1 + int.from_bytes(head[at : at + size_bytes], "big")
    return size + number * (1 if head[1] & 1 else block)


def _is_readable(data: bytes, total: int) -> bool:
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            return sum(len(block) for block in file.blocks(1 << 16)) == total
    except soundfile.LibsndfileError:
        return False
