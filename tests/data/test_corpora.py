"""The readers on small trees in each corpus's own layout, and clips cut and joined as their rows say."""

import json

import numpy as np
import pytest
import soundfile
from conftest import noise

from salmonn_hf.data.corpora import (
    CorpusError,
    UnusableClip,
    annotation,
    audiocaps,
    clip_seconds,
    clotho,
    flac_bytes,
    gigaspeech,
    gigaspeech_text,
    librispeech,
    musicnet,
    read_clip,
    wavcaps,
)


def write(path, seconds=1.0, rate=16000, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds * rate / 16000), rate, **kwargs)
    return str(path)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


class Dropped(list):
    def __call__(self, path, reason, detail=""):
        self.append((path, reason))


# Annotation files


@pytest.fixture
def annotation_file(tmp_path):
    entries = [
        {"path": "/LibriSpeech/train-clean-100/1/2/1-2-0000.flac", "text": "two words", "task": "asr"},
        {"path": "MusicNet/a.wav", "text": "Ja.", "task": "QA", "Q": "Ist es Musik?", "language": "de"},
        {"path": "/a.wav", "text": None, "expand_wav": ["/b.wav", "c/d.wav"], "testset_id": 0},
    ]
    return write_text(tmp_path / "stage1_train.json", json.dumps({"version": 1, "annotation": entries}))


def test_annotation(annotation_file):
    rows = list(annotation(annotation_file, "/data/"))
    assert rows == [
        {
            "audio": {"bytes": None, "path": "/data/LibriSpeech/train-clean-100/1/2/1-2-0000.flac"},
            "text": "two words",
            "task": "asr",
            "question": "",
            "source": "LibriSpeech",
        },
        {
            "audio": {"bytes": None, "path": "/data/MusicNet/a.wav"},
            "text": "Ja.",
            "task": "QA",
            "question": "Ist es Musik?",
            "source": "MusicNet",
            "language": "de",
        },
        {
            "audio": {"bytes": None, "path": "/data/a.wav"},
            "text": None,
            "task": "asr",
            "question": "",
            "source": "stage1_train",
            "testset_id": 0,
            "expand_wav": ["/data/b.wav", "/data/c/d.wav"],
        },
    ]


def test_annotation_without_prefix_takes_paths_as_they_are(annotation_file):
    rows = list(annotation(annotation_file))
    assert rows[0]["audio"]["path"] == "/LibriSpeech/train-clean-100/1/2/1-2-0000.flac"
    assert rows[1]["audio"]["path"] == "MusicNet/a.wav"
    assert {row["source"] for row in rows} == {"stage1_train"}


def test_broken_annotation_entries_are_dropped_not_replaced(tmp_path):
    entries = [{"wav": "a.wav", "text": "a"}, {"path": "b.wav", "text": "b"}, "c", {"path": "d", "expand_wav": [3]}]
    path = write_text(tmp_path / "a.json", json.dumps({"annotation": entries}))
    dropped = Dropped()
    assert [row["text"] for row in annotation(path, drop=dropped)] == ["b"]
    assert dropped == [(f"{path}#{number}", "no path") for number in (0, 2, 3)]
    with pytest.raises(CorpusError, match=r"a\.json#0: no path .*'wav'"):
        list(annotation(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"a\.json does not exist; give the path"),
        ('{"annotation": [{"path": "a.wav", "text": NaN}]}', r"a\.json is not valid JSON .*NaN"),
        ('{"annotation": [{"path": "a.wav"},', r"a\.json is not valid JSON"),
        ('{"annotations": [{"path": "a.wav"}]}', r"a\.json has no items under 'annotation'"),
    ],
)
def test_annotation_file_errors(tmp_path, text, message):
    if text is not None:
        write_text(tmp_path / "a.json", text)
    with pytest.raises(CorpusError, match=message):
        list(annotation(tmp_path / "a.json", drop=Dropped()))


