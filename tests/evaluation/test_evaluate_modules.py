"""Our metrics by `evaluate.load(PATH)`, without a network: the numbers of the package's own functions."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from caption_examples import HYPOTHESES, REFERENCES

from salmonn_hf.evaluation import caption_metrics
from salmonn_hf.evaluation.answer_metrics import correct_answers
from salmonn_hf.evaluation.word_error_rate import character_error_rate, word_error_rate

METRICS = Path(__file__).resolve().parents[2] / "eval" / "metrics"
SAID, RECOGNISED = ["The colour, um, of honour", "Mister Smith went"], ["the color of a horse", "Mr. Smith"]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` of one of our modules, with nothing left in the user's cache."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        patch.setattr(sys, "path", list(sys.path))
        yield lambda name: evaluate.load(str(METRICS / name), cache_dir=str(cache / "metrics"))


@pytest.mark.parametrize("normalise", [True, False])
def test_word_error_rate(load, normalise):
    words = word_error_rate(SAID, RECOGNISED, normalise)
    found = load("word_error_rate").compute(predictions=RECOGNISED, references=SAID, normalise=normalise)
    assert found == vars(words) | {"cer": character_error_rate(SAID, RECOGNISED, normalise).cer}
    assert 0 < found["cer"] < found["wer"] == words.errors / words.words


def test_clips_may_come_in_batches(load):
    metric = load("word_error_rate")
    for said, recognised in zip(SAID, RECOGNISED, strict=True):
        metric.add_batch(predictions=[recognised], references=[said])
    assert metric.compute()["wer"] == word_error_rate(SAID, RECOGNISED).wer


def test_answer_accuracy(load):
    accepted, given = [["dog", "hound"], ["yes"], ["rain"]], ["A hound.", "Yes, it is.", "wind"]
    found = load("answer_accuracy").compute(predictions=given, references=accepted)
    assert found == {"accuracy": correct_answers(accepted, given).mean()} == {"accuracy": 2 / 3}


def test_caption_scores(load, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="caption metrics need pycocoevalcap: pip install -e .[captions]")
    # Java takes longer to start than all the rest; test_caption_metrics.py has it.
    monkeypatch.setattr(caption_metrics, "require_java", lambda: None)
    monkeypatch.setattr(caption_metrics, "tokenise", lambda captions: [list(texts) for texts in captions])
    score = caption_metrics.CaptionScore(0.25, 0.0, 0.5, None)
    monkeypatch.setattr(caption_metrics, "meteor", lambda references, hypotheses: score)
    found = load("caption_scores").compute(predictions=HYPOTHESES, references=REFERENCES)
    assert found == {name: s.value for name, s in caption_metrics.score_captions(REFERENCES, HYPOTHESES).items()}
    assert found["METEOR"] == 0.25 and found["CIDEr-D"] > 0


def test_in_a_process_of_its_own_offline(tmp_path):
    code = (
        "import sys, evaluate; metric = evaluate.load(sys.argv[1])\n"
        "print(metric.compute(predictions=['a cat'], references=['the cat'])['wer'])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    command = [sys.executable, "-c", code, METRICS / "word_error_rate"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "0.5\n", run.stderr
