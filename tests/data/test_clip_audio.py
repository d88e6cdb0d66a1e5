"""Clips cut and joined as their rows say, their lengths, and FLAC files of them."""

import numpy as np
import pytest
import soundfile
from test_corpora import write

from salmonn_hf.data.clip_audio import checked_seconds, clip_seconds, read_clip
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.data.skipped_clips import UnusableClip


def row(path, text="a", **kwargs):
    return {"audio": {"bytes": None, "path": str(path)}, "text": text, **kwargs}


def test_expanded_clip_is_the_files_with_a_tenth_of_a_second_between(tmp_path):
    files = [write(tmp_path / f"{n}.wav", seconds) for n, seconds in enumerate((0.5, 0.25, 1.0))]
    joined = row(files[0], expand_wav=files[1:])
    silence = np.zeros(1600, np.float32)
    parts = [soundfile.read(file, dtype="float32")[0] for file in files]
    expected = np.concatenate([parts[0], silence, parts[1], silence, parts[2]])
    np.testing.assert_array_equal(read_clip(joined), expected)
    assert clip_seconds(joined) == pytest.approx(len(expected) / 16000)


def test_a_clip_that_cannot_be_used_is_refused_with_the_reason(tmp_path):
    file = write(tmp_path / "a.wav", 1.0)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    (tmp_path / "none.flac").touch()
    (tmp_path / "text.wav").write_bytes(b"not audio")
    cases = [
        (row(file, text=None), "no text"),
        (row(file, text=" \n"), "no text"),
        (row(file, text=3), "no text"),
        (row(tmp_path / "none.wav"), "missing"),
        (row(tmp_path / "text.wav"), "unreadable"),
        (row(tmp_path / "empty.wav"), "zero length"),
        (row(tmp_path / "none.flac"), "zero length"),
        (row(file, start=0.2, end=0.3), "too short"),
        (row(file, start=0.2, end=0.2), "zero length"),
        (row(file, expand_wav=[file, file]), "too long"),
        (row(file, expand_wav=[str(tmp_path / "none.wav")]), "missing"),
        (row(file, start=0.2, end=1.2), "ends after its file"),
    ]
    for clip, reason in cases:
        with pytest.raises(UnusableClip) as error:
            checked_seconds(clip, 0.3, 2.5)
        assert error.value.reason == reason, clip
    assert checked_seconds(row(file), 1.0, 1.0) == 1.0


def test_flac_without_a_length_in_its_header_is_counted(tmp_path):
    write(tmp_path / "whole.flac", 1.5)
    data = bytearray((tmp_path / "whole.flac").read_bytes())
    # STREAMINFO's number of samples, 36 bits from the middle of byte 21: 0 means unknown, as pipes leave it
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path / "streamed.flac").write_bytes(data)
    data[4] |= 0x80  # nothing after STREAMINFO, which ends at byte 42
    (tmp_path / "empty.flac").write_bytes(data[:42])
    assert soundfile.info(tmp_path / "streamed.flac").frames > 10**12
    assert clip_seconds(row(tmp_path / "streamed.flac")) == 1.5
    assert clip_seconds({"audio": {"bytes": (tmp_path / "streamed.flac").read_bytes()}}) == 1.5
    with pytest.raises(UnusableClip, match="zero length"):
        checked_seconds(row(tmp_path / "empty.flac"))


def test_length_comes_from_the_header_and_damage_from_decoding(tmp_path):
    whole = (tmp_path / "a.flac", tmp_path / "cut.flac")
    write(whole[0], 2.0)
    data = whole[0].read_bytes()
    whole[1].write_bytes(data[: len(data) // 2])
    assert clip_seconds(row(whole[1])) == 2.0
    with pytest.raises(UnusableClip, match="damaged"):
        read_clip(row(whole[1]))
    with pytest.raises(UnusableClip, match="damaged"):
        read_clip(row(whole[1], start=1.5, end=2.0))


def test_flac_of_16_bit_audio_is_lossless(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 16000).astype(np.int16)
    samples[:4] = [-32768, 32767, 0, -1]
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    (tmp_path / "a.flac").write_bytes(flac_bytes(read_clip(row(tmp_path / "a.wav"))))
    copy, rate = soundfile.read(tmp_path / "a.flac", dtype="int16")
    assert rate == 16000
    np.testing.assert_array_equal(copy, samples)
    # louder than full scale is clipped, not wrapped round
    (tmp_path / "b.flac").write_bytes(flac_bytes(np.array([2.0, -2.0, 0.5], np.float32)))
    np.testing.assert_array_equal(soundfile.read(tmp_path / "b.flac", dtype="int16")[0], [32767, -32768, 16384])


def test_a_clip_of_joined_files_is_as_long_as_all_of_them(tmp_path):
    """No transcript of the whole beside samples of the first part."""
    for form, kind in (("wav", {}), ("mp3", {}), ("ogg", {"subtype": "OPUS"})):
        file = tmp_path / f"a.{form}"
        soundfile.write(file, np.random.default_rng(0).standard_normal(16000) * 0.1, 16000, **kind)
        file.write_bytes(file.read_bytes() * 3)
        assert clip_seconds(row(file)) == pytest.approx(3.0, abs=0.001)
        assert clip_seconds({"audio": {"bytes": file.read_bytes()}}) == pytest.approx(3.0, abs=0.001)
        whole = read_clip(row(file))
        assert len(whole) == pytest.approx(48000, abs=10)
        part = row(file, start=1.5, end=2.75)
        assert clip_seconds(part) == 1.25
        np.testing.assert_allclose(read_clip(part), whole[24000:44000], atol=1e-6)


def test_a_clip_whose_header_tells_less_is_refused_or_read_whole(tmp_path):
    file = write(tmp_path / "a.wav", 2.0)
    data = (tmp_path / "a.wav").read_bytes()
    at = data.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(data[:at] + bytes(4) + data[at + 4 :])
    assert clip_seconds(row(file)) == 2.0 and len(read_clip(row(file))) == 32000
    assert len(read_clip(row(file, start=1.0, end=2.0))) == 16000
    for broken in (data[:at] + (1000).to_bytes(4, "little") + data[at + 4 :], data[:-1000]):
        (tmp_path / "b.wav").write_bytes(broken)
        for clip in (row(tmp_path / "b.wav"), {"audio": {"bytes": broken, "path": None}, "text": "a"}):
            with pytest.raises(UnusableClip, match="unreadable"):
                checked_seconds(clip)
            with pytest.raises(UnusableClip, match="damaged"):
                read_clip(clip)


def test_a_part_of_a_file_is_mixed_down_as_the_whole_is(tmp_path):
    samples = np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.wav", np.stack([samples, -samples], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_clip(row(tmp_path / "a.wav", start=0.5, end=1.5)), samples[8000:24000])
