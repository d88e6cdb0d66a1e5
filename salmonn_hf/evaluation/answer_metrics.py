"""Accuracy of short answers to questions about audio."""

import re
import string
from collections.abc import Sequence

import numpy as np

from .word_error_rate import check_pairs

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """
    SQuAD's normalisation (Rajpurkar et al., 2016, section 6: lower case, no punctuation, no articles, single spaces),
    with numerals up to ten as words, and of an answer that begins with yes or no that word alone: "Yes, a dog barks."
    is "yes".
    """
    text = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation)))
    words = ARTICLES.sub(" ", text).split()
    words = [NUMBERS[int(word)] if word.isdecimal() and int(word) <= 10 else word for word in words]
    return words[0] if words and words[0] in ("yes", "no") else " ".join(words)


def correct_answers(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """
    Which answers equal one of their accepted ones, after [`normalise_answer`].

    Args:
        references (`list[list[str]]`): the accepted answers to each question.
        hypotheses (`list[str]`): the given ones, in the same order. An empty answer is wrong.

    Returns:
        `np.ndarray` of shape `(questions,)`, bool; its mean is the accuracy.

    Raises:
        ValueError: if there are no questions, the lengths differ, or a question has no accepted answer.
    """
    check_pairs(references, hypotheses)
    accepted = [{normalise_answer(text) for text in texts} - {""} for texts in references]
    if not all(accepted):
        raise ValueError(f"Question {accepted.index(set())} has no accepted answer; leave it out.")
    return np.array([normalise_answer(given) in texts for given, texts in zip(hypotheses, accepted, strict=True)])
