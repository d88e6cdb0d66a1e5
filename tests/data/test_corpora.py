"""The readers on small trees in each corpus's own layout."""

import json

import numpy as np
import pytest
import soundfile
from conftest import noise

from salmonn_hf.data.clip_audio import clip_seconds, read_clip
from salmonn_hf.data.corpora.annotation import read_examples as annotation
from salmonn_hf.data.corpora.audiocaps import read_examples as audiocaps
from salmonn_hf.data.corpora.clotho import read_examples as clotho
from salmonn_hf.data.corpora.gigaspeech import plain_text
from salmonn_hf.data.corpora.gigaspeech import read_examples as gigaspeech
from salmonn_hf.data.corpora.jsonl import read_examples as jsonl
from salmonn_hf.data.corpora.librispeech import read_examples as librispeech
from salmonn_hf.data.corpora.musicnet import read_examples as musicnet
from salmonn_hf.data.corpora.wavcaps import read_examples as wavcaps
from salmonn_hf.data.corpus_files import CorpusError
from salmonn_hf.data.skipped_clips import UnusableClip


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


# JSON Lines


def test_jsonl(tmp_path):
    entries = [
        {"file": "a.flac", "text": "one", "speaker": "x"},
        {"audio_filepath": "/b.wav", "text": "yes", "task": "QA", "question": "Is it?", "language": "en"},
    ]
    path = write_text(
        tmp_path / "clips.jsonl", "\n".join([json.dumps(entry) for entry in entries] + ["", "{", "3", "{}"])
    )
    dropped = Dropped()
    assert list(jsonl(path, drop=dropped)) == [
        {
            "audio": {"bytes": None, "path": str(tmp_path / "a.flac")},
            "text": "one",
            "task": "asr",
            "question": "",
            "source": "clips",
        },
        {
            "audio": {"bytes": None, "path": "/b.wav"},
            "text": "yes",
            "task": "QA",
            "question": "Is it?",
            "source": "clips",
            "language": "en",
        },
    ]
    assert dropped == [(f"{path}#{number}", "no file") for number in (4, 5, 6)]
    with pytest.raises(CorpusError, match=r"none\.jsonl does not exist; give the path"):
        list(jsonl(tmp_path / "none.jsonl"))


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
        plain_text("FOUR O'CLOCK TOMORROW <COMMA> SAID WILLIAMS <PERIOD> WHY <QUESTIONMARK> NO <EXCLAMATIONPOINT>")
        == "four o'clock tomorrow, said williams. why? no!"
    )
    assert plain_text("<PERIOD>") == ""
    for tag in ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"):
        with pytest.raises(UnusableClip, match=f"garbage utterance .{tag}"):
            plain_text(tag)
    with pytest.raises(UnusableClip, match="unknown tag"):
        plain_text("A <SEMICOLON> B")


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
