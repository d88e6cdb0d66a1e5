"""The evaluation engine: killed runs, several processes, broken clips; and the scripts around it from end to end."""

import csv
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from accelerate import PartialState
from conftest import noise

from salmonn_hf.evaluation.clips import Clip, annotation_clips, parquet_clips
from salmonn_hf.evaluation.engine import plan_batches, predict
from salmonn_hf.evaluation.results import read_lines, write_result
from salmonn_hf.evaluation.scoring import breakdowns, duration_part, score_answers, score_transcripts

EVAL = Path(__file__).resolve().parents[2] / "eval"
FORK = multiprocessing.get_context("fork")


def flac(waveform):
    file = io.BytesIO()
    soundfile.write(file, waveform, 16000, format="FLAC")
    return file.getvalue()


def test_nothing_empty_is_left_where_the_model_cannot_be_loaded(tmp_path):
    def make_model():
        raise OSError("no such checkpoint")

    with pytest.raises(OSError, match="no such checkpoint"):
        predict(clips_of([0.5]), make_model, tmp_path / "out", {"task": "asr"}, 1)
    assert [file for file in tmp_path.rglob("*") if file.is_file() and not file.stat().st_size] == []


def clips_of(seconds):
    texts = ["a dog", "barks", "in the yard", "", "all night"]
    files = [b"no audio" if length is None else flac(noise(length, row)) for row, length in enumerate(seconds)]
    return [
        Clip(
            id=f"clip-{row}",
            row=lambda file=file: {"audio": {"bytes": file, "path": None}},
            references=[texts[row % 5]],
            groups={"source": "ab"[row % 2]},
        )
        for row, file in enumerate(files)
    ]


class Listener:
    """Stands for a model: tells a clip's length in words. Its process is killed in its `dies_at`-th batch."""

    max_seconds = 2.0
    device, dtype = "cpu", "none"

    def __init__(self, dies_at=None):
        self.dies_at = dies_at
        self.batches = []

    def __call__(self, waveforms, prompts):
        self.batches.append([len(waveform) for waveform in waveforms])
        if len(self.batches) == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return [f"{len(waveform)} samples" for waveform in waveforms]


SECONDS = [0.5, 1.0, None, 0.3, 2.5, 0.7, 0.9, 1.1, 0.2, 0.4, 0.6]


def evaluate(output, model, clips=None):
    predictions = predict(clips or clips_of(SECONDS), lambda: model, output, {"model": "listener"}, batch_size=2)
    if predictions is not None:
        write_result(output, predictions, *score_transcripts(predictions))
    return predictions


def files(output):
    names = ("run.json", "predictions.jsonl", "scores.jsonl", "result.json")
    return {name: (output / name).read_bytes() for name in names}


