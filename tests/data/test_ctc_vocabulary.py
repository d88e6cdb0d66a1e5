"""How the CTC head spells transcripts, and the tokens that it takes for them."""

import pytest
from test_training import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from salmonn_hf.data.ctc_vocabulary import ctc_text, ctc_tokenizer, ctc_vocabulary


def test_ctc_text():
    assert ctc_text("  Don’t -- I said: STOP!  ") == " don't i said stop"


def test_ctc_tokenizer_stops_after_the_first_merges():
    """A tokenizer trained with fewer merges from the start is the reference: merges are learned in order."""
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]

    def train(merges):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet)
        )
        return tokenizer

    whole = PreTrainedTokenizerFast(tokenizer_object=train(20))
    short = ctc_tokenizer(whole, 5)
    spelled = [row.ids for row in short.encode_batch(texts)]
    assert spelled == [row.ids for row in train(5).encode_batch(texts)]
    assert spelled != [row.ids for row in ctc_tokenizer(whole).encode_batch(texts)]
    assert [row.ids for row in ctc_tokenizer(whole).encode_batch(texts)] == whole(texts)["input_ids"]
    assert ctc_vocabulary(["red"], short) == sorted(set(short.encode(ctc_text("red")).ids))


def test_ctc_tokenizer_refuses_merges_of_a_tokenizer_without_any():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match="WordLevel"):
        ctc_tokenizer(words, 5)
