"""
MP3 files frame by frame (ISO 11172-3): whether any is cut off, and where each of several joined streams begins.

A decoder believes the count of frames in the first (a Xing, Info or VBRI header), or guesses the count from the first
frame's bit rate; then it stops, although more may follow. It is given one stream at a time, with the right count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO

from .stream_part import AudioFileError, StreamPart

FOREIGN_BYTES = 4096  # a tag of unknown kind behind the last frame
ENCODER_DELAY = 2304  # samples, with padding; encoders differ in what their header counts
JUNK_BYTES = 1024  # before the first frame
RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version
LAYER_2 = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
LAYER_3 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
LOW_RATES = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # layers II and III, versions 2 and 2.5
KBIT = {(3, 1): tuple(range(0, 449, 32)), (3, 2): LAYER_2, (3, 3): LAYER_3, (0, 2): LOW_RATES, (0, 3): LOW_RATES}
KBIT[0, 1] = (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)


@dataclass
class MpegStream:
    """Consecutive frames of one kind. `counted`: the frames of which its header tells, if it has one."""

    kind: tuple
    frames: list[int] = field(default_factory=list)  # where they start
    end: int = 0
    header: int | None = None
    counted: int | None = None


def frame_kind(data: bytes, at: int) -> tuple | None:
    """Version (3, 2, 0), layer (1 to 3), sampling rate and whether it is mono, of the frame at a position."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer, rate = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3), data[at + 2] >> 2 & 3
    if version == 1 or layer == 4 or rate == 3 or data[at + 2] >> 4 == 15:
        return None
    return version, layer, RATES[version][rate], data[at + 3] >> 6 == 3


def frame_samples(kind: tuple) -> int:
    version, layer = kind[:2]
    return 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576


def frame_bytes(data: bytes, at: int, kind: tuple, free_format: int) -> int:
    """`free_format`: the length of frames without a bit rate in their header, less their padding."""
    version, layer, rate, _ = kind
    padding, index = data[at + 2] >> 1 & 1, data[at + 2] >> 4
    slot = 4 if layer == 1 else 1
    if index == 0:
        return free_format + padding * slot
    bits = KBIT[3 if version == 3 else 0, layer][index] * 1000
    return (frame_samples(kind) // 8 // slot * bits // rate + padding) * slot


def free_format_bytes(data: bytes, at: int, kind: tuple) -> int:
    """The distance to the next frame of the kind, if a third follows at the same; else 0."""
    following = at + 4
    while (following := data.find(data[at : at + 2], following, at + (1 << 13))) > 0:
        length = following - at - (data[at + 2] >> 1 & 1)
        third = following + length + (data[following + 2] >> 1 & 1) if following + 2 < len(data) else len(data)
        if frame_kind(data, following) == kind == frame_kind(data, third) and data[following + 2] >> 4 == 0:
            return length
        following += 1
    return 0


def tag_bytes(data: bytes, at: int) -> int:
    """The length of an ID3, APE or lyrics tag, or of padding, at a position; 0 if there is none."""
    head = data[at : at + 32]
    if head.startswith(b"ID3") and len(head) >= 10:
        return 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + (10 if head[5] & 0x10 else 0)
    if head.startswith(b"TAG"):
        return 128
    if head.startswith(b"APETAGEX"):
        return 32 + int.from_bytes(head[12:16], "little")
    if head.startswith(b"LYRICSBEGIN"):
        ends = [data.find(mark, at) for mark in (b"LYRICS200", b"LYRICSEND")]
        return min((end + 9 - at for end in ends if end > 0), default=0)
    return len(data[at : at + 4096]) - len(data[at : at + 4096].lstrip(b"\0"))


def mpeg_streams(data: bytes) -> list[MpegStream]:
    """
    Raises:
        AudioFileError: if frames are damaged or cut short, or fewer than a header tells.
    """
    streams, at, free_format = [], 0, 0
    while at < len(data):
        kind = frame_kind(data, at)
        if kind is not None and data[at + 2] >> 4 == 0:
            free_format = free_format or free_format_bytes(data, at, kind)
        length = 0 if kind is None else frame_bytes(data, at, kind, free_format)
        if length < 4:
            if length := tag_bytes(data, at):
                at += length
                continue
            at = _next_stream(data, at, not streams)
            continue
        if at + length > len(data):
            if not streams or streams[-1].counted is None or len(streams[-1].frames) < streams[-1].counted:
                raise AudioFileError("is cut short: it ends within an MPEG frame")
            break
        counted = frames_counted(data[at : at + length]) if kind[1] == 3 else None
        if counted is not None or not streams or streams[-1].kind != kind:
            streams.append(MpegStream(kind, header=None if counted is None else at, counted=counted or None))
        if counted is None:
            streams[-1].frames.append(at)
        at += length
        streams[-1].end = at
    for stream in streams:
        if len(stream.frames) + 1 < (stream.counted or 0):  # some count the header too
            raise AudioFileError(f"is cut short: {len(stream.frames)} of its {stream.counted} MPEG frames are there")
    return [stream for stream in streams if stream.frames]


def _next_stream(data: bytes, at: int, first: bool) -> int:
    """Where frames begin behind bytes that are none; the end of the data, if there are none."""
    for position in range(at, min(len(data), at + (JUNK_BYTES if first else FOREIGN_BYTES))):
        kind = frame_kind(data, position)
        if kind is not None and frame_kind(data, position + frame_bytes(data, position, kind, 0)) == kind:
            if first:
                return position
            raise AudioFileError(f"is damaged: bytes {at} to {position} are no MPEG frame")
    if first or len(data) - at > FOREIGN_BYTES:
        raise AudioFileError(f"is damaged: there is no MPEG frame at byte {at}")
    return len(data)


def header_place(kind: tuple) -> int:
    """Where in a frame of layer III a Xing header is: behind the frame's header and side information."""
    version, _, _, mono = kind
    return 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))


