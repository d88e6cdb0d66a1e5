"""A transcript of Whisper's tokens in the language model's, spelt as its own tokenizer spells the same text."""

import torch
from tokenizers.models import BPE

WORD_STARTS = ("\u0120", "\u2581")  # a space, in byte-level BPE and in SentencePiece
FIRST_CHARACTER = 0x10000  # each token has a character of its own, behind this one


class Respelling:
    """
    Whisper's tokens are spelt with the language model's by a table; where the two cut a word in other places, the
    pieces are then merged anew, as byte-pair encoding merges them. So the language model reads a word as it would
    write it, and copies it token by token.

    Args:
        pieces (`torch.IntTensor` of shape `(Whisper's text tokens, pieces)`): of each of Whisper's tokens those of the
            language model that spell the same, padded with -1.
        merges (`torch.IntTensor` of shape `(merges, 3)`): the language model's, in order: left token, right token and
            the one that they make. None where its tokenizer is another one: then the pieces stay as they are.
        space_id (`int`, *optional*): the language model's token for a space, which no transcript begins with.
    """

    def __init__(self, pieces: torch.IntTensor, merges: torch.IntTensor, space_id: int | None):
        self.pieces = [[token for token in row if token >= 0] for row in pieces.tolist()]
        spelling: dict[int, str] = {}  # of each token, in characters that stand for those that nothing merges
        pairs = []
        for left, right, merged in merges.tolist():
            left, right = (spelling.setdefault(token, chr(FIRST_CHARACTER + token)) for token in (left, right))
            spelling[merged] = left + right
            pairs.append((left, right))
        for token in {token for row in self.pieces for token in row}:
            spelling.setdefault(token, chr(FIRST_CHARACTER + token))
        self.spelling, self.space = spelling, spelling.get(space_id, "")
        self.encoder = BPE({characters: token for token, characters in spelling.items()}, pairs)

    def __call__(self, transcript: list[int]) -> tuple[list[int], list[int]]:
        """
        Of Whisper's text tokens those of the language model, and for each the place of the one in `transcript` that
        it begins with.
        """
        spelt = [
            (place, self.spelling[piece]) for place, token in enumerate(transcript) for piece in self.pieces[token]
        ]
        characters = "".join(piece for _, piece in spelt)
        places = [place for place, piece in spelt for _ in piece]
        spaces = len(characters) - len(characters.lstrip(self.space)) if self.space else 0
        tokens, starts, start = [], [], spaces
        for token in self.encoder.tokenize(characters[spaces:]):
            tokens.append(token.id)
            starts.append(places[start])
            start += len(token.value)
        return tokens, starts
