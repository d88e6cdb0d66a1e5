"""A part of a binary stream as a stream: decoders are shown one of several joined files, or a mended header."""

import io
from typing import BinaryIO


class AudioFileError(ValueError):
    """A file that does not hold what it should. The message, without the name, says what is wrong, and a remedy."""

    def __init__(self, fault: str, remedy: str = "get a whole copy of it"):
        super().__init__(f"{fault}; {remedy}")


class StreamPart(io.RawIOBase):
    """
    The bytes of `stream` from `start` to `end`, read-only.

    Args:
        replaced (`dict[int, bytes]`): bytes that are read instead of those that are there, by position in `stream`.
        frames (`int`, *optional*): of the audio in it, where that is known better than its header tells.
        counted (`bytes`, *optional*): the same audio with a header that tells.
        total (`int`, *optional*): frames that its header promises, where the decoder is not told of them.
    """

    def __init__(self, stream: BinaryIO, start: int, end: int, replaced=None, frames=None, counted=None, total=None):
        self.stream, self.start, self.end, self.position = stream, start, end, start
        self.replaced, self.frames, self.counted, self.total = replaced or {}, frames, counted, total

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position - self.start

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = max(self.start, (self.start, self.position, self.end)[whence] + offset)
        return self.position - self.start

    def readinto(self, buffer):
        self.stream.seek(self.position)
        data = bytearray(self.stream.read(max(0, min(len(buffer), self.end - self.position))))
        for at, content in self.replaced.items():
            first, last = max(at, self.position), min(at + len(content), self.position + len(data))
            if first < last:
                data[first - self.position : last - self.position] = content[first - at : last - at]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def read_at(stream: BinaryIO, position: int, count: int) -> bytes:
    stream.seek(position)
    return stream.read(count)
