"""Files that decoders read in part: joined streams and headers that tell less than there is; and valid oddities."""

import io
import struct

import numpy as np
import pytest
import soundfile
from test_audio import RATE, encoded, speech_like

from salmonn_hf.model.audio import AudioError, load_audio
from salmonn_hf.model.audio_file import file_seconds
from salmonn_hf.model.mpeg_frames import frame_kind, mpeg_streams
from salmonn_hf.model.ogg_pages import page_checksum

CONTAINERS = {
    "WAV": {},
    "WAVEX": {"format": "WAVEX", "subtype": "PCM_24"},
    "RF64": {"format": "RF64"},
    "W64": {"format": "W64", "subtype": "FLOAT"},
    "AIFF": {"format": "AIFF"},
    "CAF": {"format": "CAF"},
    "AU": {"format": "AU"},
    "FLAC": {"format": "FLAC"},
    "Vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "Opus": {"format": "OGG", "subtype": "OPUS"},
    "MP3": {"format": "MP3"},
}


def other(seconds=1.3):
    return speech_like(seconds)[::-1] * 0.7


@pytest.mark.parametrize("name", CONTAINERS)
def test_joined_files_are_read_one_after_the_other(name):
    first, second = encoded(speech_like(1), **CONTAINERS[name]), encoded(other(), **CONTAINERS[name])
    alone = np.concatenate([load_audio(first), load_audio(second)])
    np.testing.assert_array_equal(load_audio(first + second), alone)
    if name != "FLAC":  # whose header tells of the first, and is believed without looking further
        assert file_seconds(io.BytesIO(first + second)) == pytest.approx(len(alone) / RATE, abs=0.001)


def test_joined_files_of_other_kinds():
    low, high = encoded(speech_like(1, 24_000), 24_000, format="MP3"), encoded(other(), format="MP3")
    vorbis, opus = (encoded(speech_like(1), **CONTAINERS[name]) for name in ("Vorbis", "Opus"))
    for first, second in ((low, high), (high, low), (vorbis, opus)):
        np.testing.assert_array_equal(
            load_audio(first + second), np.concatenate(list(map(load_audio, (first, second))))
        )


def mp3_frames(data: bytes) -> list[bytes]:
    """The frames of an MP3 without its header and without tags."""
    (stream,) = mpeg_streams(data)
    return [data[start:end] for start, end in zip(stream.frames, [*stream.frames[1:], stream.end], strict=True)]


def test_mp3_without_a_length_header_is_read_whole():
    samples = np.concatenate([np.zeros(RATE), speech_like(4), np.zeros(4 * RATE)]).astype(np.float32)
    for mode, level in (("VARIABLE", 0.4), ("CONSTANT", 0.8)):
        data = encoded(samples, format="MP3", bitrate_mode=mode, compression_level=level)
        bare = b"".join(mp3_frames(data))
        whole, (stream,) = load_audio(bare), mpeg_streams(bare)
        assert stream.counted is None and len(samples) <= len(whole) <= len(samples) + 3 * 1152
        products = np.fft.irfft(np.fft.rfft(whole, 1 << 19) * np.fft.rfft(load_audio(data), 1 << 19).conj())
        assert products.max() > 0.99 * float(np.square(load_audio(data)).sum())
        assert len(load_audio(bare + bare)) == pytest.approx(2 * len(whole), abs=1200)


def test_mp3_whose_header_counts_too_few_or_too_many_frames():
    data = encoded(speech_like(3), format="MP3")
    at = data.index(b"Xing") + 8 if b"Xing" in data else data.index(b"Info") + 8
    few, many, none = (data[:at] + count.to_bytes(4, "big") + data[at + 4 :] for count in (5, 5000, 0))
    for mended in (few, none):
        assert abs(len(load_audio(mended)) - 3 * RATE) < 2400
    with pytest.raises(AudioError, match="cut short: .* of its 5000 MPEG frames"):
        load_audio(many)


