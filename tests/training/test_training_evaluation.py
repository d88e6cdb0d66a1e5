"""Evaluation while a model trains: a metric for each task, and what is done by them."""

# ruff: noqa: F811 (fixtures of another file)

import io
import json
import runpy
import shutil
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import noise
from safetensors.torch import load_file
from test_training import (  # noqa: F401
    ROOT,
    history,
    parts,
    run,
    stage1_model,
    stage1_recipe,
    stage2_recipe,
    write_parquet,
)
from transformers import pipeline

from salmonn_hf import SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.data.arguments import DataArguments
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.evaluation.caption_metrics import CaptionMetricsError
from salmonn_hf.training import evaluation
from salmonn_hf.training.arguments import SalmonnTrainingArguments
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.trainer import SalmonnTrainer

CAPTIONS = [
    ["A dog barks loudly, twice.", "A large dog is barking"],
    ["Rain falls on a tin roof", "It's raining on metal"],
    ["A car engine starts.", "An engine is started and revs"],
    ["Birds sing in the forest", "Several birds chirp"],
]
ANSWERS = ["a large dog is barking", "Rain is falling on a roof", "", "Birds sing."]
QUESTIONS = [("Is it a dog?", ["yes"]), ("How many?", ["three", "a few"]), ("Who?", ["a dog"]), ("Where?", ["here"])]


@pytest.fixture(scope="module")
def described(parts):
    """Sources of held-out clips: with two captions each, with questions, and with transcripts."""
    clips = [row["audio"] for row in pq.read_table(parts / "eval.parquet").to_pylist()]
    captions = [{"audio": clip, "captions": texts} for clip, texts in zip(clips, CAPTIONS, strict=True)]
    asked = [
        {"audio": clip, "question": question, "answers": answers, "task": "QA"}
        for clip, (question, answers) in zip(clips, QUESTIONS, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(captions), parts / "captions.parquet")
    pq.write_table(pa.Table.from_pylist(asked), parts / "questions.parquet")
    return [
        {"path": str(parts / "captions.parquet"), "columns": {"text": "captions"}, "task": "audiocaption"},
        {"path": str(parts / "questions.parquet"), "columns": {"text": "answers"}},
        {"path": str(parts / "eval.parquet")},
    ]


def evaluation_recipe(parts, output, start, sources, **overrides):
    recipe = stage2_recipe(parts, output, start, max_steps=8, eval_steps=1, save_steps=1, save_total_limit=2)
    del recipe["eval_file"]
    return recipe | {"eval_sources": sources, "per_device_eval_batch_size": 3} | overrides


def answering(monkeypatch, answer):
    """Give the model's answers: `answer(evaluation, clip, prompt)`, both counted from 0; its length tells a clip."""
    evaluations, evaluate = [], SalmonnTrainer.evaluate

    def counted(trainer, *args, **kwargs):
        evaluations.append(evaluate)
        return evaluate(trainer, *args, **kwargs)

    def answers(model, processor, inputs, max_new_tokens, **kwargs):
        prompts = inputs["input_ids"].tolist()
        clips = [round((prompt.count(3) * 0.08 - 0.6) / 0.3) for prompt in prompts]  # with 0.2 s of silence behind
        texts = processor.batch_decode(prompts)
        for text, limit in zip(texts, max_new_tokens, strict=True):
            assert limit >= 96 or "heard" not in text  # a caption may outlast its clip
        return [answer(len(evaluations) - 1, clip, text) for clip, text in zip(clips, texts, strict=True)]

    monkeypatch.setattr(SalmonnTrainer, "evaluate", counted)
    monkeypatch.setattr(evaluation, "generate_answers", answers)


@pytest.fixture
def java():
    pytest.importorskip("pycocoevalcap", reason="CIDEr-D needs pycocoevalcap: pip install -e .[captions]")
    if shutil.which("java") is None:
        pytest.skip("CIDEr-D needs Java: apt-get install default-jre-headless")


def pycocoevalcaps_cider(answers):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(captions):
        return PTBTokenizer().tokenize({i: [{"caption": c} for c in texts] for i, texts in enumerate(captions)})

    return Cider().compute_score(tokens(CAPTIONS), tokens([[text] for text in answers]))[0]


def test_each_task_of_a_mix_has_its_metric(parts, stage1_model, described, java, tmp_path, monkeypatch):
    """Of all references of a clip: CIDEr-D of captions, accuracy of answers, word error rate of speech."""

    def answer(evaluation, clip, prompt):
        if "heard" in prompt:
            return ANSWERS[clip]
        return "red" if "Transcribe" in prompt else ["Yes, it is.", "A few.", "a cat", "Here!"][clip]

    printed = []
    monkeypatch.setattr(evaluation.tqdm, "write", printed.append)
    answering(monkeypatch, answer)
    recipe = evaluation_recipe(parts, tmp_path / "two", stage1_model, described, max_steps=1)
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    (logged,) = [entry for entry in history(tmp_path / "two") if "eval_wer" in entry]
    assert logged["eval_wer"] == 3 / 4 and logged["eval_accuracy"] == 3 / 4
    assert logged["eval_cider"] == pytest.approx(pycocoevalcaps_cider(ANSWERS), abs=1e-9)
    assert logged["eval_cider"] > 1
    expected = {("red", "red"), (CAPTIONS[0][0], ANSWERS[0]), ("yes", "Yes, it is.")}
    assert {f"  reference  {reference}\n  answer     {answer}" for reference, answer in expected} <= set(printed)


def test_early_stopping_on_cider(parts, stage1_model, described, java, tmp_path, monkeypatch):
    right = [1, 3, 1, 2, 0]  # captions of each evaluation; the last is that of the best checkpoint
    answering(monkeypatch, lambda evaluation, clip, _: CAPTIONS[clip][0] if clip < right[evaluation] else "")
    best = {"early_stopping_patience": 2, "metric_for_best_model": "eval_cider"}
    recipe = evaluation_recipe(parts, tmp_path / "two", stage1_model, described[:1], **best)
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    evaluations = [entry for entry in history(tmp_path / "two") if "eval_cider" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2, 3, 4] and "eval_wer" not in evaluations[0]
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    files = [tmp_path / "two" / name / "model.safetensors" for name in (".", "checkpoint-2")]
    final, expected = map(load_file, files)
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in final.items())


