"""Caption scores: hand-worked cases, and what pycocoevalcap itself gives when it is driven as its authors do."""

import math
import shutil

import numpy as np
import pytest
from caption_examples import HYPOTHESES, REFERENCES

from salmonn_hf.evaluation import caption_metrics
from salmonn_hf.evaluation.caption_metrics import CaptionMetricsError, caption_statistics, find_corenlp, score_captions


@pytest.fixture(scope="module", autouse=True)
def java():
    pytest.importorskip("pycocoevalcap", reason="caption metrics need pycocoevalcap: pip install -e .[captions]")
    if shutil.which("java") is None:
        pytest.skip("caption metrics need Java: apt-get install default-jre-headless")


@pytest.fixture
def words_only(monkeypatch):
    """Without the two Java programs, which take seconds to start."""
    monkeypatch.setattr(caption_metrics, "tokenise", lambda captions: [list(texts) for texts in captions])
    monkeypatch.setattr(caption_metrics, "meteor", lambda references, hypotheses: None)


# pycocoevalcap 1.2 with PTBTokenizer on both sides, its scorers called one by one on the captions of
# caption_examples.py; `test_equals_pycocoevalcap_called_directly` makes them anew.
CORPUS = {
    "CIDEr-D": 1.3401267556835734,
    "ROUGE-L": 0.5234577204204351,
    "METEOR": 0.26259468498380334,
    "BLEU-1": 0.6607674032430434,
    "BLEU-2": 0.5097931193282212,
    "BLEU-3": 0.238866548766455,
    "BLEU-4": 3.21779840543038e-05,
}
CLIPS = {
    "CIDEr-D": [
        2.6075709601886525,
        1.4549772836119115,
        2.493770205707616,
        1.0089856889070303,
        0.0,
        0.4754563956862302,
    ],
    "ROUGE-L": [0.8, 0.6666666666666666, 0.7155425219941348, 0.6224489795918368, 0.0, 0.3360881542699724],
    "METEOR": [
        0.3473961178344186,
        0.3278148135393494,
        0.41388921016683433,
        0.31909660936497386,
        0,
        0.09785932721712537,
    ],
}


def test_equals_stored_values_of_pycocoevalcap():
    scores = score_captions(REFERENCES, HYPOTHESES)
    assert caption_metrics.cider_d(REFERENCES, HYPOTHESES) == scores["CIDEr-D"].value
    assert {name: score.value for name, score in scores.items()} == pytest.approx(CORPUS, abs=1e-6)
    for name, clips in CLIPS.items():
        np.testing.assert_allclose(scores[name].clips, clips, atol=1e-6)
    for name, score in scores.items():
        # The resampled METEOR comes by another way, of summed statistics: it must lie about the corpus score.
        assert score.low <= score.value <= score.high, name
    assert scores["METEOR"].high - scores["METEOR"].low > 0.05


@pytest.mark.slow
def test_equals_pycocoevalcap_called_directly():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(captions):
        return PTBTokenizer().tokenize({i: [{"caption": c} for c in texts] for i, texts in enumerate(captions)})

    pairs = tokens(REFERENCES), tokens([[text] for text in HYPOTHESES])
    values = {
        "CIDEr-D": Cider().compute_score(*pairs)[0],
        "ROUGE-L": Rouge().compute_score(*pairs)[0],
        "METEOR": Meteor().compute_score(*pairs)[0],
    }
    values |= {f"BLEU-{n + 1}": v for n, v in enumerate(Bleu(4).compute_score(*pairs, verbose=0)[0])}
    assert values == pytest.approx(CORPUS, abs=1e-9)


def test_cider_by_hand(words_only):
    # Two clips: a word in both has weight log(2/2) = 0, any other log 2. Both captions are perfect, but the first has
    # no 4-grams, the second neither 3- nor 4-grams: (1 + 1 + 1 + 0) / 4 · 10 and (1 + 1 + 0 + 0) / 4 · 10.
    scores = score_captions([["a dog barks"], ["a cat"]], ["a dog barks", "a cat"])
    assert scores["CIDEr-D"].clips.tolist() == pytest.approx([7.5, 5.0], abs=1e-9)
    # One word too many: cosines 2/√6 of words and of 2-grams, 1/√2 of 3-grams, and the penalty for a length that is
    # one 2-gram off, exp(-1² / (2 · 6²)).
    scores = score_captions([["a dog barks"], ["a cat"]], ["a dog barks loudly", "a cat"])
    expected = (4 / math.sqrt(6) + 1 / math.sqrt(2)) * math.exp(-1 / 72) / 4 * 10
    assert scores["CIDEr-D"].clips[0] == pytest.approx(expected, abs=1e-9)
    assert scores["CIDEr-D"].value == pytest.approx((expected + 5) / 2, abs=1e-9)


