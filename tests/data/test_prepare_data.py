"""The index that prepare_data.py writes: its rows, its report, what it drops, and what an interruption leaves."""

import csv
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import noise

from salmonn_hf.data.clip_parquet import parquet_rows
from salmonn_hf.data.clip_table import ClipTable
from salmonn_hf.data.corpus_files import CorpusError
from salmonn_hf.data.sources import Source
from salmonn_hf.model.audio import load_audio

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "training" / "prepare_data.py"))
main, prepare, PrepareArguments = SCRIPT["main"], SCRIPT["prepare"], SCRIPT["PrepareArguments"]


def write(path, seconds=1.0, rate=16000, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds * rate / 16000), rate, **kwargs)
    return str(path)


def write_annotation(path, entries):
    path.write_text(json.dumps({"annotation": entries}))
    return str(path)


@pytest.fixture
def librispeech(tmp_path):
    root = tmp_path / "LibriSpeech"
    chapter = root / "dev-clean" / "84" / "121"
    seconds = {"84-121-0000": 1.0, "84-121-0001": 2.5, "84-121-0002": 0.2, "84-121-0003": 0.0, "84-121-0004": 4.0}
    for utterance, length in seconds.items():
        write(chapter / f"{utterance}.flac", length)
    (chapter / "84-121-0005.flac").write_bytes(b"not audio")
    texts = ["GO ON", "GO ON GO", "SHORT", "EMPTY", "LONG", "UNREADABLE", "MISSING", ""]
    lines = [f"84-121-{number:04d} {text}" for number, text in enumerate(texts)]
    (chapter / "84-121.trans.txt").write_text("\n".join(lines) + "\n")
    return root


def test_index_loads_for_training_and_the_report_says_what_is_in_it(librispeech, tmp_path, capsys):
    output = tmp_path / "new" / "libri.parquet"
    main(["librispeech", str(librispeech), "--split", "dev-clean", "--output", str(output), "--max_seconds", "3"])
    assert "2 clips" in capsys.readouterr().out
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "libri.dropped.tsv",
        "libri.md",
        "libri.parquet",
        "libri.png",
    ]

    speech = parquet_rows([str(output)], "text")
    assert speech["text"][:] == ["go on", "go on go"]
    chapter = librispeech / "dev-clean" / "84" / "121"
    assert speech[0]["audio"] == {"bytes": None, "path": str(chapter / "84-121-0000.flac")}
    assert len(load_audio(speech[1]["audio"])) == 2.5 * 16000
    rows = pq.read_table(output).to_pylist()
    assert {(r["task"], r["question"], r["source"], r["language"], r["testset_id"]) for r in rows} == {
        ("asr", "", "LibriSpeech/dev-clean", "en", None)
    }
    assert [r["seconds"] for r in rows] == [1.0, 2.5]

    with open(output.with_suffix(".dropped.tsv"), newline="") as file:
        dropped = [(Path(line["path"]).name, line["reason"]) for line in csv.DictReader(file, delimiter="\t")]
    assert dropped == [
        ("84-121-0002.flac", "too short"),
        ("84-121-0003.flac", "zero length"),
        ("84-121-0004.flac", "too long"),
        ("84-121-0005.flac", "unreadable"),
        ("84-121-0006.flac", "missing"),
        ("84-121-0007.flac", "no text"),
    ]

    page = output.with_suffix(".md").read_text()
    assert "2 clips, 0.00 hours; 6 dropped." in page
    assert "| asr | 2 | 0.00 |" in page and "| LibriSpeech/dev-clean | 2 |" in page and "| en | 2 |" in page
    assert "| 1.75 | 1.00 |" in page  # mean and shortest
    assert "5 words, 2.5 a clip; 2 different, 0 of them once." in page and "go (3), on (2)" in page
    assert f"| missing | 1 | `{chapter / '84-121-0006.flac'}` |" in page
    assert "libri.png" in page and "python training/prepare_data.py librispeech" in page
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_annotation_with_tasks_joined_clips_and_flac(tmp_path):
    write(tmp_path / "audio" / "a.wav", 1.0)
    write(tmp_path / "audio" / "b.wav", 0.5, rate=44100)
    ready = write(tmp_path / "audio" / "c.flac", 0.75)
    entries = [
        {"path": "/a.wav", "text": "first", "expand_wav": ["/b.wav"]},
        {"path": "b.wav", "text": "Wind.", "task": "audiocaption", "testset_id": 7},
        {"path": "c.flac", "text": "yes", "task": "QA", "Q": "Is it?"},
        {"path": "a.wav", "text": "alone"},
        {"text": "nowhere"},
    ]
    annotation = write_annotation(tmp_path / "a.json", entries)
    command = ["annotation", annotation, "--prefix", str(tmp_path / "audio"), "--output", str(tmp_path / "x.parquet")]

    with pytest.raises(CorpusError, match=r"a\.wav holds more or less than one clip.*--flac"):
        main(command)
    assert not list(tmp_path.glob("x.*")) and not list(tmp_path.glob(".partial*"))

    main([*command, "--flac", str(tmp_path / "clips")])
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [r["text"] for r in rows] == ["first", "Wind.", "yes", "alone"]
    assert [(r["task"], r["question"], r["testset_id"]) for r in rows[1:3]] == [
        ("audiocaption", "", "7"),
        ("QA", "Is it?", None),
    ]
    assert rows[2]["audio"]["path"] == ready  # already 16 kHz mono FLAC
    written = [rows[n]["audio"]["path"] for n in (0, 1, 3)]
    assert len(set(written)) == 3 and all(Path(p).is_relative_to(tmp_path / "clips") for p in written)
    for r in rows:
        info = soundfile.info(r["audio"]["path"])
        assert (info.format, info.samplerate, info.channels) == ("FLAC", 16000, 1)
        assert info.duration == pytest.approx(r["seconds"], abs=1e-3)
    assert rows[0]["seconds"] == pytest.approx(1.6)
    np.testing.assert_array_equal(load_audio(written[2]), load_audio(tmp_path / "audio" / "a.wav"))
    assert "no path" in (tmp_path / "x.md").read_text()

    ages = [Path(p).stat().st_mtime_ns for p in written]
    main([*command, "--flac", str(tmp_path / "clips")])
    assert [Path(p).stat().st_mtime_ns for p in written] == ages  # not written again
    write(tmp_path / "audio" / "a.wav", 2.0)
    main([*command, "--flac", str(tmp_path / "clips")])
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert soundfile.info(rows[3]["audio"]["path"]).duration == rows[3]["seconds"] == 2.0  # the new recording


