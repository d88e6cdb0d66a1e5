"""Word and character error rates, as speech recognition leaderboards compute them, and endless repetition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jiwer
import numpy as np
from whisper_normalizer.english import EnglishTextNormalizer

LONGEST_PHRASE = 12  # words: a phrase that a model repeats without end is rarely longer
LOOP_REPEATS = 4


class ErrorCounts:
    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class WerResult(ErrorCounts):
    """
    Word errors of a whole corpus.

    Args:
        wer (`float`): (substitutions + deletions + insertions) / words. 0.05 is 5 %; it can exceed 1. With no words at
            all in the references it is 0 where nothing was inserted, else infinite.
        substitutions, deletions, insertions, hits (`int`): counts over all pairs.
        words (`int`): in the normalised references: hits + substitutions + deletions.
    """

    wer: float
    substitutions: int
    deletions: int
    insertions: int
    hits: int
    words: int


@dataclass(frozen=True)
class CerResult(ErrorCounts):
    """Character errors of a whole corpus, spaces between words included; otherwise as [`WerResult`]."""

    cer: float
    substitutions: int
    deletions: int
    insertions: int
    hits: int
    characters: int


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], normalise: bool = True) -> WerResult:
    """
    Corpus-level word error rate after Whisper's English normaliser (case, punctuation, contractions, numbers, British
    spelling, fillers), which is applied to both sides.

    Errors and words are summed over all pairs before dividing, so a long text weighs more than a short one. A pair
    whose reference is empty once normalised (silence, or only "um") adds no words, but what was recognised there still
    counts as insertions.

    Args:
        references (`list[str]`): what was said.
        hypotheses (`list[str]`): what was recognised, in the same order.
        normalise (`bool`): `False` takes the texts as they are, case and punctuation included.

    Raises:
        ValueError: if there are no pairs, the lengths differ, or a bare string was given for a list.
    """
    return WerResult(*corpus_rate(error_counts(references, hypotheses, normalise).sum(0)))


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str], normalise: bool = True) -> CerResult:
    """Corpus-level character error rate; as [`word_error_rate`], with characters in place of words."""
    return CerResult(*corpus_rate(error_counts(references, hypotheses, normalise, jiwer.process_characters).sum(0)))


def error_counts(references, hypotheses, normalise: bool = True, align: Callable = jiwer.process_words) -> np.ndarray:
    """
    Each pair's own counts, of which a corpus, a part of it or a bootstrap sample sums some; arguments and errors as of
    [`word_error_rate`]. `align` is `jiwer.process_characters` for characters.

    Returns:
        `np.ndarray` of shape `(pairs, 4)`, int64: substitutions, deletions, insertions, hits.
    """
    check_pairs(references, hypotheses)
    spell = normaliser() if normalise else str
    aligned = [align(spell(r), spell(h)) for r, h in zip(references, hypotheses, strict=True)]
    return np.array([(a.substitutions, a.deletions, a.insertions, a.hits) for a in aligned], dtype=np.int64)


def corpus_rate(counts: Sequence[int]) -> tuple[float, int, int, int, int, int]:
    """The rate of summed counts, the counts, and how many units the references have."""
    substitutions, deletions, insertions, hits = map(int, counts)
    errors, units = substitutions + deletions + insertions, hits + substitutions + deletions
    rate = errors / units if units else float("inf") if errors else 0.0
    return rate, substitutions, deletions, insertions, hits, units


def check_pairs(references, hypotheses):
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError("references and hypotheses are lists of strings; put a single text in a list.")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses; they must be in pairs.")
    if len(references) == 0:
        raise ValueError("There is no score of nothing: references and hypotheses are empty.")


def longest_repetition(words: Sequence) -> int:
    """
    How often in a row the most repeated phrase of at most `LONGEST_PHRASE` words (or other tokens) stands: 3 for
    "no no no", 2 for "go on go on", 1 where nothing is repeated, 0 for no words.
    """
    most = min(len(words), 1)
    for length in range(1, min(LONGEST_PHRASE, len(words) // 2) + 1):
        run = 0  # words in a row that equal the one `length` before
        for index in range(length, len(words)):
            run = run + 1 if words[index] == words[index - length] else 0
            most = max(most, run // length + 1)
    return most


def is_loop(hypothesis: str, references: Sequence[str]) -> bool:
    """
    Whether a hypothesis is a hallucinated loop: a phrase stands `LOOP_REPEATS` times or more in a row in it, and more
    often than in any of the references. Case and punctuation do not count.
    """
    spell = normaliser()
    repeats = longest_repetition(spell(hypothesis).split())
    return repeats >= LOOP_REPEATS and repeats > max(longest_repetition(spell(r).split()) for r in references)


@cache
def normaliser() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()  # reads its spelling tables from disk