def test_an_evaluation_that_cannot_be_is_refused_at_the_start(parts, stage1_model, described, tmp_path, monkeypatch):
    monkeypatch.setattr(SalmonnTrainer, "train", None)
    recipe = evaluation_recipe(parts, tmp_path / "two", stage1_model, described[:1], early_stopping_patience=2)
    with pytest.raises(ValueError, match="metric_for_best_model is 'wer'.*of the tasks audiocaption, gives cider"):
        run("run_stage2.py", recipe, tmp_path, monkeypatch)
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CaptionMetricsError, match="The evaluation set has captions.*apt-get install default-jre"):
        recipe |= {"metric_for_best_model": "cider"}
        run("run_stage2.py", recipe, tmp_path, monkeypatch)


def test_early_stopping_on_the_word_error_rate(parts, tmp_path, monkeypatch):
    recipe = stage1_recipe(parts, tmp_path / "one", early_stopping_patience=2, eval_steps=2, max_steps=40)
    run("run_stage1.py", recipe | {"learning_rate": 0.0}, tmp_path, monkeypatch)  # so nothing gets better
    evaluations = [entry for entry in history(tmp_path / "one") if "eval_wer" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    with pytest.raises(ValueError, match="early_stopping_patience needs evaluations"):
        run("run_stage1.py", recipe | {"eval_strategy": "no"}, tmp_path, monkeypatch)


def clip_with_pauses(seed):
    """10.5 s, which the pipeline cuts into three segments."""
    quiet = np.zeros(16000, np.float32)
    return np.concatenate([part for number in range(3) for part in (noise(2.5, 10 * seed + number), quiet)])


def test_the_word_error_rate_is_that_of_run_asr(tiny_checkpoint, tmp_path, monkeypatch):
    """Of long clips, cut at pauses, of silence and of short clips; whatever shares a batch, with and without cache."""
    transcriber = pipeline("automatic-speech-recognition", model=str(tiny_checkpoint))
    clips = [clip_with_pauses(1), noise(1.7, 2), np.zeros(16000, np.float32), clip_with_pauses(3), noise(0.4, 4)]
    rows = []
    for number, clip in enumerate(clips):
        file = io.BytesIO()
        soundfile.write(file, clip, 16000, format="WAV", subtype="FLOAT")
        # All but a few words of what the model says, so that most words are right.
        words = transcriber(clip)["text"].split() or ["nothing"]
        words[number % len(words)] = "other"
        audio = {"bytes": file.getvalue(), "path": f"{number}.wav"}
        rows.append({"audio": audio, "text": " ".join(words), "seconds": len(clip) / 16000})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    output = tmp_path / "run_asr"
    command = ["run_asr.py", "--model", tiny_checkpoint, "--data", tmp_path / "a.parquet", "--output", output]
    monkeypatch.setattr(sys, "argv", list(map(str, [*command, "--batch_size", 2])))
    runpy.run_path(str(ROOT / "eval" / "run_asr.py"), run_name="__main__")
    expected = json.loads((output / "result.json").read_text())["metrics"]["wer"]["value"]
    predictions = [json.loads(line)["hypothesis"] for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert 0 < expected < 0.9 and "" in predictions

    model = SalmonnForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = SalmonnProcessor.from_pretrained(tiny_checkpoint)
    collator = ClipCollator(processor, [])
    freeze_base_parts(model)
    shards = {}
    for cache in ("", "cache", "again"):  # the last is a copy of the one before
        if cache == "again":
            shutil.copytree(tmp_path / "cache", tmp_path / "again")
            time.sleep(1.1)  # so that no time of day can be the same
        data = DataArguments(
            train_files=[str(tmp_path / "a.parquet")],
            eval_file=str(tmp_path / "a.parquet"),
            feature_cache=cache and str(tmp_path / cache),
        )
        _, held_out = data.datasets(*data.load(), model, processor, Augmentation(), 0)
        args = SalmonnTrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[])
        trainer = SalmonnTrainer(model=model, args=args, eval_dataset=held_out, data_collator=collator)
        assert [answer.text for answer in trainer.answers(held_out)] == predictions
        assert trainer.evaluate()["eval_wer"] == expected
        shards[cache] = len(list((tmp_path / cache).glob("*/*.safetensors")))
    assert shards == {"": 0, "cache": 1, "again": 1}  # what was there was not encoded again


def test_clips_that_cannot_be_decoded_are_left_out(tiny_checkpoint, tmp_path):
    """Alone in a batch, too, and as transcripts or as captions."""
    path = write_parquet(tmp_path / "a.parquet", 3)
    rows = pq.read_table(path).to_pylist()
    for row in rows[1:]:
        row["audio"]["bytes"] = row["audio"]["bytes"][:60]
    rows = [row | {"task": task, "question": "", "seconds": 1.0} for task in ("asr", "keywords") for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), path)
    model = SalmonnForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = SalmonnProcessor.from_pretrained(tiny_checkpoint)
    freeze_base_parts(model)
    data = DataArguments(train_files=[path], eval_sources=[json.dumps({"path": path})], feature_cache="")
    _, held_out = data.datasets(*data.load(), model, processor, Augmentation(), 0)
    args = SalmonnTrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=1, report_to=[])
    collator = ClipCollator(processor, [])
    trainer = SalmonnTrainer(model=model, args=args, eval_dataset=held_out, data_collator=collator)
    assert [(answer.task, answer.references) for answer in trainer.answers(held_out)] == [
        ("asr", ["red"]),
        ("keywords", ["red"]),
    ]