def test_rouge_and_bleu_by_hand(words_only):
    scores = score_captions([["a dog barks", "the dog"]], ["a dog barks loudly"])
    # Longest common subsequence 3 of 4 words, and all 3 of the reference; F with β = 1.2.
    assert scores["ROUGE-L"].value == pytest.approx((1 + 1.44) * 0.75 / (1 + 1.44 * 0.75), abs=1e-9)
    # 3 of 4 words, 2 of 3 2-grams, 1 of 2 3-grams; longer than the reference, so no brevity penalty.
    assert scores["BLEU-1"].value == pytest.approx(3 / 4, abs=1e-6)
    assert scores["BLEU-2"].value == pytest.approx(math.sqrt(3 / 4 * 2 / 3), abs=1e-6)
    assert scores["BLEU-3"].value == pytest.approx((3 / 4 * 2 / 3 / 2) ** (1 / 3), abs=1e-6)
    # 2 of 2 words, but the reference has 4: exp(1 - 4 / 2).
    assert score_captions([["a dog barks loudly"]], ["dog barks"])["BLEU-1"].value == pytest.approx(
        math.exp(-1), abs=1e-6
    )


def test_bleu_of_one_clip_is_that_of_each_of_its_samples(words_only):
    score = score_captions([REFERENCES[0]], [HYPOTHESES[0]])["BLEU-2"]
    assert (score.low, score.high) == pytest.approx((score.value, score.value), abs=1e-12)


def test_spider_is_the_mean_of_spice_and_cider(words_only, monkeypatch):
    monkeypatch.setattr(caption_metrics, "spice", lambda references, hypotheses, corenlp: np.array([0.5, 0.1]))
    scores = score_captions([["a dog barks"], ["a cat"]], ["a dog barks", "a cat"], corenlp="somewhere")
    assert scores["SPICE"].value == pytest.approx(0.3)
    assert scores["SPIDEr"].clips.tolist() == pytest.approx([(7.5 + 0.5) / 2, (5 + 0.1) / 2])


def test_without_corenlp_there_is_no_score_by_the_name_of_spice(words_only, tmp_path, monkeypatch):
    assert not {"SPICE", "SPIDEr"} & set(score_captions([["a dog"], ["a cat"]], ["a dog", "a cat"]))
    with pytest.raises(CaptionMetricsError, match="No SPICE.*stanford-corenlp-3.6.0-models.jar.*CORENLP_HOME"):
        find_corenlp(tmp_path)
    (tmp_path / "stanford-corenlp-3.6.0-models.jar").touch()
    with pytest.raises(CaptionMetricsError, match=str(tmp_path)):
        find_corenlp(tmp_path)
    (tmp_path / "stanford-corenlp-3.6.0.jar").touch()
    monkeypatch.setenv("CORENLP_HOME", str(tmp_path))
    assert find_corenlp() == tmp_path


def test_what_a_card_says_of_spice_names_no_directory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CORENLP_HOME", str(tmp_path))
    with pytest.raises(CaptionMetricsError) as raised:
        find_corenlp()
    told = str(raised.value)
    assert str(tmp_path) not in told and str(caption_metrics.spice_directory()) not in told


def test_spice_tells_what_its_program_says(tmp_path):
    with pytest.raises(CaptionMetricsError, match="(?s)SPICE failed.*"):
        caption_metrics.spice([["a dog"]], [["a dog"]], tmp_path)


def test_says_plainly_that_java_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CaptionMetricsError, match="apt-get install default-jre-headless"):
        score_captions([["a dog"]], ["a dog"])


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [([], [], "empty"), ([["a"]], ["a", "b"], "1 references but 2"), ([["a"], [""]], ["a", "b"], "Clip 1")],
)
def test_refuses_what_has_no_score(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        score_captions(references, hypotheses)


def test_statistics_by_hand():
    statistics = caption_statistics(["A dog barks.", "a dog, barks", "Rain", ""])
    assert statistics == {
        "distinct_words": 4,
        "mean_words": 7 / 4,
        "distinct_captions": 3 / 4,
        "most_frequent_caption": 2 / 4,
    }


def test_minilm_similarity_of_a_tiny_encoder(tmp_path):
    """Batches, padding and the mean over references, against one text at a time; the real weights are not here."""
    import torch
    from conftest import tiny_tokenizer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = BertModel(BertConfig(vocab_size=300, **sizes)).eval()
    encoder.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    score = caption_metrics.minilm_similarity(REFERENCES[:2], HYPOTHESES[:2], tmp_path, batch_size=3)

    def embedding(text):
        with torch.no_grad():
            return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    for index in range(2):
        cosines = [
            torch.cosine_similarity(embedding(HYPOTHESES[index]), embedding(text), dim=0) for text in REFERENCES[index]
        ]
        assert score.clips[index] == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    assert score.value == pytest.approx(score.clips.mean())
