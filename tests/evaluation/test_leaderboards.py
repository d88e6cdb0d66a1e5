"""
The adapters in `eval/leaderboard`: by the contract of what they adapt to, and with the real things where they are
here: lmms-eval if it is installed, the Open ASR Leaderboard's script if `OPEN_ASR_LEADERBOARD` names a clone.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow
import pytest
import soundfile
import torch
from conftest import ROOT, noise
from pyarrow import parquet

import salmonn_hf
from salmonn_hf.inference import Answerer, Transcriber

LEADERBOARD = ROOT / "eval" / "leaderboard"
TEXTS = ["a cat sat", "on a mat"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    for number in range(2):
        soundfile.write(directory / f"{number}.flac", noise(1.0 + number, number), 16000)
    return sorted(directory.glob("*.flac"))


def run(script, *arguments, cwd, **environment):
    inherited = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, LEADERBOARD / script, *map(str, arguments)],
        cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# The Open ASR Leaderboard

# What its script does with a model, a data set and the machine, in few lines.
STAND_IN = """
import argparse, json
import evaluate, torch
from datasets import Audio, load_dataset
from normalizer import normalize
from transformers import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

metric = evaluate.load("wer")
parser = argparse.ArgumentParser()
for name in ("model_id", "dataset_path", "dataset", "split"):
    parser.add_argument(f"--{name}")
parser.add_argument("--device", type=int, default=-1)
arguments = parser.parse_args()
assert type(AutoConfig.from_pretrained(arguments.model_id)) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
model = AutoModelForSpeechSeq2Seq.from_pretrained(arguments.model_id, dtype=torch.float32).to(arguments.device)
processor = AutoProcessor.from_pretrained(arguments.model_id)
model.generation_config.suppress_tokens = []


