"""Word error rate: hand-worked cases, and jiwer itself on normalised text."""

import dataclasses
import math
import random

import jiwer
import pytest
from whisper_normalizer.english import EnglishTextNormalizer

from salmonn_hf.evaluation.word_error_rate import (
    CerResult,
    WerResult,
    character_error_rate,
    is_loop,
    longest_repetition,
    word_error_rate,
)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("the cat sat", "the cat sat", WerResult(0.0, 0, 0, 0, 3, 3)),
        ("the cat sat", "the bat sat", WerResult(1 / 3, 1, 0, 0, 2, 3)),
        ("the cat sat", "the sat", WerResult(1 / 3, 0, 1, 0, 2, 3)),
        ("the cat sat", "the big cat sat", WerResult(1 / 3, 0, 0, 1, 3, 3)),
        ("a cat sat on the mat", "the cat sat the mat now", WerResult(1 / 2, 1, 1, 1, 4, 6)),
        ("the cat sat", "", WerResult(1.0, 0, 3, 0, 0, 3)),
        ("cat", "one big dog", WerResult(3.0, 1, 0, 2, 0, 1)),
    ],
)
def test_hand_worked_pairs(reference, hypothesis, expected):
    result = word_error_rate([reference], [hypothesis])
    assert dataclasses.astuple(result) == pytest.approx(dataclasses.astuple(expected))
    assert result.errors == expected.substitutions + expected.deletions + expected.insertions


def test_is_of_the_corpus_not_the_mean_of_pairs():
    # 1 error of 1 word and 0 of 9: 10 %, where the mean of the pairs' rates would be 50 %.
    result = word_error_rate(
        ["yes", "one of these days we will all go there"], ["no", "one of these days we will all go there"]
    )
    assert (result.wer, result.errors, result.words) == (0.1, 1, 10)


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("Mr. Dashwood isn't ill-disposed!", "mister dashwood is not ill disposed"),
        ("It cost twenty five dollars.", "it cost $25"),
        ("The colour, um, of honour", "the color of honor"),
    ],
)
def test_spelling_that_does_not_matter_is_normalised(reference, hypothesis):
    assert word_error_rate([reference], [hypothesis]).errors == 0


def test_pairs_with_an_empty_reference_count_insertions():
    result = word_error_rate(["um", "two words", ""], ["something heard", "two words", ""])
    assert result == WerResult(wer=1.0, substitutions=0, deletions=0, insertions=2, hits=2, words=2)


def test_no_words_at_all():
    assert word_error_rate(["", "uh"], ["", ""]).wer == 0.0
    assert math.isinf(word_error_rate(["", "uh"], ["heard", ""]).wer)


def test_equals_jiwer_on_normalised_text():
    rng = random.Random(0)
    vocabulary = "The cat, dog; didn't isn't colour 25 twenty five uh Mr. house! saw a in of".split()
    references = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 15))) for _ in range(100)]
    hypotheses = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 15))) for _ in range(100)]
    normalise = EnglishTextNormalizer()
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]

    result = word_error_rate(references, hypotheses)

    assert result.wer == pytest.approx(jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]))
    assert result.words == sum(len(r.split()) for r, _ in pairs)
    assert result.hits + result.substitutions + result.insertions == sum(len(h.split()) for _, h in pairs)
    for i in range(20):
        alone = jiwer.process_words(*pairs[i])
        result = word_error_rate([references[i]], [hypotheses[i]])
        for name in ("substitutions", "deletions", "insertions", "hits"):
            assert getattr(result, name) == getattr(alone, name)


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [([], [], "empty"), (["one"], ["one", "two"], "1 references but 2"), ("one", "one", "lists of strings")],
)
def test_refuses_what_has_no_rate(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        word_error_rate(references, hypotheses)


@pytest.mark.parametrize("normalise", [True, False])
def test_characters_and_raw_words_equal_jiwer(normalise):
    rng = random.Random(1)
    vocabulary = "The cat, dog; didn't isn't colour 25 uh Mr. house! saw a in of".split()
    references = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 9))) for _ in range(50)]
    hypotheses = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 9))) for _ in range(50)]
    spell = EnglishTextNormalizer() if normalise else str
    pairs = [spell(r) for r in references], [spell(h) for h in hypotheses]

    characters = character_error_rate(references, hypotheses, normalise)
    assert characters.cer == pytest.approx(jiwer.cer(*pairs), abs=1e-9)
    assert characters.characters == sum(map(len, pairs[0]))
    whole = jiwer.process_words(*pairs)
    words = word_error_rate(references, hypotheses, normalise)
    assert words.wer == pytest.approx(whole.wer, abs=1e-9)
    assert words.errors == whole.substitutions + whole.deletions + whole.insertions


def test_characters_by_hand():
    # r inserted; four characters deleted, one of them a space; one of them replaced.
    result = character_error_rate(["cat", "cat sat", "dog"], ["cart", "cat", "dig"])
    assert result == CerResult(6 / 13, 1, 4, 1, 8, 13)
    assert result.errors == 6


def test_raw_words_keep_case_and_punctuation():
    assert word_error_rate(["The cat sat."], ["the cat sat"], normalise=False).wer == pytest.approx(2 / 3)
    assert word_error_rate(["The cat sat."], ["the cat sat"]).wer == 0


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("", 0),
        ("one", 1),
        ("one two three", 1),
        ("no no no", 3),
        ("go on go on", 2),
        ("he said go on go on go on to them", 3),
        ("a b a b a", 2),
        ("a a b a a b a a b", 3),
    ],
)
def test_longest_repetition(text, repeats):
    assert longest_repetition(text.split()) == repeats


def test_a_loop_is_what_the_reference_does_not_repeat():
    assert is_loop("Barking, barking, barking, barking, ba", ["a dog barking"])
    assert is_loop("thank you very much thank you very much " * 3, ["thank you"])
    assert not is_loop("no no no no", ["No, no, no, no!"])
    assert not is_loop("no no no", ["no"])
    assert is_loop("no " * 9, ["no no no no", "no"])
    assert not is_loop("", [""])
