"""Which tokens the CTC head scores, and how it spells a transcript with them."""

import json
import re
from collections.abc import Iterable
from itertools import islice

from tokenizers import Tokenizer


def ctc_text(text: str) -> str:
    """A transcript as the CTC head spells it: without case, and without punctuation but the apostrophe."""
    return " " + " ".join(re.sub(r"[^\w' ]+", " ", text.lower().replace("’", "'")).split())


def ctc_tokenizer(tokenizer, merges: int | None = None) -> Tokenizer:
    """
    The language model's own tokenizer, stopped after its first `merges` byte-pair merges: it spells rare words with
    short pieces, which even a few hours of speech show often enough to learn. The token ids stay the language model's.
    `None`: all merges.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    if merges is not None:
        if settings["model"]["type"] != "BPE":
            raise ValueError(f"ctc_merges needs a byte-pair tokenizer; this is of type {settings['model']['type']}.")
        settings["model"]["merges"] = settings["model"]["merges"][:merges]
    return Tokenizer.from_str(json.dumps(settings))


def ctc_vocabulary(texts: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens that `ctc_tokenizer` spells the transcripts with, sorted."""
    found, texts = set(), iter(texts)
    while batch := list(islice(texts, 10_000)):
        rows = tokenizer.encode_batch([ctc_text(text) for text in batch], add_special_tokens=False)
        found.update(token for row in rows for token in row.ids)
    return sorted(found)