def test_the_recordings_of_a_clone_become_training_data(tmp_path):
    recordings = Path(__file__).resolve().parents[2] / "eval" / "recordings" / "recordings.jsonl"
    main(["jsonl", str(recordings), "--output", str(tmp_path / "recordings.parquet")])
    table = ClipTable(Source(str(tmp_path / "recordings.parquet")))
    lines = [json.loads(line) for line in recordings.read_text().splitlines()]
    assert [row["text"] for row in map(table.__getitem__, range(len(table)))] == [line["text"] for line in lines]
    assert table.seconds.tolist() == pytest.approx([line["seconds"] for line in lines], abs=0.01)


def test_embedded_parts_of_long_files(tmp_path):
    (tmp_path / "train_labels").mkdir()
    (tmp_path / "musicnet_metadata.csv").write_text("id,composer,ensemble\n1,Bach,Solo Cello\n")
    lines = ["start_time,end_time,instrument,note,start_beat,end_beat,note_value", f"0,{44100 * 31},43,60,0,1,Half"]
    (tmp_path / "train_labels" / "1.csv").write_text("\n".join(lines))
    file = write(tmp_path / "train_data" / "1.wav", 31.5, rate=44100)
    output = tmp_path / "music.parquet"
    main(["musicnet", str(tmp_path), "--output", str(output), "--embed"])
    speech = parquet_rows([str(output)], "text")
    assert speech["text"][:] == ["Classical music for solo cello, in which the cello can be heard."] * 2
    clips = [load_audio(row["audio"]) for row in speech]
    assert [len(clip) for clip in clips] == [30 * 16000, 16000]
    assert speech[1]["audio"]["path"] == "1-001.flac"
    # The same second of the whole recording; its edges differ by the resampling filter.
    np.testing.assert_allclose(clips[1][400:-400], load_audio(file)[480_400:495_600], atol=1e-3)