def test_killed_three_times_gives_the_files_of_one_left_alone(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate(whole, Listener())
    done = []
    for dies_at in (1, 2, 3):
        process = FORK.Process(target=evaluate, args=(broken, Listener(dies_at)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        part = broken / "parts" / "0.jsonl"
        done.append(len(read_lines(part)))
        with part.open("a") as file:  # a kill in the midst of writing leaves half a line
            file.write('{"row": 3, "hypothesis": "cut o')
    assert done == [0, 2, 6]  # what a kill interrupts is redone, what was written is not
    last = Listener()
    evaluate(broken, last)
    assert len(last.batches) == 2  # the sixth batch is the broken clip alone, of which nothing can be heard
    assert files(broken) == files(whole)
    assert not (broken / "parts").exists()
    again = Listener()
    evaluate(broken, again)
    assert again.batches == []


def test_a_batch_that_was_written_in_part_is_completed(tmp_path):
    evaluate(tmp_path / "whole", Listener())
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    lines = (tmp_path / "part" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part" / "predictions.jsonl").unlink()
    (tmp_path / "part" / "parts").mkdir()
    (tmp_path / "part" / "parts" / "3.jsonl").write_text(lines[4] + lines[0] + lines[9])  # of four processes once
    evaluate(tmp_path / "part", Listener())
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def rank(index, world, port, output):
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    PartialState._reset_state()
    listener = Listener()
    predictions = evaluate(output, listener)
    assert (predictions is not None) == (index == 0)
    (output / f"rank-{index}").write_text(f"{PartialState().num_processes} {len(listener.batches)}")
    PartialState().destroy_process_group()


def test_two_processes_share_the_clips_and_give_the_files_of_one(tmp_path):
    evaluate(tmp_path / "one", Listener())
    (tmp_path / "two").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORK.Process(target=rank, args=(index, 2, port, tmp_path / "two")) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    assert [(tmp_path / "two" / f"rank-{index}").read_text() for index in range(2)] == ["2 3", "2 2"]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_batches_hold_clips_of_like_length_and_the_longest_come_first():
    batches = plan_batches(clips_of(SECONDS), 4)
    assert batches == [[4, 7, 1, 6], [5, 10, 0, 9], [3, 8, 2]]
    assert clips_of([1.5])[0].header_seconds() == 1.5


def test_a_broken_clip_is_counted_and_named(tmp_path, capsys):
    predictions = evaluate(tmp_path, Listener())
    assert [line["id"] for line in predictions] == [f"clip-{row}" for row in range(11)]
    assert "error" in predictions[2] and predictions[2]["hypothesis"] == ""
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["clips"] == 11
    assert [name.split(":")[0] for name in result["broken_clips"]] == ["clip-2"]
    assert "broken clip, clip-2:" in capsys.readouterr().err
    # Its three words are deletions; it was not left out.
    assert read_lines(tmp_path / "scores.jsonl")[2]["deletions"] == 3


def test_a_clip_longer_than_the_models_input_is_named(tmp_path, capsys):
    predictions = evaluate(tmp_path, Listener())
    assert predictions[4]["hypothesis"] == "32000 samples"
    assert (predictions[4]["seconds"], predictions[4]["truncated_to"]) == (2.5, 2.0)
    assert json.loads((tmp_path / "result.json").read_text())["cut_clips"] == ["clip-4: 2.0 of 2.5 s"]
    assert "clip longer than the model's input, clip-4" in capsys.readouterr().err


def test_refuses_to_go_on_with_other_settings(tmp_path):
    evaluate(tmp_path, Listener())
    with pytest.raises(ValueError, match="model 'listener'; this one has 'another'"):
        predict(clips_of(SECONDS), Listener, tmp_path, {"model": "another"}, batch_size=2)
    with pytest.raises(ValueError, match="batch_size 2; this one has 3"):
        predict(clips_of(SECONDS), Listener, tmp_path, {"model": "listener"}, batch_size=3)
    with pytest.raises(ValueError, match="data_digest"):
        predict(clips_of(SECONDS)[::-1], Listener, tmp_path, {"model": "listener"}, batch_size=2)


def test_a_run_whose_model_cannot_be_loaded_stands_in_no_others_way(tmp_path):
    def missing():
        raise OSError("no such model")

    with pytest.raises(OSError):
        predict(clips_of(SECONDS), missing, tmp_path, {"model": "mistyped"}, batch_size=2)
    assert len(evaluate(tmp_path, Listener())) == len(SECONDS)
    with pytest.raises(ValueError, match="model 'listener'; this one has 'mistyped'"):
        predict(clips_of(SECONDS), missing, tmp_path, {"model": "mistyped"}, batch_size=2)


# Scores


def prediction(reference, hypothesis, seconds=1.0, **groups):
    return {"references": [reference], "hypothesis": hypothesis, "seconds": seconds, "groups": groups}


def test_breakdown_by_hand():
    predictions = [
        prediction("a b c d", "a b c d", 0.5, speaker="x", source="s"),
        prediction("e f", "e g", 1.5, speaker="x", source="s"),
        prediction("h i", "", 1.0, source="s"),
    ]
    result, scores = score_transcripts(predictions)
    parts = result["breakdowns"]["wer"]
    assert [(p["part"], p["clips"], p["value"]) for p in parts["duration"]] == [("0-1 s", 1, 0.0), ("1-2 s", 2, 0.75)]
    assert [(p["part"], p["clips"], p["value"]) for p in parts["speaker"]] == [("", 1, 1.0), ("x", 2, 1 / 6)]
    assert "source" not in parts  # all clips share it
    assert result["metrics"]["wer"]["value"] == pytest.approx(3 / 8)
    assert [score["wer"] for score in scores] == [0, 0.5, 1]
    assert [duration_part(seconds) for seconds in (0.0, 0.99, 1, 4.9, 29.9, 30)] == [
        "0-1 s", "0-1 s", "1-2 s", "2-5 s", "20-30 s", "30 s and more",
    ]  # fmt: skip


def test_every_clip_is_in_one_part_of_each_breakdown():
    rng = np.random.default_rng(0)
    predictions = [prediction("a", "a", s, label=str(s)[:3]) for s in rng.uniform(0, 40, 50)]
    for parts in breakdowns(predictions, lambda rows: {"rows": rows}).values():
        assert sorted(row for part in parts for row in part["rows"]) == list(range(50))


def test_accuracy_by_question():
    predictions = [
        prediction("yes", "Yes.") | {"prompt": "Is anyone speaking?"},
        prediction("no", "yes") | {"prompt": "Is anyone speaking?"},
        prediction("dog", "A dog") | {"prompt": "Which animal?"},
    ]
    result, scores = score_answers(predictions)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    parts = result["breakdowns"]["accuracy"]["question"]
    assert [(part["part"], part["value"]) for part in parts] == [("Is anyone speaking?", 0.5), ("Which animal?", 1.0)]
    assert [score["correct"] for score in scores] == [True, False, True]


# The scripts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A Parquet file for all tasks, with a clip that is none."""
    import pyarrow
    import pyarrow.parquet

    waveforms = [noise(seconds, row) for row, seconds in enumerate((0.4, 0.8, 0.6, 0.5))]
    audio = [{"bytes": flac(waveform), "path": f"{row}.flac"} for row, waveform in enumerate(waveforms)]
    audio[2]["bytes"] = audio[2]["bytes"][:50]
    columns = {
        "audio": audio,
        "text": ["one", "two words", "three words here", None],
        "captions": [["A dog barks", "Barking"], ["Rain"], ["Wind", "A storm"], ["A bell rings"]],
        "question": ["Which?", "Is it loud?", "Which?", "Is it loud?"],
        "answers": [["dog"], ["yes"], ["wind"], ["no"]],
        "clip_id": ["a", "b", "c", "d"],
        "label": ["dog", "rain", "wind", "bell"],
    }
    file = tmp_path_factory.mktemp("data") / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file, waveforms


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EVAL / script), run_name="__main__")


def test_run_asr(data, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from salmonn_hf.inference import Transcriber

    file, waveforms = data
    shared = ("--model", tiny_checkpoint, "--data", file, "--device", "cpu", "--dtype", "float32")
    run("run_asr.py", monkeypatch, *shared, "--output", tmp_path, "--batch_size", 2)
    predictions = read_lines(tmp_path / "predictions.jsonl")
    transcriber = Transcriber(str(tiny_checkpoint), "float32", "cpu")
    for row in (0, 1, 3):
        assert predictions[row]["hypothesis"] == transcriber([waveforms[row]])[0]
    assert [line["id"] for line in predictions] == ["a", "b", "c", "d"]
    assert predictions[3]["references"] == [""]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["clips"], len(result["broken_clips"])) == (4, 1)
    assert result["metrics"]["wer"]["words"] == 6
    assert result["settings"]["model"] == str(tiny_checkpoint)
    assert json.loads((tmp_path / "speed.json").read_text())["processes"] == 1
    assert "WER" in capsys.readouterr().out


def test_run_asr_measures_other_models_too(data, tmp_path, monkeypatch):
    from test_pipeline_salmonn import tiny_wav2vec2, tiny_whisper

    for name, make in (("whisper", tiny_whisper), ("wav2vec2", tiny_wav2vec2)):
        torch.manual_seed(0)
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    shared = ("--model", tmp_path / "whisper", "--data", data[0], "--device", "cpu", "--output", tmp_path / "out")
    run("run_asr.py", monkeypatch, *shared, "--peers", tmp_path / "wav2vec2")
    for name, output in (("whisper", tmp_path / "out"), ("wav2vec2", tmp_path / "out" / "peers" / "wav2vec2")):
        result = json.loads((output / "result.json").read_text())
        assert result["settings"]["model"] == str(tmp_path / name)
        assert (result["clips"], len(result["broken_clips"])) == (4, 1)


def test_run_aac(data, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycocoevalcap", reason="caption metrics need pycocoevalcap: pip install -e .[captions]")
    from salmonn_hf.evaluation import caption_metrics

    # Java takes longer to start than all the rest; test_caption_metrics.py has it.
    monkeypatch.setattr(caption_metrics, "require_java", lambda: None)
    monkeypatch.setattr(caption_metrics, "tokenise", lambda captions: [list(texts) for texts in captions])
    score = caption_metrics.CaptionScore(0.1, 0.0, 0.2, np.zeros(4))
    monkeypatch.setattr(caption_metrics, "meteor", lambda references, hypotheses: score)
    shared = ("--model", tiny_checkpoint, "--data", data[0], "--device", "cpu", "--note", "made-up captions")
    run("run_aac.py", monkeypatch, *shared, "--output", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"CIDEr-D", "METEOR", "ROUGE-L", "BLEU-4"} <= result["metrics"].keys()
    assert not {"SPICE", "SPIDEr"} & result["metrics"].keys()
    assert "stanford-corenlp" in result["not_computed"]["SPICE, SPIDEr"]
    assert {part["part"] for part in result["breakdowns"]["CIDEr-D"]["label"]} == {"dog", "rain", "wind", "bell"}
    assert len(result["broken_clips"]) == 1
    out = capsys.readouterr().out
    assert "not computed, SPICE" in out and "made-up captions" in out


def test_caption_baselines(data, tiny_checkpoint):
    from salmonn_hf.evaluation.caption_baselines import MostFrequentCaption, NearestCaption
    from salmonn_hf.inference import Answerer

    train = clips_of([0.5, 1.0, None, 0.3])
    for clip, captions in zip(train, (["rain", "wind"], ["a dog", "wind"], ["wind"], ["a bell"]), strict=True):
        clip.references = captions
    assert MostFrequentCaption(train)([noise(1), noise(2)], ["", ""]) == ["wind", "wind"]
    nearest = NearestCaption(train, Answerer(str(tiny_checkpoint), "float32", "cpu"), batch_size=2)
    # A training clip is nearest to itself, whatever is beside it in its batch; the broken one is left out.
    assert nearest([noise(1.0, 1), noise(0.3, 3), noise(0.5, 0)], [""] * 3) == ["a dog", "a bell", "rain"]
    assert len(nearest.captions) == 3


def test_run_qa(data, tiny_checkpoint, tmp_path, monkeypatch):
    from salmonn_hf.evaluation.answer_metrics import normalise_answer

    shared = ("--model", tiny_checkpoint, "--data", data[0], "--device", "cpu")
    run("run_qa.py", monkeypatch, *shared, "--output", tmp_path)
    predictions = read_lines(tmp_path / "predictions.jsonl")
    assert [line["prompt"] for line in predictions] == ["Which?", "Is it loud?", "Which?", "Is it loud?"]
    right = [normalise_answer(line["hypothesis"]) in line["references"] for line in predictions]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["accuracy"]["value"] == np.mean(right)


def test_run_qa_prints_kinds_of_questions_rather_than_each(data, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    shared = ("--model", tiny_checkpoint, "--device", "cpu")
    run("run_qa.py", monkeypatch, *shared, "--data", data[0], "--output", tmp_path / "out")
    assert "Is it loud?" in capsys.readouterr().out
    table = pq.read_table(data[0])
    table = table.append_column("kind", [["which", "loud"] * (len(table) // 2)])
    pq.write_table(table, tmp_path / "kinds.parquet")
    run("run_qa.py", monkeypatch, *shared, "--data", tmp_path / "kinds.parquet", "--output", tmp_path / "kinds")
    printed = capsys.readouterr().out
    assert "of    2  which" in printed and "of    2  loud" in printed and "Is it loud?" not in printed


def annotated(tmp_path, entries):
    for row in range(3):
        soundfile.write(tmp_path / f"{row}.wav", noise(0.4 + row / 5, row), 16000)
    (tmp_path / "test.json").write_text(json.dumps({"annotation": entries}))
    return ("--annotation", tmp_path / "test.json", "--prefix", tmp_path, "--device", "cpu")


def test_submission(tiny_checkpoint, tmp_path, monkeypatch):
    entries = [{"path": f"/{row}.wav", "task": "asr", "testset_id": f"id-{row}"} for row in (2, 0, 1)]
    entries.append({"path": "/gone.wav", "task": "asr", "testset_id": "id-9"})
    shared = ("--model", tiny_checkpoint, *annotated(tmp_path, entries), "--output", tmp_path / "out")
    run("run_submission.py", monkeypatch, "--mode", "submission_asr", *shared)
    with (tmp_path / "out" / "submission_asr.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["testset_id", "id-2", "id-0", "id-1", "id-9"]
    predictions = read_lines(tmp_path / "out" / "predictions.jsonl")
    assert [row[1] for row in rows[1:]] == [" ".join(line["hypothesis"].lower().split()) for line in predictions]
    assert rows[4][1] == "" and "id-9" in json.loads((tmp_path / "out" / "result.json").read_text())["broken_clips"][0]


def test_submission_refuses_what_it_cannot_answer(tiny_checkpoint, tmp_path, monkeypatch):
    entry = {"path": "/0.wav", "task": "asr", "testset_id": "id-0"}
    shared = ("--model", tiny_checkpoint, "--output", tmp_path / "out")
    for mode, entries, message in (
        ("submission_asr", [entry, entry], "testset_id id-0 stands at 2 clips"),
        ("valid_asr", [entry], "1 clips have no text.*id-0"),
        ("submission_aac", [entry], "task 'asr'; expected audiocaption"),
    ):
        with pytest.raises(ValueError, match=message):
            run("run_submission.py", monkeypatch, "--mode", mode, *annotated(tmp_path, entries), *shared)
    assert not (tmp_path / "out").exists()


def test_valid_mode_scores(tiny_checkpoint, tmp_path, monkeypatch):
    entries = [{"path": f"/{row}.wav", "text": "a word", "testset_id": row} for row in range(3)]
    shared = ("--model", tiny_checkpoint, *annotated(tmp_path, entries), "--output", tmp_path / "out")
    run("run_submission.py", monkeypatch, "--mode", "valid_asr", *shared)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["wer"]["words"] == 6


def test_files_without_the_columns_are_refused(data):
    with pytest.raises(ValueError, match="no column 'transcript'.*'text'"):
        parquet_clips([str(data[0])], "transcript")
    with pytest.raises(ValueError, match="no column 'query'"):
        parquet_clips([str(data[0])], "answers", question="query")


def test_annotation_prompts_by_task(tmp_path):
    entries = [{"path": "0.wav", "task": "asr", "text": "hi"}, {"path": "1.wav", "task": "QA", "Q": "?"}]
    annotated(tmp_path, entries[:1])
    (clip,) = annotation_clips(tmp_path / "test.json", str(tmp_path), {"asr": "Write."})
    assert (clip.id, clip.prompt, clip.references) == ("0", "Write.", ["hi"])
    annotated(tmp_path, entries)
    with pytest.raises(ValueError, match="entry 1 is of task 'QA'"):
        annotation_clips(tmp_path / "test.json", str(tmp_path), {"asr": "Write."})