def test_mp3_with_tags_padding_or_free_format_is_read():
    data = encoded(speech_like(2), format="MP3")
    id3 = b"ID3\x03\0\0\0\0\x01\x00" + bytes(128)
    ape = b"APETAGEX" + struct.pack("<IIII8x", 2000, 32, 0, 0)
    for tagged in (id3 + data, id3 + id3 + data, data + ape, data + b"TAG" + bytes(125), id3 + bytes(500) + data):
        np.testing.assert_array_equal(load_audio(tagged), load_audio(data))
    tagged = id3 + data + b"TAG" + bytes(125)
    np.testing.assert_array_equal(load_audio(tagged * 3), np.tile(load_audio(data), 3))
    # Free format: frames of one length, which none of them tells.
    frames = mp3_frames(encoded(speech_like(2), format="MP3", bitrate_mode="CONSTANT", compression_level=0.5))
    free = b"".join(frame[:2] + bytes([frame[2] & 0x0F]) + frame[3:] for frame in frames)
    assert len(mpeg_streams(free)[0].frames) == len(frames)


@pytest.mark.parametrize(
    "byte", [b"\xff\xe0\0\0", b"\xff\xf3\xf8\xc4", b"\xff\xf3\x8c\xc4", b"\xff\xe9\x80\xc4", b"\xfe"]
)
def test_what_is_no_mpeg_frame(byte):
    assert frame_kind(byte, 0) is None
    assert frame_kind(b"\xff\xf3\x88\xc4", 0) == (2, 3, 16_000, True)


def test_a_lost_or_damaged_page_of_ogg_is_noticed():
    data = encoded(speech_like(3), **CONTAINERS["Vorbis"])
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    assert len(pages) > 3
    for page in pages:
        assert page_checksum(page[:22] + bytes(4) + page[26:]) == int.from_bytes(page[22:26], "little")
    for broken in (
        b"".join(pages[:-1]),
        b"".join(pages[:2] + pages[3:]),
        data[:-3],
        data[: len(data) // 2] + b"\x55" + data[len(data) // 2 + 1 :],
        data + data[:-3],
    ):
        with pytest.raises(AudioError, match="get a whole copy"):
            load_audio(broken)
    np.testing.assert_array_equal(load_audio(data + bytes(5000)), load_audio(data))


# Sizes in headers: where the size of the samples is, how long it is, in which order, and what is beside the samples.
SIZES = {
    "WAV": (b"data", 4, 4, "little", 0),
    "RF64": (b"data", 4, 4, "little", 0),
    "ds64": (b"ds64", 16, 8, "little", 0),
    "AIFF": (b"SSND", 4, 4, "big", 8),
    "CAF": (b"data", 4, 8, "big", 4),
    "W64": (b"data\xf3", 16, 8, "little", 24),
    "AU": (b".snd", 8, 4, "big", 0),
}


def with_size(name: str, size: int | None) -> bytes:
    """A file with another size of its samples in the header, by default all bits set."""
    data = encoded(speech_like(2), **CONTAINERS.get(name, {"format": "RF64"}))
    mark, offset, width, order, _ = SIZES[name]
    at = data.index(mark) + offset
    if name == "RF64" and size is None:
        size = 0x7FFFFFFF
    return data[:at] + ((1 << 8 * width) - 1 if size is None else size).to_bytes(width, order) + data[at + width :]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [0, None])
def test_all_samples_of_a_file_whose_writer_left_no_size(name, size):
    data = with_size(name, size)
    np.testing.assert_array_equal(
        load_audio(data), speech_like(2) if name == "W64" else load_audio(encoded(speech_like(2)))
    )
    assert file_seconds(io.BytesIO(data)) == 2.0


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_less_or_more_than_there_is_is_refused(name):
    with pytest.raises(AudioError, match="bytes of samples, which .* other bytes follow; correct the size"):
        load_audio(with_size(name, 20_000))
    with pytest.raises(AudioError, match="cut short: .* get a whole copy"):
        load_audio(with_size(name, 1_000_000))


def test_flac_whose_header_tells_less_or_more_or_another_rate():
    data = encoded(speech_like(2), format="FLAC")
    for total, readable in ((16_000, True), (0, True), (64_000, False)):
        changed = data[:22] + total.to_bytes(4, "big") + data[26:]
        if readable:
            np.testing.assert_array_equal(load_audio(changed), load_audio(data))
        else:
            with pytest.raises(AudioError, match="32000 of its 64000 samples"):
                load_audio(changed)
    with pytest.raises(AudioError, match="tells of 8000 Hz, its frames of 16000 Hz"):
        load_audio(data[:18] + (8000 << 4 | data[20] & 15).to_bytes(3, "big") + data[21:])
    for behind in (b"TAG" + bytes(125), bytes(100)):
        np.testing.assert_array_equal(load_audio(data + behind), load_audio(data))


