"""The guard against endless repetition, and what is left of an answer."""

import pytest
import torch

from salmonn_hf.model.repetition import RepetitionGuard, cut_repetition, strip_end


@pytest.mark.parametrize(
    ("tokens", "stops"),
    [
        ([5] * 8, True),
        ([5] * 7, False),
        ([1, 2, 9] + [5, 6, 7] * 8, True),
        ([1, 2, 9] + [5, 6, 7] * 7 + [5, 6], False),
        ([5] * 8 + [6], False),
        (list(range(40)), False),
        (list(range(33)) * 8, False),
        (list(range(32)) * 8, True),
    ],
)
def test_guard_stops_at_the_eighth_repetition(tokens, stops):
    assert RepetitionGuard()(torch.tensor([tokens]), None).tolist() == [stops]


def test_guard_judges_each_row_alone():
    rows = torch.tensor([[3] * 12, list(range(12)), [1, 2, 3, 4] + [7] * 8])
    assert RepetitionGuard()(rows, None).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("a dog " + "barking " * 8, "a dog barking"),
        ("a dog " + "barking " * 30, "a dog barking"),
        ("go on " * 9, "go on"),
        ("a dog barking barking", "a dog barking barking"),
        ("no " * 8 + "more", "no " * 8 + "more"),
        ("", ""),
    ],
)
def test_repetition_is_cut_to_its_first(words, left):
    assert cut_repetition(words.split()) == left.split()


def test_padding_is_stripped_from_the_end_alone():
    assert strip_end([2, 5, 2, 6, 2, 0, 2], {0, 2}) == [2, 5, 2, 6]
    assert strip_end([2, 2], {2}) == []