def test_annotation_is_read_entry_by_entry(tmp_path):
    # The file breaks off after the third entry: whoever parses it whole yields nothing.
    entries = ", ".join(json.dumps({"path": f"{n}.wav", "text": "a" * 100_000}) for n in range(3))
    path = write_text(tmp_path / "a.json", f'{{"annotation": [{entries}, ')
    rows = annotation(path)
    assert [next(rows)["audio"]["path"] for _ in range(2)] == ["0.wav", "1.wav"]


# LibriSpeech


def test_librispeech(tmp_path):
    root = tmp_path / "LibriSpeech"
    chapter = root / "train-clean-100" / "103" / "1240"
    write_text(chapter / "103-1240.trans.txt", "103-1240-0000 CHAPTER ONE MISSUS RACHEL\n103-1240-0001 IT'S\n")
    write_text(root / "dev-clean" / "84" / "121" / "84-121.trans.txt", "84-121-0000 GO\n")
    write_text(root / "README.TXT", "LibriSpeech")
    rows = list(librispeech(root, "train-clean-100"))
    assert rows[0] == {
        "audio": {"bytes": None, "path": str(chapter / "103-1240-0000.flac")},
        "text": "chapter one missus rachel",
        "task": "asr",
        "question": "",
        "source": "LibriSpeech/train-clean-100",
        "language": "en",
    }
    assert [row["text"] for row in rows] == ["chapter one missus rachel", "it's"]
    assert [row["source"] for row in librispeech(root)] == ["LibriSpeech/dev-clean"] + [
        "LibriSpeech/train-clean-100"
    ] * 2


