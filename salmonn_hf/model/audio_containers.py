"""
The containers of plain samples: where the samples end by the header, and whether that is where the file does.

libsndfile quietly shortens the samples to the bytes that are there, reads no further than the header says, even if it
says 0 since its writer could not go back to it, and takes what follows for samples in some containers.
"""

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from .stream_part import AudioFileError, StreamPart, read_at

UNKNOWN_BYTES = 0x7F000000  # writers that cannot go back leave 0 or such a number and more, to 2³²-1 or 2⁶⁴-1
STRAY_BYTES = 8  # behind the samples: too few for anything
TRAILING_TAGS = (b"ID3", b"TAG", b"APETAGEX")
METADATA = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"JUNK", b"NAME", b"ANNO")  # may be cut off without harm


@dataclass
class Chunks:
    """
    Args:
        head: `struct` format of a chunk's name and size.
        first: where the first chunk is, from the start.
        samples: the names of the chunk that holds the samples.
        even: chunks start at multiples of this.
        counts_head: the size includes the name and itself.
    """

    head: str
    first: int
    samples: tuple[bytes, ...]
    even: int = 2
    counts_head: bool = False

    def at(self, stream: BinaryIO, position: int) -> tuple[bytes, int] | None:
        """Name and size of the content of the chunk at a position."""
        length = struct.calcsize(self.head)
        head = read_at(stream, position, length)
        if len(head) < length:
            return None
        name, size = struct.unpack(self.head, head)
        return name, size - length * self.counts_head

    def after(self, position: int, size: int) -> int:
        return position + struct.calcsize(self.head) + -(-size // self.even) * self.even


AU = (b".snd", b"dns.")
W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
FAMILIES = {
    b"RIFF": Chunks("<4sI", 12, (b"data",)),
    b"RF64": Chunks("<4sI", 12, (b"data",)),
    b"BW64": Chunks("<4sI", 12, (b"data",)),
    b"RIFX": Chunks(">4sI", 12, (b"data",)),
    b"FORM": Chunks(">4sI", 12, (b"SSND", b"BODY")),
    b"caff": Chunks(">4sq", 8, (b"data",), even=1),
    b"riff": Chunks("<16sQ", 40, (W64_DATA,), even=8, counts_head=True),
}


def chunk_parts(stream: BinaryIO, start: int, end: int) -> list[StreamPart] | None:
    """
    The joined files of a container made of chunks, each as a part that holds all its samples; `None` for a file that
    is none or has no chunk of samples.

    Raises:
        AudioFileError: if samples are missing, or bytes follow them that the header does not tell of.
    """
    parts = []
    while start < end:
        magic = read_at(stream, start, 4)
        family, position, long_size = FAMILIES.get(magic), start, None
        if family is None:
            return parts or None
        position += family.first
        while position < end and (chunk := family.at(stream, position)) and chunk[0] not in family.samples:
            if chunk[0] == b"ds64":
                long_size = int.from_bytes(read_at(stream, position + 16, 8), "little")
            if chunk[1] < 0 or family.after(position, chunk[1]) <= position:
                return parts or None
            position = family.after(position, chunk[1])
        if position >= end or not chunk:
            return parts or None
        size, content = chunk[1], position + struct.calcsize(family.head)
        if magic in (b"RF64", b"BW64") and long_size is not None and size == 0xFFFFFFFF:
            size = long_size
        part, start = _sample_part(stream, family, start, position, content, size, end)
        parts.append(part)
    return parts


def _sample_part(stream, family: Chunks, start: int, position: int, content: int, size: int, end: int):
    """The part from `start` with its samples at `content`, and where the next begins."""
    there, header = end - content, 8 if family.samples[0] == b"SSND" else 0  # offset and block size of AIFF
    header = 4 if family.samples == (b"data",) and family.even == 1 else header  # edit count of CAF
    if size <= header or size >= UNKNOWN_BYTES and size > there:
        if size <= header and (there <= size or _holds_chunks(stream, family, content + max(size, 0), end)):
            return StreamPart(stream, start, end), end  # there are no samples
        return _with_size(stream, family, start, position, there, end), end
    if size > there:
        raise AudioFileError(f"is cut short: {there} of its {size} bytes of samples are there")
    samples_end = content + size
    for rest in {samples_end, family.after(position, size)}:
        if read_at(stream, rest, 4) in FAMILIES and rest + family.first < end:
            return StreamPart(stream, start, rest), rest
        if rest < end and _holds_chunks(stream, family, rest, end):
            return StreamPart(stream, start, end), end
        if rest >= end or is_padding_or_tag(stream, rest, end):
            return StreamPart(stream, start, samples_end), end
    check_rest(stream, samples_end, end, size)
    return StreamPart(stream, start, samples_end), end


def _holds_chunks(stream, family: Chunks, position: int, end: int) -> bool:
    """Whether nothing but chunks, perhaps with padding or a tag behind them, fills the bytes from a position."""
    found = False
    while position < end:
        chunk = family.at(stream, position)
        if chunk is None or not chunk[0][:4].isascii() or not chunk[0][:4].decode().isprintable():
            break
        if chunk[0] in FAMILIES or chunk[1] < 0:
            return False
        found, after = True, family.after(position, chunk[1])
        if after > end + family.even - 1:
            return chunk[0] in METADATA
        position = after
    return found and (position >= end or is_padding_or_tag(stream, position, end))


def is_padding_or_tag(stream: BinaryIO, position: int, end: int) -> bool:
    if end - position <= STRAY_BYTES or read_at(stream, position, 8).startswith(TRAILING_TAGS):
        return True
    stream.seek(position)
    while position < end:
        block = stream.read(min(1 << 20, end - position))
        if not block or block.strip(b"\0"):
            return False
        position += len(block)
    return True


def check_rest(stream: BinaryIO, position: int, end: int, size: int):
    """
    Raises:
        AudioFileError: if more than padding or a tag follows the samples.
    """
    if not is_padding_or_tag(stream, position, end):
        raise AudioFileError(
            f"has a header that tells of {size} bytes of samples, which {end - position} other bytes follow",
            "correct the size in its header; of a WAV, all is read by: ffmpeg -ignore_length 1 -i INPUT output.flac",
        )


def _with_size(stream, family: Chunks, start: int, position: int, size: int, end: int) -> StreamPart:
    """A part whose header tells that the chunk of samples reaches to the end."""
    if family.head == "<16sQ":
        content = (size + 24).to_bytes(8, "little")
        return StreamPart(
            stream, start, end, {start + 16: (end - start).to_bytes(8, "little"), position + 16: content}
        )
    if family.head == ">4sq":
        return StreamPart(stream, start, end, {position + 4: size.to_bytes(8, "big")})
    if end - start >= 1 << 32:
        return StreamPart(stream, start, end)
    order = "big" if family.head[0] == ">" else "little"
    whole = {start + 4: (end - start - 8).to_bytes(4, order), position + 4: size.to_bytes(4, order)}
    if read_at(stream, start, 4) in (b"RF64", b"BW64"):
        whole[start] = b"RIFF"
    return StreamPart(stream, start, end, whole)


def plain_parts(stream: BinaryIO, start: int, end: int) -> list[StreamPart]:
    """
    The joined files of another container, as far as there is a length in its header, less what follows the samples.

    Raises:
        AudioFileError: if samples are missing, or bytes follow them that the header does not tell of.
    """
    parts, magic = [], read_at(stream, start, 4)
    while start < end:
        expected = _expected_bytes(stream, start, end)
        if expected is None:
            unknown = {start + 8: b"\xff\xff\xff\xff"} if magic in AU else {}
            return [*parts, StreamPart(stream, start, end, unknown)]
        if expected > end - start:
            raise AudioFileError(f"is cut short: {end - start} of its {expected} bytes are there")
        parts.append(StreamPart(stream, start, start + expected))
        start += expected
        if read_at(stream, start, 4) != magic:
            check_rest(stream, start, end, expected)
            break
    return parts


def _expected_bytes(stream: BinaryIO, start: int, end: int) -> int | None:
    """How long a file should be by its header; `None` where that does not tell."""
    head = read_at(stream, start, 1024)
    if head[:4] in AU:
        offset, size = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:12].ljust(8, b"\0"))
        return None if size >= UNKNOWN_BYTES or size == 0 else offset + size
    if head.startswith(b"NIST_1A"):
        fields = {name: int(value) for name, value in re.findall(rb"(\w+) -(?:i|s\d+) (\d{1,12})\b", head)}
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        if not all(name in fields for name in names) or not head[8:16].strip().isdigit():
            return None
        count, channels, width = (fields[name] for name in names)
        return int(head[8:16]) + count * channels * width
    if head.startswith(b"2BIT") and len(head) >= 30:  # AVR
        channels, bits, count = 1 + (head[12:14] != b"\0\0"), *struct.unpack(">H10xI", head[14:30])
        return 128 + channels * bits // 8 * count
    if head.startswith(b"Creative Voice File") and len(head) > 26:
        return _voc_bytes(stream, start, end, start + int.from_bytes(head[20:22], "little"))
    if head.startswith(b"MATLAB 5.0") and len(head) > 128:
        return _mat5_bytes(stream, start, end, "<" if head[126:128] == b"IM" else ">")
    if head[20:30] == b"samplerate" and start + 38 < end:
        return _mat4_bytes(stream, start, end)
    if head.startswith(b"ALawSoundFile**") and len(head) > 32:  # WVE
        return 32 + int.from_bytes(head[18:22], "big")
    if head.startswith(b"\x01\x04") and len(head) > 42:  # MPC2K
        return 42 + 2 * (1 + head[21]) * int.from_bytes(head[30:34], "little")
    if head.startswith(b"\xf0\x7e") and head[3:4] == b"\x01" and len(head) >= 21:  # SDS
        bits, count = head[6], head[10] | head[11] << 7 | head[12] << 14
        per_packet = 120 // max(2, -(-bits // 7))
        return 21 + 127 * -(-count // per_packet)
    return None


def _voc_bytes(stream: BinaryIO, start: int, end: int, position: int) -> int:
    sounds = 0
    while position < end:
        kind, *size = read_at(stream, position, 4).ljust(4, b"\xff")
        if kind == 0:
            position += 1
            break
        sounds += kind in (1, 2, 9)
        position += 4 + int.from_bytes(size, "little")
    if sounds > 1:
        fault = "is a VOC of several blocks, of which libsndfile takes the heads for samples"
        raise AudioFileError(fault, "convert it first: ffmpeg -i INPUT output.flac")
    return position - start


def _mat5_bytes(stream: BinaryIO, start: int, end: int, order: str) -> int:
    position = after = start + 128
    while after + 8 <= end:
        position = after + 8 + struct.unpack(f"{order}4xI", read_at(stream, after, 8))[0]
        after = after + 8 + -(-(position - after - 8) // 8) * 8
    return (min(after, end) if position <= end + 8 else position) - start  # libsndfile counts 8 bytes too many


def _mat4_bytes(stream: BinaryIO, start: int, end: int) -> int:
    position = start
    for _ in range(2):  # the rate and the samples
        head = read_at(stream, position, 20).ljust(20, b"\0")
        order = "<" if head[2:4] == b"\0\0" else ">"
        kind, rows, columns, _, name = struct.unpack(f"{order}5I", head)
        position += 20 + name + rows * columns * {0: 8, 1: 4, 2: 4, 5: 1}.get(kind // 10 % 10, 2)
    return position - start
