"""load_audio against soundfile, soxr, ffmpeg and tones of known pitch; and what it says about audio it cannot use."""

import base64
import http.server
import io
import shutil
import subprocess
import threading

import numpy as np
import pytest
import soundfile
import soxr
import torch

from salmonn_hf.model.audio import AudioError, load_audio

RATE = 16_000
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def tone(hertz=440.0, seconds=1.0, rate=RATE, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def speech_like(seconds, rate=RATE):
    """Noise bursts: unlike a tone, it makes encoders spend bits unevenly."""
    rng = np.random.default_rng(0)
    samples = rng.standard_normal(int(seconds * rate)) * 0.1
    return (samples * (np.arange(len(samples)) // (rate // 2) % 3 > 0)).astype(np.float32)


def encoded(samples, rate=RATE, **kwargs):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, **{"format": "WAV"} | kwargs)
    return stream.getvalue()


def ffmpeg(data: bytes, *arguments) -> bytes:
    command = ["ffmpeg", "-v", "error", "-i", "-", *arguments, "-"]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def assert_tone(waveform, hertz=440.0, amplitude=0.5, seconds=1.0):
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - seconds * RATE) <= 1
    middle = waveform[len(waveform) // 4 : 3 * len(waveform) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(spectrum.argmax() / len(middle) * RATE - hertz) < 3
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(amplitude, rel=0.02)


# Sources


def test_the_file_itself_as_text():
    """As a `data:` URI, in base64 or percent-encoded, and as base64 alone, also in lines."""
    data = encoded(tone())
    text = base64.b64encode(data).decode()
    uris = ["data:audio/wav;base64,", "data:;base64,", "DATA:audio/wav;codecs=1;BASE64,"]
    percent = "".join(f"%{byte:02x}" for byte in data)
    lines = base64.encodebytes(data).decode()
    escaped = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    sources = [*(uri + text for uri in uris), uris[0] + escaped, f"data:audio/wav,{percent}", text, lines]
    for source in [*sources, {"path": sources[0]}]:
        np.testing.assert_array_equal(load_audio(source), load_audio(data))


def test_a_text_that_is_no_file_is_refused_in_few_words():
    for source in [
        "data:audio/wav;base64,AAAA",
        "data:audio/wav;base64,!" + "A" * 5000,
        "data:,",
        "A" * 5000,
        "a/" * 3000,
    ]:
        with pytest.raises(AudioError) as error:
            load_audio(source)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("wrap", [str, lambda path: path], ids=["str", "Path"])
def test_path(tmp_path, wrap):
    soundfile.write(tmp_path / "a.flac", speech_like(1), RATE)
    expected, _ = soundfile.read(tmp_path / "a.flac", dtype="float32")
    np.testing.assert_array_equal(load_audio(wrap(tmp_path / "a.flac")), expected)


def test_bytes_streams_and_datasets_rows_give_the_same(tmp_path):
    data = encoded(speech_like(1))
    (tmp_path / "a.wav").write_bytes(data)
    stream = io.BytesIO(data)
    expected = load_audio(tmp_path / "a.wav")
    sources = [data, bytearray(data), stream, stream]  # a stream can be read twice
    sources += [{"bytes": data, "path": "x.wav"}, {"bytes": None, "path": str(tmp_path / "a.wav")}]
    for source in sources:
        np.testing.assert_array_equal(load_audio(source), expected)


def test_url(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(tone()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert_tone(load_audio(f"{address}/a.wav"))
        with pytest.raises(AudioError, match=f"{address}/b.wav could not be fetched.*404"):
            load_audio(f"{address}/b.wav")
        server.shutdown()


@pytest.mark.parametrize(
    ("rate", "kwargs"),
    [
        (8_000, {"subtype": "PCM_U8"}),
        (8_000, {"subtype": "ULAW"}),
        (11_025, {"subtype": "PCM_16"}),
        (44_100, {"subtype": "DOUBLE"}),
        (48_000, {"format": "OGG", "subtype": "OPUS"}),
        (96_000, {"format": "FLAC", "subtype": "PCM_24"}),
        (22_050, {"format": "MP3"}),
        (16_000, {"format": "AIFF", "subtype": "PCM_S8"}),
    ],
)
def test_formats_and_rates(rate, kwargs):
    assert_tone(load_audio(encoded(tone(rate=rate), rate, **kwargs)))


def test_channels_are_averaged():
    tones = np.stack([tone(300 + 100 * i, rate=48_000) for i in range(8)], axis=1)  # 7.1
    waveform = load_audio(encoded(tones, 48_000, subtype="FLOAT"))
    expected = soxr.resample(tones.mean(axis=1), 48_000, RATE)
    np.testing.assert_allclose(waveform, expected, atol=1e-6)


@needs_ffmpeg
@pytest.mark.parametrize("arguments", [("-f", "wav"), ("-f", "mp3", "-b:a", "64k")])
def test_decoding_and_resampling_agree_with_ffmpeg(arguments):
    seconds = np.arange(3 * 44_100) / 44_100
    chirp = 0.5 * np.sin(2 * np.pi * (200 + 400 * seconds) * seconds)
    data = ffmpeg(encoded(chirp, 44_100), *arguments)
    expected = np.frombuffer(ffmpeg(data, "-f", "f32le", "-ac", "1", "-ar", str(RATE)), np.float32)
    waveform = load_audio(data)
    # Decoders may skip different parts of an MP3's start: align, then compare.
    products = np.fft.irfft(np.fft.rfft(waveform, 1 << 17) * np.fft.rfft(expected, 1 << 17).conj())
    shift = (products.argmax() + (1 << 16)) % (1 << 17) - (1 << 16)
    assert abs(len(waveform) - len(expected)) <= 600 and abs(shift) <= 600
    difference = waveform[1000 + shift : 40_000 + shift] - expected[1000:40_000]
    assert np.abs(difference).max() < 0.002


@needs_ffmpeg
def test_streamed_files_whose_header_does_not_know_their_length():
    data = encoded(speech_like(7))
    for form in ("flac", "wav", "aiff", "au", "caf", "w64", "wav -rf64 always"):
        streamed = ffmpeg(data, "-f", *form.split())
        np.testing.assert_array_equal(load_audio(streamed), load_audio(data), err_msg=form)


def test_blocks_of_a_long_file_join_without_seams(monkeypatch):
    monkeypatch.setattr("salmonn_hf.model.audio_file.BLOCK_SAMPLES", 1000)
    samples = speech_like(2, 44_100)
    waveform = load_audio(encoded(samples, 44_100, subtype="FLOAT"))
    np.testing.assert_array_equal(waveform, soxr.resample(samples, 44_100, RATE, quality="HQ"))


# Arrays


@pytest.mark.parametrize(
    ("dtype", "peak", "middle"),
    [
        (np.int8, 2**7, 0),
        (np.uint8, 2**7, 2**7),
        (np.int16, 2**15, 0),
        (np.int32, 2**31, 0),
        (np.uint16, 2**15, 2**15),
    ],
)
def test_integers_are_scaled_by_their_range(dtype, peak, middle):
    samples = (tone(amplitude=0.5).astype(np.float64) * peak + middle).round().astype(dtype)
    np.testing.assert_allclose(load_audio(samples), tone(amplitude=0.5), atol=1.01 / peak)
    np.testing.assert_array_equal(load_audio(np.array([middle] * 3, dtype)), [0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors(dtype):
    samples = torch.tensor(tone(), dtype=dtype, requires_grad=True)
    np.testing.assert_array_equal(load_audio(samples), samples.detach().float().numpy())
    np.testing.assert_array_equal(load_audio(torch.tensor([0, 16384], dtype=torch.int16)), [0, 0.5])


def test_either_orientation_of_channels():
    stereo = np.stack([tone(), np.zeros(RATE, np.float32)])
    for samples in (stereo, stereo.T, np.asfortranarray(stereo)):
        np.testing.assert_array_equal(load_audio(samples), tone() / 2)
    np.testing.assert_array_equal(load_audio(tone()[None]), tone())


@pytest.mark.parametrize("peak", [0.3, 1.0, 1.7, 2.0])
def test_floats_a_little_over_full_scale_stay(peak):
    for source in (
        tone(amplitude=peak),
        list(map(float, tone(amplitude=peak))),
        encoded(tone(amplitude=peak), subtype="FLOAT"),
    ):
        np.testing.assert_array_equal(load_audio(source), tone(amplitude=peak))


@pytest.mark.parametrize("peak", [2.5, 3, 10, 60])
def test_floats_far_over_full_scale_are_scaled_down(peak):
    loud = tone(hertz=437, amplitude=peak)
    sources = [loud, torch.tensor(loud), torch.tensor(loud).double(), {"array": loud, "sampling_rate": RATE}]
    for source in (*sources, loud[None], encoded(loud, subtype="FLOAT"), encoded(loud, subtype="DOUBLE")):
        np.testing.assert_allclose(load_audio(source), loud / np.abs(loud).max(), rtol=1e-6)


@pytest.mark.parametrize("peak", [127, 6700, 32_767, 8_388_607, 2_147_483_647])
def test_floats_in_the_range_of_integers_are_refused(peak):
    loud = tone(hertz=437, amplitude=peak)
    sources = [
        loud,
        loud.astype(np.float64),
        loud.tolist(),
        torch.tensor(loud),
        torch.tensor(loud, dtype=torch.bfloat16),
    ]
    sources += [np.stack([loud, loud]), {"raw": loud, "sampling_rate": 8000}, encoded(loud, subtype="FLOAT")]
    for source in sources:
        with pytest.raises(AudioError, match="in the range of integers; .* Divide those of 16 bits by 32768"):
            load_audio(source)


def test_lists_and_strided_arrays():
    np.testing.assert_allclose(load_audio([0.0, 0.25, -1.0]), [0, 0.25, -1])
    np.testing.assert_array_equal(load_audio(tone()[::-1]), tone()[::-1])


@pytest.mark.parametrize("key", ["array", "raw"])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000.0, np.int64(96_000)])
def test_dicts_are_resampled(key, rate):
    source = {key: tone(rate=int(rate)), "sampling_rate": rate, "path": None}
    np.testing.assert_array_equal(load_audio(source), soxr.resample(source[key], rate, RATE, quality="HQ"))
    assert_tone(load_audio(source))
    assert set(source) == {key, "sampling_rate", "path"}


def test_other_target_rate():
    assert len(load_audio(tone(rate=48_000), 48_000)) == 48_000
    assert len(load_audio(encoded(tone()), 48_000)) == 48_000


def test_audio_decoder():
    class Samples:
        data = torch.tensor(np.stack([tone(rate=8_000), np.zeros(8_000, np.float32)]))
        sample_rate = 8_000

    class AudioDecoder:
        def get_all_samples(self):
            return Samples

    assert_tone(load_audio(AudioDecoder()), amplitude=0.25)


def test_silence_is_audio():
    for source in (np.zeros(100, np.float32), encoded(np.zeros(100))):
        np.testing.assert_array_equal(load_audio(source), np.zeros(100))


# What cannot be used


def cut(data, share):
    return data[: int(len(data) * share)]


def damaged(data):
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 50]) + data[middle + 50 :]


def bad_files():
    flac, mp3, wav = (encoded(speech_like(5), format=name) for name in ("FLAC", "MP3", "WAV"))
    return {
        "text": (b"This is not audio.\n" * 50, "is not an audio file.*ffmpeg -i"),
        "empty": (b"", "is not an audio file"),
        "flac cut at 0.3": (cut(flac, 0.3), "cut short.*whole copy"),
        "flac cut at 0.99": (cut(flac, 0.99), "cut short.*whole copy"),
        "flac damaged": (damaged(flac), "damaged.*whole copy"),
        "wav cut": (cut(wav, 0.9), "cut short.*whole copy"),
        "mp3 cut": (cut(mp3, 0.7), "cut short.*whole copy"),
        "no samples": (encoded(np.zeros(0)), "has no samples"),
        "nan": (encoded(np.array([0.1, np.nan] * 50), subtype="FLOAT"), "NaN or infinite"),
        "nan resampled": (encoded(np.array([0.1, np.nan] * 50), 8000, subtype="FLOAT"), "NaN or infinite"),
    }


@pytest.mark.parametrize("case", bad_files())
def test_bad_files_are_named(tmp_path, case):
    data, message = bad_files()[case]
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    with pytest.raises(AudioError, match=f"^{path} .*{message}"):
        load_audio(path)
    with pytest.raises(AudioError, match=f"^{path} .*{message}"):
        load_audio({"bytes": data, "path": str(path)})
    with pytest.raises(AudioError, match=f"^bytes of length {len(data)} .*{message}"):
        load_audio(data)


def test_every_damaged_byte_of_a_flac_is_noticed():
    samples = speech_like(1)
    data = encoded(samples, format="FLAC")
    rng = np.random.default_rng(0)
    for position in rng.integers(100, len(data), 30):
        copy = bytearray(data)
        copy[position] ^= 1 << rng.integers(8)
        with pytest.raises(AudioError):
            load_audio(copy)


def test_empty_files_and_streams_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"")
    for source, name in ((path, "a.wav"), (b"", "bytes of length 0"), (io.BytesIO(), "BytesIO object")):
        with pytest.raises(AudioError, match=f"{name} is empty"):
            load_audio(source)
    path.write_bytes(encoded(tone()))
    with path.open("rb") as closed:
        assert len(load_audio(closed)) == RATE
    for source in (closed, io.BytesIO(path.read_bytes())):
        source.close()
        with pytest.raises(AudioError, match="is closed"):
            load_audio(source)
    for text in (io.StringIO("RIFF"), path.open(encoding="latin-1")):
        with text, pytest.raises(AudioError, match='is open as text; open it with mode "rb"'):
            load_audio(text)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(AudioError, match=f"{tmp_path}/none.wav does not exist.*check the path"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(AudioError, match=f"{tmp_path} is a directory; give the path"):
        load_audio(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0, np.float32), r"array of shape \(0,\) has no samples"),
        (np.zeros((2, 0), np.float32), r"array of shape \(2, 0\) has no samples"),
        ([], "list of length 0 has no samples"),
        (np.array([0.0, np.inf]), r"array of shape \(2,\) holds NaN or infinite"),
        (np.full((2, 50), np.nan), r"array of shape \(2, 50\) holds NaN or infinite"),
        (np.zeros((2, 3, 4)), r"array of shape \(2, 3, 4\) has 3 dimensions; give \(samples,\)"),
        (np.float32(1) * np.zeros(()), r"not audio|0 dimensions"),
        (np.zeros(5, np.int64), r"array of shape \(5,\) has dtype int64; give floats"),
        (np.zeros(5, bool), "dtype bool; give"),
        (np.zeros(5, complex), "dtype complex128; give"),
        (["a", "b"], "list of length 2 has dtype <U1; give"),
        ([[0.0, 1.0], [0.0]], "list of length 2 is not one list of numbers"),
        (None, "NoneType object is not audio; give a path"),
        (object(), "object object is not audio; give a path"),
        ({"array": np.zeros(5)}, r"sampling_rate of array of shape \(5,\) is None; give"),
        ({"array": np.zeros(5), "sampling_rate": 0}, "sampling_rate of .* is 0; give"),
        ({"raw": np.zeros(5), "sampling_rate": -1}, "sampling_rate of .* is -1; give"),
        ({"raw": np.zeros(5), "sampling_rate": "16k"}, "sampling_rate of .* is '16k'; give"),
        ({"array": np.zeros((2, 3, 4)), "sampling_rate": 8000, "path": "x.wav"}, "x.wav has 3 dimensions"),
        ({"text": "hello"}, r"dict with keys \['text'\] holds no audio; give"),
        ("http://127.0.0.1:9/a.wav", "http://127.0.0.1:9/a.wav could not be fetched.*check the address"),
    ],
)
def test_bad_arrays_and_sources_are_named(source, message):
    with pytest.raises(AudioError, match=message):
        load_audio(source)
