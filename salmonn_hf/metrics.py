"""Word error rate, as speech recognition leaderboards compute it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jiwer
from whisper_normalizer.english import EnglishTextNormalizer


@dataclass(frozen=True)
class WerResult:
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

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> WerResult:
    """
    Corpus-level word error rate after Whisper's English normaliser (case, punctuation, contractions, numbers, British
    spelling, fillers), which is applied to both sides.

    Errors and words are summed over all pairs before dividing, so a long text weighs more than a short one. A pair
    whose reference is empty once normalised (silence, or only "um") adds no words, but what was recognised there still
    counts as insertions.

    Args:
        references (`list[str]`): what was said.
        hypotheses (`list[str]`): what was recognised, in the same order.

    Raises:
        ValueError: if there are no pairs, the lengths differ, or a bare string was given for a list.
    """
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise ValueError("references and hypotheses are lists of strings; put a single text in a list.")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses; they must be in pairs.")
    if len(references) == 0:
        raise ValueError("There is no word error rate of nothing: references and hypotheses are empty.")

    normalise = _normaliser()
    counts = jiwer.process_words([normalise(text) for text in references], [normalise(text) for text in hypotheses])
    errors = counts.substitutions + counts.deletions + counts.insertions
    words = counts.hits + counts.substitutions + counts.deletions
    if words:
        wer = errors / words
    else:
        wer = float("inf") if errors else 0.0
    return WerResult(wer, counts.substitutions, counts.deletions, counts.insertions, counts.hits, words)


@cache
def _normaliser() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()  # reads its spelling tables from disk
