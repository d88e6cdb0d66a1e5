"""Answers that repeat a phrase without end: stopped while they are made, and cut."""

from collections.abc import Sequence

import torch
from transformers import StoppingCriteria

GUARD_REPEATS = 8  # people do say "no" five times
GUARD_PHRASE = 32  # tokens


class RepetitionGuard(StoppingCriteria):
    """Ends an answer that ends in `GUARD_REPEATS` times the same phrase of at most `GUARD_PHRASE` tokens."""

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        stops = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for length in range(1, min(GUARD_PHRASE, input_ids.shape[1] // GUARD_REPEATS) + 1):
            tail = input_ids[:, -length * GUARD_REPEATS :]
            stops |= (tail[:, length:] == tail[:, :-length]).all(1)
        return stops


def cut_repetition(words: Sequence) -> list:
    """What is left of words or tokens that end as [`RepetitionGuard`] ends them: the repeated phrase stands once."""
    for length in range(1, min(GUARD_PHRASE, len(words) // GUARD_REPEATS) + 1):
        tail = list(words[-length * GUARD_REPEATS :])
        if tail[length:] == tail[:-length]:
            cut = len(words) - length
            while cut >= length and list(words[cut - length : cut]) == tail[:length]:
                cut -= length
            return list(words[: cut + length])
    return list(words)


def strip_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens without the padding and end symbols behind them."""
    length = len(tokens)
    while length and tokens[length - 1] in ends:
        length -= 1
    return tokens[:length]
