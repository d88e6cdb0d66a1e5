"""Evaluation while a model trains: a metric for each task, and what is done by them."""

# ruff: noqa: F811 (fixtures of another file)

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_training import history, parts, run, stage1_model, stage1_recipe, stage2_recipe  # noqa: F401

from salmonn_hf.evaluation.caption_metrics import CaptionMetricsError
from salmonn_hf.training import evaluation
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