def frames_counted(frame: bytes) -> int | None:
    """How many frames follow, if this is no audio but the header that tells; 0 where it does not."""
    place = header_place(frame_kind(frame, 0))
    for at in (place, place + 2):  # with a checksum of the frame
        if frame[at : at + 4] in (b"Xing", b"Info"):
            return int.from_bytes(frame[at + 8 : at + 12], "big") if frame[at + 7] & 1 else 0
    return int.from_bytes(frame[50:54], "big") if frame[36:40] == b"VBRI" else None


def counting_header(data: bytes, stream: MpegStream) -> bytes:
    """A frame that counts those of a stream."""
    version, _, rate, _ = stream.kind
    first, index = stream.frames[0], 9 if version == 3 else 8
    head = bytes([0xFF, data[first + 1] | 1, index << 4 | data[first + 2] & 0x0C, data[first + 3]])
    frame = bytearray(frame_bytes(head, 0, stream.kind, 0))
    frame[:4], at = head, header_place(stream.kind)
    frame[at : at + 12] = b"Xing" + (1).to_bytes(4, "big") + len(stream.frames).to_bytes(4, "big")
    return bytes(frame)


def mpeg_parts(data: bytes) -> Iterator[StreamPart]:
    """
    The joined streams of an MP3 file as files: as they are, and as `counted` with a header that counts their frames.

    Raises:
        AudioFileError: as `mpeg_streams`.
    """
    for stream in mpeg_streams(data):
        first = stream.frames[0]
        whole = data[first if stream.header is None else stream.header : stream.end]
        # With a header, decoders leave out what the encoder added at both ends.
        frames, counted = len(stream.frames) * frame_samples(stream.kind) - ENCODER_DELAY * bool(stream.counted), None
        if stream.kind[1] == 3 and data[first + 2] >> 4:
            counted = counting_header(data, stream) + data[first : stream.end]
        yield StreamPart(BytesIO(whole), 0, len(whole), frames=frames, counted=counted)
