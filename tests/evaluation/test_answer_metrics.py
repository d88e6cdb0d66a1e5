"""Accuracy of answers: hand-worked cases."""

import pytest

from salmonn_hf.evaluation.answer_metrics import correct_answers, normalise_answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes.", "yes"),
        ("Yes, someone is speaking.", "yes"),
        ("No, I hear nothing", "no"),
        ("The dog!", "dog"),
        ("A  Steel-string guitar", "steel string guitar"),
        ("2", "two"),
        ("There are 3 of them", "there are three of them"),
        ("12", "12"),
        ("Nobody", "nobody"),
        ("a theremin", "theremin"),
        ("...", ""),
    ],
)
def test_normalisation(answer, normal):
    assert normalise_answer(answer) == normal


def test_any_accepted_answer_will_do():
    references = [["dog", "a hound"], ["yes"], ["cat"], ["rain"]]
    assert correct_answers(references, ["The hound.", "Yes, it is", "a cat and a dog", ""]).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_refuses_what_has_no_accuracy():
    with pytest.raises(ValueError, match="Question 1 has no accepted answer"):
        correct_answers([["yes"], ["?"]], ["yes", ""])
    with pytest.raises(ValueError, match="2 references but 1"):
        correct_answers([["yes"], ["no"]], ["yes"])
    with pytest.raises(ValueError, match="empty"):
        correct_answers([], [])