def test_a_clip_written_by_flac_can_be_read_by_others(tmp_path):
    annotation = write_annotation(tmp_path / "a.json", [{"path": write(tmp_path / "a.wav"), "text": "a"}])
    main(["annotation", annotation, "--output", str(tmp_path / "x.parquet"), "--flac", str(tmp_path / "clips")])
    (clip,) = (path for path in (tmp_path / "clips").rglob("*") if path.is_file())  # and no temporary file
    (tmp_path / "ordinary").touch()
    for path in (clip, tmp_path / "x.parquet", tmp_path / "x.md", tmp_path / "x.png"):
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_damaged_clips_are_dropped_when_they_are_decoded(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.flac", 2.0, rate=8000)
    data = (tmp_path / "b.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(data[: len(data) // 2])
    entries = [{"path": f"{name}.flac", "text": name} for name in ("a", "b", "c")]
    annotation = write_annotation(tmp_path / "a.json", entries)
    output = tmp_path / "x.parquet"
    main(["annotation", annotation, "--prefix", str(tmp_path), "--output", str(output), "--embed"])
    assert parquet_rows([str(output)], "text")["text"][:] == ["a", "c"]
    assert f"{tmp_path / 'b.flac'}\tdamaged\t" in output.with_suffix(".dropped.tsv").read_text()


def test_errors_name_the_path_and_leave_nothing(librispeech, tmp_path, capsys):
    output = tmp_path / "x.parquet"
    arguments = ["--output", str(output)]
    with pytest.raises(CorpusError, match=r"none\.json does not exist; give the path"):
        main(["annotation", str(tmp_path / "none.json"), *arguments])
    annotation = write_annotation(
        tmp_path / "a.json", [{"path": "a.wav", "text": "a"}, {"path": "b.wav", "text": "b"}]
    )
    with pytest.raises(CorpusError, match=r"no usable clip: 2 missing \(first /wrong/a\.wav\)"):
        main(["annotation", annotation, "--prefix", "/wrong", *arguments])
    with pytest.raises(CorpusError, match="librispeech has no --prefix"):
        main(["librispeech", str(librispeech), "--prefix", "x", *arguments])
    with pytest.raises(SystemExit):
        main(["librispeech", str(librispeech), "--output", str(tmp_path / "x.csv")])
    assert "must end in .parquet" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*")) and not list(tmp_path.glob(".partial*"))


def test_an_interrupted_run_leaves_the_last_index(librispeech, tmp_path, monkeypatch):
    command = ["librispeech", str(librispeech), "--output", str(tmp_path / "x.parquet")]
    main(command)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("x.*")}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(prepare.__globals__, "plot", interrupt)  # after the Parquet file is whole
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--min_seconds", "2"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("x.*")} == before
    assert not list(tmp_path.glob(".partial*"))


def resident_peak_megabytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset by Linux' clear_refs")
def test_memory_does_not_grow_with_the_annotation(tmp_path):
    files = [Path(write(tmp_path / f"{n}.wav", 0.5 + 0.1 * n)).name for n in range(8)]

    def index(count):
        path = tmp_path / f"{count}.json"
        with open(path, "w") as file:
            file.write('{"annotation": [')
            for number in range(count):
                text = " ".join(f"word{(number * 7 + n) % 5000}" for n in range(12))
                entry = {"path": f"/{files[number % 8]}", "text": text, "task": "asr", "Q": ""}
                file.write((", " if number else "") + json.dumps(entry))
            file.write("]}")
        arguments = PrepareArguments(output=str(path.with_suffix(".parquet")), prefix=str(tmp_path))
        prepare("annotation", str(path), arguments)
        return pq.ParquetFile(arguments.output).metadata

    def growth(count):
        """Megabytes that the peak lies above what the process held before."""
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = resident_peak_megabytes()
        metadata = index(count)
        return metadata, resident_peak_megabytes() - before

    index(50_000)  # imports, Arrow's and malloc's pools
    _, small = growth(50_000)
    metadata, large = growth(200_000)
    print(f"peak growth: {small:.0f} MB for 50 000 rows, {large:.0f} MB for 200 000")
    assert (metadata.num_rows, metadata.num_row_groups) == (200_000, 10)
    # 150 000 more rows as Python objects would be over 150 MB.
    assert large < small + 40
