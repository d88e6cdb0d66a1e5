"""Whisper's tokens in the language model's: the same tokens as the language model's own tokenizer gives."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from salmonn_hf.model.configuration_whisper_decoder_projector import token_merges, token_pieces
from salmonn_hf.model.respelling import Respelling

TEXTS = {
    "language model": "the cat and the other cats were there. there was another one with caterpillars, and a band!",
    "Whisper": "a bandage on an elephant's ear; other people heard there were pillars and terrible cats about",
}
SAID = "Another caterpillar bandages the other elephant's ears, and there were terrible pillars... about!"


def byte_pair_tokenizer(text: str, merges: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.train_from_iterator(
        [text] * 3, BpeTrainer(vocab_size=256 + merges, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def respelling_of(tokenizer, speech_tokenizer):
    merges, space_id = token_merges(tokenizer)
    pieces = token_pieces(tokenizer, speech_tokenizer, len(speech_tokenizer))
    return Respelling(torch.tensor(pieces), torch.tensor(merges, dtype=torch.int32).view(-1, 3), space_id)


@pytest.mark.parametrize("merges", [40, 60, 90])
def test_it_is_the_spelling_of_the_language_models_own_tokenizer(merges):
    tokenizer = byte_pair_tokenizer(TEXTS["language model"], merges)
    speech_tokenizer = byte_pair_tokenizer(TEXTS["Whisper"], 30)
    transcript = speech_tokenizer(" " + SAID)["input_ids"]
    ids, places = respelling_of(tokenizer, speech_tokenizer)(transcript)
    assert ids == tokenizer(SAID)["input_ids"]
    # Each begins in the Whisper token that it is given the state of.
    starts = [len(speech_tokenizer.decode(transcript[:place])) - 1 for place in range(len(transcript) + 1)]
    written = 0
    for token, place in zip(ids, places, strict=True):
        assert max(starts[place], 0) <= written < starts[place + 1]
        written += len(tokenizer.decode([token]))


def test_the_two_cut_words_in_other_places():
    """Else the test above would say nothing."""
    tokenizer = byte_pair_tokenizer(TEXTS["language model"], 90)
    speech_tokenizer = byte_pair_tokenizer(TEXTS["Whisper"], 30)
    pieces = token_pieces(tokenizer, speech_tokenizer, len(speech_tokenizer))
    spelt = [piece for token in speech_tokenizer(SAID)["input_ids"] for piece in pieces[token] if piece >= 0]
    assert spelt != tokenizer(SAID)["input_ids"]


def test_an_empty_transcript_and_one_of_spaces():
    tokenizer = byte_pair_tokenizer(TEXTS["language model"], 20)
    respelling = respelling_of(tokenizer, tokenizer)
    assert respelling([]) == ([], [])
    assert respelling(tokenizer("   ")["input_ids"]) == ([], [])


def test_pieces_of_another_kind_of_tokenizer_stay_as_they_are():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")))
    assert token_merges(words) == ([], None)
    respelling = Respelling(torch.tensor([[1, 0], [0, -1], [-1, -1]]), torch.zeros(0, 3, dtype=torch.int32), None)
    assert respelling([0, 2, 1, 0]) == ([1, 0, 0, 1, 0], [0, 0, 2, 3, 3])