def test_librispeech_errors(tmp_path):
    with pytest.raises(CorpusError, match="nowhere is not a directory; give"):
        list(librispeech(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match=r"test-other is not a directory; unpack test-other\.tar\.gz"):
        list(librispeech(tmp_path, "test-other"))
    (tmp_path / "test-other").mkdir()
    with pytest.raises(CorpusError, match=r"test-other holds no \{speaker\}/\{chapter\}/\*\.trans\.txt"):
        list(librispeech(tmp_path, "test-other"))


# GigaSpeech


def test_gigaspeech_text():
    assert (
        gigaspeech_text(
            "FOUR O'CLOCK TOMORROW <COMMA> SAID WILLIAMS <PERIOD> WHY <QUESTIONMARK> NO <EXCLAMATIONPOINT>"
        )
        == "four o'clock tomorrow, said williams. why? no!"
    )
    assert gigaspeech_text("<PERIOD>") == ""
    for tag in ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"):
        with pytest.raises(UnusableClip, match=f"garbage utterance .{tag}"):
            gigaspeech_text(tag)
    with pytest.raises(UnusableClip, match="unknown tag"):
        gigaspeech_text("A <SEMICOLON> B")


def segment(number, begin, end, text, subsets=("{XL}", "{L}")):
    sid = f"POD0000000025_S{number:07d}"
    return {
        "sid": sid,
        "speaker": "N/A",
        "begin_time": begin,
        "end_time": end,
        "text_tn": text,
        "subsets": list(subsets),
    }


@pytest.fixture
def gigaspeech_root(tmp_path):
    root = tmp_path / "gigaspeech"
    file = root / "audio" / "podcast" / "P0001" / "POD0000000025.opus"
    write(file, 6.0, format="OGG", subtype="OPUS")
    segments = [
        segment(0, 0.5, 1.75, "HELLO <COMMA> YOU <PERIOD>"),
        segment(1, 1.75, 2.5, "<MUSIC>"),
        segment(2, 3.25, 5.0, "SMALL", subsets=["{XL}"]),
        {"sid": "POD0000000025_S0000003", "subsets": ["{L}"], "begin_time": 5.0, "end_time": 6.0},
    ]
    audio = {
        "title": "The Architect of Hollywood",
        "url": "https://example.org/25",
        "path": "audio/podcast/P0001/POD0000000025.opus",
        "aid": "POD0000000025",
        "source": "podcast",
        "duration": 6.0,
        "format": "opus",
        "sample_rate": 16000,
        "segments": segments,
    }
    metadata = {"dataset": "GigaSpeech", "language": "EN", "version": "v1.0.0", "audios": [audio]}
    write_text(root / "GigaSpeech.json", json.dumps(metadata))
    return root


def test_gigaspeech(gigaspeech_root):
    file = str(gigaspeech_root / "audio/podcast/P0001/POD0000000025.opus")
    dropped = Dropped()
    rows = list(gigaspeech(gigaspeech_root, "L", drop=dropped))
    assert rows == [
        {
            "audio": {"bytes": None, "path": file},
            "text": "hello, you.",
            "task": "asr",
            "question": "",
            "source": "GigaSpeech/L",
            "language": "en",
            "start": 0.5,
            "end": 1.75,
            "clip_id": "POD0000000025_S0000000",
        }
    ]
    assert dropped == [
        (f"{file}#POD0000000025_S0000001", "garbage utterance"),
        (f"{file}#POD0000000025_S0000003", "incomplete entry"),
    ]
    assert [row["text"] for row in gigaspeech(gigaspeech_root, drop=Dropped())] == ["hello, you.", "small"]


def test_gigaspeech_clips_are_the_annotated_part_of_the_file(gigaspeech_root):
    row = list(gigaspeech(gigaspeech_root, drop=Dropped()))[1]
    whole, rate = soundfile.read(row["audio"]["path"], dtype="float32")
    clip = read_clip(row)
    assert len(clip) == 1.75 * 16000 == clip_seconds(row) * 16000
    # Opus decodes from a seek point, so its samples differ slightly from those of a decoding from the start.
    np.testing.assert_allclose(clip, whole[int(3.25 * rate) : int(5.0 * rate)], atol=0.02)


def test_gigaspeech_errors(tmp_path, gigaspeech_root):
    with pytest.raises(CorpusError, match=r"GigaSpeech\.json does not exist; give the directory"):
        list(gigaspeech(tmp_path))
    with pytest.raises(CorpusError, match="no subset 'XXL'; there are XS, S, M"):
        list(gigaspeech(gigaspeech_root, "XXL"))


# Captions


def test_audiocaps(tmp_path):
    lines = [
        "audiocap_id,youtube_id,start_time,caption",
        "91139,r1nicOVtvkQ,130,A woman talks nearby as water pours",
        '58146,-UDGBjjwyaqE,20,"Clanging, then clanking"',
        "2,xyz,0,Named with its start",
        "3,gone,0,Gone from YouTube",
        "4,short",
    ]
    write_text(tmp_path / "train.csv", "\n".join(lines))
    for name in ("r1nicOVtvkQ.flac", "Y-UDGBjjwyaqE.wav", "xyz_0.wav"):
        write(tmp_path / "train" / name)
    dropped = Dropped()
    rows = list(audiocaps(tmp_path, drop=dropped))
    assert rows[0] == {
        "audio": {"bytes": None, "path": str(tmp_path / "train" / "r1nicOVtvkQ.flac")},
        "text": "A woman talks nearby as water pours",
        "task": "audiocaption",
        "question": "",
        "source": "AudioCaps/train",
        "language": "en",
    }
    assert [row["text"] for row in rows[1:]] == ["Clanging, then clanking", "Named with its start"]
    assert [clip_seconds(row) for row in rows] == [1.0] * 3
    assert dropped == [
        (str(tmp_path / "train" / "gone.wav"), "missing"),
        (f"{tmp_path / 'train.csv'}#6", "incomplete entry"),
    ]


def test_audiocaps_errors(tmp_path):
    with pytest.raises(CorpusError, match=r"test\.csv does not exist; take it from https"):
        list(audiocaps(tmp_path, "test"))
    write_text(tmp_path / "dataset" / "test.csv", "audiocap_id,video,start_time,caption\n1,a,0,b\n")
    with pytest.raises(CorpusError, match="test is not a directory; put the clips"):
        list(audiocaps(tmp_path, "test"))
    (tmp_path / "test").mkdir()
    with pytest.raises(CorpusError, match=r"test\.csv has no column youtube_id; it has \['audiocap_id', 'video'"):
        list(audiocaps(tmp_path, "test"))


def test_clotho_gives_a_row_for_each_caption(tmp_path):
    lines = [
        "file_name,caption_1,caption_2,caption_3,caption_4,caption_5",
        'Distorted AM Radio noise.wav,"A static sound, muffled.",Two.,Three.,Four.,Five.',
    ]
    write_text(tmp_path / "clotho_captions_development.csv", "\n".join(lines))
    file = write(tmp_path / "development" / "Distorted AM Radio noise.wav", 2.0, rate=44100)
    rows = list(clotho(tmp_path))
    assert [row["text"] for row in rows] == ["A static sound, muffled.", "Two.", "Three.", "Four.", "Five."]
    assert all(row["audio"] == {"bytes": None, "path": file} for row in rows)
    assert {(row["task"], row["source"]) for row in rows} == {("audiocaption", "Clotho/development")}
    assert clip_seconds(rows[0]) == pytest.approx(2.0, abs=1e-3)
    with pytest.raises(CorpusError, match=r"clotho_captions_evaluation\.csv does not exist; take it from"):
        list(clotho(tmp_path, "evaluation"))


@pytest.fixture
def wavcaps_root(tmp_path):
    annotations = {
        "AudioSet_SL/as_final": [{"id": "Yb0RFKhbpFJA.wav", "caption": "Wind and a man speaking.", "duration": 10.03}],
        "BBC_Sound_Effects/bbc_final": [{"id": "NHU05093027", "caption": "Birds.", "audio": "wav_path"}],
        "FreeSound/fsd_final": [{"id": "180913", "caption": "A bell."}, {"caption": "No id."}],
        "SoundBible/sb_final": [{"title": "Airplane", "caption": "An airplane is landing.", "id": "2219"}],
    }
    for name, data in annotations.items():
        content = {"num_captions_per_audio": 1, "data": data}
        write_text(tmp_path / "json_files" / f"{name}.json", json.dumps(content))
    for name in ("AudioSet_SL", "BBC_Sound_Effects_flac", "FreeSound", "SoundBible_flac"):
        (tmp_path / name).mkdir()
    blacklist = {"AudioSet": ["Yb0RFKhbpFJA.wav"], "FreeSound": ["1"]}
    write_text(tmp_path / "json_files" / "blacklist" / "blacklist_exclude_test_ac.json", json.dumps(blacklist))
    return tmp_path


def test_wavcaps(wavcaps_root):
    dropped = Dropped()
    rows = list(wavcaps(wavcaps_root, drop=dropped))
    assert rows[0] == {
        "audio": {"bytes": None, "path": str(wavcaps_root / "AudioSet_SL" / "Yb0RFKhbpFJA.flac")},
        "text": "Wind and a man speaking.",
        "task": "audiocaption",
        "question": "",
        "source": "WavCaps/AudioSet_SL",
        "language": "en",
    }
    assert [row["audio"]["path"] for row in rows[1:]] == [
        str(wavcaps_root / name)
        for name in ("BBC_Sound_Effects_flac/NHU05093027.flac", "FreeSound/180913.flac", "SoundBible_flac/2219.flac")
    ]
    assert dropped == [(str(wavcaps_root / "json_files/FreeSound/fsd_final.json"), "incomplete entry")]


def test_wavcaps_blacklist_keeps_test_clips_out(wavcaps_root):
    dropped = Dropped()
    blacklist = wavcaps_root / "json_files" / "blacklist" / "blacklist_exclude_test_ac.json"
    assert list(wavcaps(wavcaps_root, "AudioSet_SL", blacklist, dropped)) == []
    assert dropped == [(str(wavcaps_root / "AudioSet_SL" / "Yb0RFKhbpFJA.flac"), "in the blacklist")]


def test_wavcaps_errors(wavcaps_root):
    with pytest.raises(CorpusError, match="no subset 'Freesound'; there are AudioSet_SL"):
        list(wavcaps(wavcaps_root, "Freesound"))
    (wavcaps_root / "FreeSound").rmdir()
    with pytest.raises(CorpusError, match=r"FreeSound is not a directory; unpack the archive FreeSound\.zip"):
        list(wavcaps(wavcaps_root, "FreeSound"))


# MusicNet

NOTE_COLUMNS = "start_time,end_time,instrument,note,start_beat,end_beat,note_value"


def note(on, off, instrument):
    return f"{int(on * 44100)},{int(off * 44100)},{instrument},60,0.0,1.0,Quarter"


def test_musicnet(tmp_path):
    columns = "id,composer,composition,movement,ensemble,source,transcriber,catalog_name,seconds"
    lines = [
        columns,
        "1788,Mozart,String Quartet No 19,1. Adagio,String Quartet,European Archive,misc,K465,513",
        '1727,Schubert,"Piano Quintet in A major",2. Andante,Solo Piano,European Archive,misc,OP114,447',
        "1729,Schubert,Nonet,1. Allegro,Nonet,European Archive,misc,OP1,1",
    ]
    write_text(tmp_path / "musicnet_metadata.csv", "\n".join(lines))
    quartet = [note(0.1, 0.5, 42), note(0.2, 0.9, 41), note(0.9, 1.2, 41), note(1.5, 1.9, 43), note(4.2, 4.5, 42)]
    write_text(tmp_path / "train_labels" / "1788.csv", "\n".join([NOTE_COLUMNS, *quartet]))
    write_text(tmp_path / "train_labels" / "1727.csv", "\n".join([NOTE_COLUMNS, note(0, 1.5, 1)]))
    write_text(tmp_path / "train_labels" / "1729.csv", "\n".join([NOTE_COLUMNS, note(0, 1, 57)]))
    write_text(tmp_path / "train_labels" / "9999.csv", "\n".join([NOTE_COLUMNS, note(0, 1, 1)]))
    file = write(tmp_path / "train_data" / "1788.wav", 5.0, rate=44100)
    dropped = Dropped()
    rows = list(musicnet(tmp_path, window_seconds=2.0, drop=dropped))
    piano, first, last = rows
    assert piano["text"] == "Classical music for solo piano, in which the piano can be heard."
    assert first == {
        "audio": {"bytes": None, "path": file},
        # two notes of the violin, one each of the others
        "text": "Classical music for string quartet, in which the violin, cello and viola can be heard.",
        "task": "music_description",
        "question": "",
        "source": "MusicNet/train",
        "language": "en",
        "start": 0.0,
        "end": 2.0,
        "clip_id": "1788-000",
    }
    assert last["text"] == "Classical music for string quartet, in which the viola can be heard."
    assert (last["start"], last["end"], last["clip_id"]) == (4.0, 4.5, "1788-002")
    assert dropped == [
        (str(tmp_path / "train_data" / "1729.wav"), "unknown instrument"),
        (f"{file}#2-4", "no note"),
        (str(tmp_path / "train_data" / "9999.wav"), "not in the metadata"),
    ]
    assert len(read_clip(last)) == pytest.approx(0.5 * 16000, abs=1)
    with pytest.raises(CorpusError, match="test_data is not a directory; give the directory"):
        list(musicnet(tmp_path, "test"))


# Clips


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


def test_clip_seconds_says_why_a_clip_is_of_no_use(tmp_path):
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
            clip_seconds(clip, 0.3, 2.5)
        assert error.value.reason == reason, clip
    assert clip_seconds(row(file), 1.0, 1.0) == 1.0


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
    with pytest.raises(UnusableClip, match="zero length"):
        clip_seconds(row(tmp_path / "empty.flac"))


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