@pytest.mark.parametrize("samples", [1, 4096, 16_100])
def test_what_follows_the_end_of_a_flac_is_tags_or_padding_or_refused(samples):
    data, random = encoded(speech_like(2)[:samples], format="FLAC"), np.random.default_rng(samples).bytes(5000)
    alone = load_audio(data)
    for behind in (b"TAG" + bytes(125), b"ID3\4\0\0\0\0\0\5title", bytes(100), b"abc"):
        np.testing.assert_array_equal(load_audio(data + behind), alone)
    for behind in (
        encoded(other(), format="WAV"),
        encoded(other(), format="MP3"),
        random,
        b"\xff\xf8" * 50,
        data[60:],
    ):
        with pytest.raises(AudioError, match=f"of {samples} samples, and {len(behind)} bytes follow its end"):
            load_audio(data + behind)


def chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ALAW", "ULAW", "MS_ADPCM", "IMA_ADPCM"]
)
def test_valid_wav_files_with_something_behind_their_samples(subtype):
    plain = encoded(speech_like(1)[:15_999], subtype=subtype)  # an odd number of bytes, and one of padding
    expected, info = load_audio(plain), chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"Lavf61.1.100\0"))
    assert expected.std() > 0.01
    unpadded = plain[:-1] if subtype in ("PCM_U8", "PCM_24") else plain
    for data in (
        plain + info,
        plain + chunk(b"id3 ", b"ID3\x03" + bytes(33)) + info,
        unpadded + info,  # some writers forget the padding
        plain + info[:-4],  # what is cut off is no samples
        plain + bytes(3000),
        plain + b"ID3\x04\0\0\0\0\0\x10" + bytes(16),
        plain + b"TAG" + bytes(125),
        plain + info + bytes(100),
        plain + b"\r\n",
    ):
        np.testing.assert_array_equal(load_audio(data), expected)
    cut = plain[:-200]
    with pytest.raises(AudioError, match="cut short"):
        load_audio(cut)


def test_an_empty_wav_with_tags_is_empty():
    data = encoded(np.zeros(0)) + chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"Lavf"))
    with pytest.raises(AudioError, match="has no samples"):
        load_audio(data)


def written_by_soundfile():
    for form in soundfile.available_formats():
        for subtype in soundfile.available_subtypes(form):
            if form not in ("RAW", "SD2"):  # no header; two files
                yield form, subtype


def test_every_format_that_soundfile_writes_is_read_whole():
    samples, formats = speech_like(1)[:12_800], set()  # whole blocks of ADPCM and GSM
    for form, subtype in written_by_soundfile():
        try:
            data = encoded(samples, format=form, subtype=subtype)
            expected, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        except soundfile.LibsndfileError:  # it lists some that it cannot write, or cannot read to the end
            continue
        waveform = load_audio({"bytes": data, "path": f"{form} {subtype}"})
        assert len(waveform) == pytest.approx(len(expected) * RATE / rate, abs=1), (form, subtype)
        if rate == RATE:
            np.testing.assert_allclose(waveform, expected, atol=1e-6, err_msg=f"{form} {subtype}")
        formats.add(form)
    assert len(formats) > 20


@pytest.mark.parametrize("rate", [1, 900, 2_000_000])
def test_a_rate_that_is_none_of_audio_is_refused(rate):
    """Resampled, a few of such samples would fill the memory."""
    with pytest.raises(AudioError, match=f"sampling rate of {rate} Hz"):
        load_audio(encoded(speech_like(0.1), rate))


@pytest.mark.parametrize("form", ["AVR", "MAT4", "MAT5", "NIST", "SDS", "SVX", "VOC", "W64", "MPC2K", "FLAC"])
def test_rare_files_that_are_cut_short_are_refused(form):
    data = encoded(speech_like(1), format=form)
    for share in (0.3, 0.8, 0.98):
        with pytest.raises(AudioError):
            load_audio(data[: int(len(data) * share)])