def transcribe(batch):
    torch.cuda.synchronize(device=arguments.device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    inputs = processor.apply_transcription_request([audio["array"] for audio in batch["audio"]])
    inputs = inputs.to(arguments.device, dtype=torch.float32)
    output = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    end.record()
    batch["predictions"] = processor.decode(output, skip_special_tokens=True)
    batch["milliseconds"] = [start.elapsed_time(end)] * len(output)
    return batch


data = load_dataset(arguments.dataset_path, arguments.dataset, split=arguments.split, token=True)
data = data.cast_column("audio", Audio(sampling_rate=processor.feature_extractor.sampling_rate))
data = data.map(lambda row: {**row, "reference": normalize(row["text"])})
data = data.map(transcribe, batched=True, batch_size=2, remove_columns=["audio"])
wer = metric.compute(references=data["reference"], predictions=["a cat sat", "on a"])
print(json.dumps({"predictions": data["predictions"][:], "milliseconds": data["milliseconds"][:], "wer": wer}))
"""


def open_asr_data(directory: Path, clips, texts) -> Path:
    directory.mkdir()
    audio = [{"bytes": clip.read_bytes(), "path": clip.name} for clip in clips]
    columns = {"audio": audio, "text": texts, "id": [clip.name for clip in clips]}
    parquet.write_table(pyarrow.table(columns), directory / "test-00000.parquet")
    return directory


def by_hand(checkpoint, clips, **settings):
    model = salmonn_hf.SalmonnForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = salmonn_hf.SalmonnProcessor.from_pretrained(checkpoint)
    inputs = processor.apply_transcription_request([str(clip) for clip in clips])
    output = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True)


@pytest.mark.slow
def test_a_script_like_the_open_asr_leaderboards(tiny_checkpoint, clips, tmp_path):
    (tmp_path / "clone" / "transformers").mkdir(parents=True)
    (tmp_path / "clone" / "normalizer").mkdir()
    (tmp_path / "clone" / "transformers" / "run_eval.py").write_text(STAND_IN)
    (tmp_path / "clone" / "normalizer" / "__init__.py").write_text("normalize = str.lower")
    data = open_asr_data(tmp_path / "data", clips, [text.upper() for text in TEXTS])
    arguments = ["--model_id", tiny_checkpoint, "--dataset_path", data, "--dataset", "default", "--split", "test"]
    output = run("run_open_asr.py", tmp_path / "clone", *arguments, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    found = json.loads(output.splitlines()[-1])
    assert all(found["predictions"]) and found["predictions"] == by_hand(tiny_checkpoint, clips, max_new_tokens=8)
    assert all(milliseconds > 0 for milliseconds in found["milliseconds"])
    assert found["wer"] == pytest.approx(1 / 6)


@pytest.mark.slow
def test_a_path_that_is_no_clone_is_named(tmp_path):
    with pytest.raises(AssertionError, match="run_eval.py does not exist; give the path of a clone"):
        run("run_open_asr.py", tmp_path, cwd=tmp_path)


@pytest.mark.slow
def test_the_open_asr_leaderboards_own_script(tiny_checkpoint, clips, tmp_path):
    clone = os.environ.get("OPEN_ASR_LEADERBOARD")
    if clone is None or not find_spec("kaldialign") or not find_spec("num2words"):
        pytest.skip("set OPEN_ASR_LEADERBOARD to a clone of it, and install the extra `leaderboards`")
    data = open_asr_data(tmp_path / "data", clips, TEXTS)
    arguments = ["--model_id", tiny_checkpoint, "--dataset_path", data, "--dataset", "default", "--split", "test"]
    arguments += ["--dtype", "float32", "--max_new_tokens", 8, "--batch_size", 2, "--warmup_steps", 1]
    output = run("run_open_asr.py", clone, *arguments, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    (results,) = (tmp_path / "results").glob("*.jsonl")
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["pred_text"] for row in found] == by_hand(tiny_checkpoint, clips, max_new_tokens=8)
    assert [row["audio_filepath"] for row in found] == [clip.name for clip in clips] and "WER:" in output


# lmms-eval


@pytest.fixture
def adapter(monkeypatch):
    """`lmms_eval_model`, on the parts of lmms-eval that it is made of."""
    if not find_spec("lmms_eval"):
        parts = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")}
        parts["lmms_eval.api.registry"] = ModuleType("registry")
        parts["lmms_eval.api.model"].lmms = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        parts["lmms_eval.api.registry"].register_model = lambda name: lambda cls: cls
        for name, part in parts.items():
            monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.syspath_prepend(LEADERBOARD)
    monkeypatch.delitem(sys.modules, "lmms_eval_model", raising=False)
    return importlib.import_module("lmms_eval_model")


def requests_about(model, clips, questions, **settings):
    """One request for each clip, as lmms-eval makes them."""
    model.task_dict["task"] = {"test": [{"clip": clip} for clip in clips]}
    arguments = [
        (question, dict(settings), lambda doc: [doc["clip"]], number, "task", "test")
        for number, question in enumerate(questions)
    ]
    return [SimpleNamespace(args=given) for given in arguments]


def test_answers_to_lmms_eval(adapter, tiny_checkpoint, clips):
    model = adapter.Salmonn(str(tiny_checkpoint), batch_size=2, device="cpu", dtype="float32", max_batch_size=None)
    waveforms = [salmonn_hf.load_audio(clip) for clip in clips]
    audio = [{"array": waveforms[0], "sampling_rate": 16000}, str(clips[1])]
    questions = ["What is it?", "Who?"]
    expected = Answerer(str(tiny_checkpoint), device="cpu", dtype="float32", max_new_tokens=6)(waveforms, questions)
    assert all(expected)
    settings = {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert model.generate_until(requests_about(model, audio, questions, **settings)) == expected
    cut = model.generate_until(requests_about(model, audio, questions, until=[expected[0][1], ""], **settings))
    assert cut[0] == expected[0].split(expected[0][1])[0]


def test_transcripts_for_lmms_eval(adapter, tiny_checkpoint, clips):
    """Of any length, whatever the task's words are."""
    model = adapter.Salmonn(str(tiny_checkpoint), transcribe=True, device="cpu", dtype="float32")
    audio = [noise(31.0), str(clips[0])]
    expected = Transcriber(str(tiny_checkpoint), "float32", "cpu")
    expected = [expected([salmonn_hf.load_audio(clip)])[0] for clip in audio]
    requests = requests_about(model, audio, ["Recognise the speech:"] * 2, max_new_tokens=256, temperature=0)
    assert model.generate_until(requests) == expected


def test_what_the_model_of_lmms_eval_does_not_do_is_said(adapter, tiny_checkpoint, clips, caplog):
    with pytest.raises(ValueError, match="does not know the model_args transcrbe"):
        adapter.Salmonn(str(tiny_checkpoint), transcrbe=True)
    model = adapter.Salmonn(str(tiny_checkpoint), device="cpu", dtype="float32")
    for settings in ({"temperature": 0.7}, {"do_sample": True}, {"num_beams": 5}):
        with pytest.raises(ValueError, match="decodes greedily"):
            model.generate_until(requests_about(model, [str(clips[0])], ["What?"], **settings))
    requests = requests_about(model, [str(clips[0])], ["What?"])
    model.task_dict["task"]["test"][0]["clip"] = noise(31.0)
    model.answerer.max_new_tokens = 2
    model.generate_until(requests)
    assert "Document 0 of task is cut to its first 30 s" in caplog.text
    requests[0].args = (*requests[0].args[:2], lambda doc: [], *requests[0].args[3:])
    with pytest.raises(ValueError, match="Document 0 of task has 0 clips"):
        model.generate_until(requests)


TASK = """
task: local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {directory}/test.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_audio
doc_to_text: "What is it?"
doc_to_target: text
generation_kwargs:
  max_new_tokens: 6
process_results: !function utils.process_results
metric_list:
  - metric: answers
    aggregation: !function utils.count
    higher_is_better: true
metadata:
  - version: 0.0
"""
TASK_FUNCTIONS = """
def doc_to_audio(doc):
    return [doc["audio"]]


def process_results(doc, results):
    return {"answers": results[0]}


def count(answers):
    return len([answer for answer in answers if answer])
"""


@pytest.mark.slow
def test_lmms_eval_itself(tiny_checkpoint, clips, tmp_path):
    if not find_spec("lmms_eval"):
        pytest.skip("lmms-eval is not installed: the extra `leaderboards`")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(directory=tmp_path))
    (tmp_path / "tasks" / "utils.py").write_text(TASK_FUNCTIONS)
    rows = [{"audio": str(clip), "text": text} for clip, text in zip(clips, TEXTS, strict=True)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--model",
        "salmonn",
        "--model_args",
        f"pretrained={tiny_checkpoint},dtype=float32",
        "--device",
        "cpu",
    ]
    arguments += ["--tasks", "local", "--include_path", tmp_path / "tasks", "--batch_size", 2]
    arguments += ["--output_path", tmp_path / "out", "--log_samples"]
    run("run_lmms_eval.py", *arguments, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    (samples,) = (tmp_path / "out").rglob("*samples_local.jsonl")
    found = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    waveforms = [salmonn_hf.load_audio(clip) for clip in clips]
    answerer = Answerer(str(tiny_checkpoint), device="cpu", dtype="float32", max_new_tokens=6)
    assert found == answerer(waveforms, ["What is it?"] * 2)
