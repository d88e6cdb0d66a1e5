"""Drafts of the CTC head: where the language model's text stands in them, and that they never change it."""

import re

import pytest
import torch
from conftest import LANGUAGE_MODELS, noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from transformers import GenerationConfig, MaxLengthCriteria, pipeline

from salmonn_hf.model.ctc_draft import (
    END_MARKS,
    CTCDraft,
    continuation,
    draft_mask,
    place_in_draft,
    words,
)
from salmonn_hf.model.projector import ProjectorOutput, SalmonnProjector

DRAFT = "well i think joey left this morning".split()


def test_words_are_without_case_and_punctuation():
    assert words("Well, Mr. O’Neill -- it's 3!") == ["well", "mr", "o'neill", "it's", "3"]


@pytest.mark.parametrize(
    "said, place, distance",
    [
        ("", 0, 0),
        ("well", 1, 0),
        ("we", 1, 0.5),  # an unfinished word
        ("well i think", 3, 0),
        ("well i sink", 3, 1),  # one word for another
        ("well i do think", 3, 1),  # a word too many
        ("well think", 3, 1),  # a word too few
    ],
)
def test_place_in_draft_by_hand(said, place, distance):
    assert place_in_draft(said.split(), DRAFT) == (place, distance)


@pytest.mark.parametrize(
    "text, rest",
    [
        ("", "Well, I think joey left this morning."),
        ("Well", " I think joey left this morning."),
        ("We", "ll I think joey left this morning."),
        ("Well,", " I think joey left this morning."),
        ("Well. ", " I think joey left this morning."),
        ("Well, I think.", " Joey left this morning."),
        ("Well, I think...", " joey left this morning."),
        ("Well, I think Joey left this morning", "."),
        ("Well, I think Joey left this morning.", ""),
        ("Something else that has nothing to do with it", None),
    ],
)
def test_continuation_by_hand(text, rest):
    assert continuation(text, DRAFT) == rest


def test_a_question_is_drafted_with_its_mark():
    assert continuation("Did", "did you ascertain its source".split()) == " you ascertain its source?"


def drafting_model(model_type="llama", seed=0):
    text_config = tiny_text_config(model_type, tie_word_embeddings=True)
    model = tiny_model(tiny_config(text_config=text_config, ctc_vocab_size=60), seed)
    model.projector.ctc_head.token_ids.copy_(torch.arange(60) + 60)  # printable bytes, mostly
    return model


def count_passes(model):
    passes = []
    model.language_model.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_a_draft_is_greedy_ctc():
    model = drafting_model()
    projector, embedding = model.projector, model.get_input_embeddings()
    embeds = torch.randn(40, 32)
    ids = projector.draft(ProjectorOutput(states=embeds), embedding)
    assert [ids] == projector.ctc_transcripts(embeds, torch.tensor([40]), embedding) and len(ids) > 5
    by_hand = torch.unique_consecutive(projector.ctc_log_probs(embeds, embedding).argmax(-1))
    assert ids == [60 + int(index) - 1 for index in by_hand if index > 0]
    halves = projector.ctc_transcripts(embeds, torch.tensor([15, 25]), embedding)
    outputs = [ProjectorOutput(states=half) for half in embeds.split([15, 25])]
    assert halves == [projector.draft(output, embedding) for output in outputs]
    head = projector.ctc_head
    head.blank.data = embeds[0] - head.cached_directions[0]  # cached directions do not outlive training
    model.train().eval()
    assert projector.draft(ProjectorOutput(states=embeds[:1]), embedding) == []


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
@pytest.mark.parametrize(
    "processors",
    [
        {"suppress_tokens": [3]},  # which stands for audio
        {"suppress_tokens": [3, 7, 9, 80]},
        {"suppress_tokens": [3], "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},  # which ask what is written
    ],
)
def test_text_is_that_of_greedy_decoding(model_type, processors):
    processor = tiny_processor()
    for seed in range(2):
        model = drafting_model(model_type, seed)
        inputs = processor.apply_transcription_request([noise(0.5 + seed, seed)])
        options = {"max_new_tokens": 24, **processors}
        expected = model.generate(**inputs, **options)
        drafted = model.generate(**inputs, **options, speculation_type="ctc", tokenizer=processor.tokenizer)
        assert torch.equal(drafted, expected)


@pytest.mark.parametrize("errors", [0, 1])
def test_good_drafts_save_passes(errors, monkeypatch):
    """A draft made of the text that greedy decoding gives, and the same with its middle word wrong."""
    model, processor = drafting_model(), tiny_processor()
    inputs = processor.apply_transcription_request([noise(1.0)])
    text = " the fog is here"
    answer = processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
    prompt_length = inputs["input_ids"].shape[1]

    def say(module, args, kwargs, output):  # a language model that says the answer, whatever it hears
        cache, kept = kwargs["past_key_values"], output.logits.shape[1]
        last = cache.get_seq_length() - prompt_length
        for row in range(kept):
            output.logits[0, row] = 0
            output.logits[0, row, answer[min(last - kept + 1 + row, len(answer) - 1)]] = 1
        return output

    model.language_model.register_forward_hook(say, with_kwargs=True)
    draft = " the fog is here".replace("fog", "dog") if errors else text
    ids = processor.tokenizer(draft, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(SalmonnProjector, "draft", lambda *_: ids)
    monkeypatch.setattr("salmonn_hf.model.ctc_draft.PASS_TOKENS", 40)  # here a token is a letter
    passes = count_passes(model)
    options = {"max_new_tokens": 40, "speculation_type": "ctc", "tokenizer": processor.tokenizer}
    output = model.generate(**inputs, **options)
    assert output[0, prompt_length:].tolist() == answer
    # The draft, which begins with a capital; what was predicted behind that; the draft again, without it. One more for
    # the wrong word.
    assert len(passes) <= 3 + errors < len(answer) / 2


@pytest.mark.parametrize(
    "text, marks, passes",
    [
        ("The fog is here.", END_MARKS, 1),
        ("The fog is here!", END_MARKS, 1),  # a branch beside the draft's full stop
        ("The fog is here!", (), 2),
        ("The fog is here!!", END_MARKS, 2),  # what follows the branch is not the end
        ("The fog is here", END_MARKS, 1),
    ],
)
def test_another_mark_at_the_end_needs_no_pass_of_its_own(text, marks, passes, monkeypatch):
    model, processor = drafting_model(), tiny_processor()
    inputs = processor.apply_transcription_request([noise(1.0)])
    answer = processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
    prompt_length = inputs["input_ids"].shape[1]

    def say(module, args, kwargs, output):  # a language model that knows by a token's position what follows
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(kwargs["past_key_values"].get_seq_length())[None]
        for row, position in enumerate(positions[0, -output.logits.shape[1] :].tolist()):
            output.logits[0, row] = 0
            output.logits[0, row, answer[min(position - prompt_length + 1, len(answer) - 1)]] = 1
        return output

    model.language_model.register_forward_hook(say, with_kwargs=True)
    ids = processor.tokenizer(" the fog is here", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(SalmonnProjector, "draft", lambda *_: ids)
    monkeypatch.setattr("salmonn_hf.model.ctc_draft.END_MARKS", marks)
    counted = count_passes(model)
    options = {"max_new_tokens": 40, "speculation_type": "ctc", "tokenizer": processor.tokenizer}
    output = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    assert output.sequences[0, prompt_length:].tolist() == answer
    assert [int(scores.argmax()) for scores in output.scores] == answer
    assert len(counted) == passes


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_branch_sees_what_stands_before_it(implementation):
    """The logits behind a mark in a branch are those behind the same mark in its place."""
    model = drafting_model()
    model.language_model.set_attn_implementation(implementation)
    embedding = model.get_input_embeddings()
    prompt, candidates, ends = embedding(torch.tensor([[9, 8, 7]])), [20, 21, 22, 2], [30, 31]
    mask = draft_mask(0, 7, 2, 5, torch.float32, "cpu")
    positions = torch.tensor([[*range(7), 5, 5]])
    embeds = torch.cat([prompt, embedding(torch.tensor([candidates + ends]))], dim=1)
    with torch.no_grad():
        together = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[0]
        torch.testing.assert_close(together[:7], model(inputs_embeds=embeds[:, :7]).logits[0])
        for row, end in enumerate(ends):
            alone = torch.cat([prompt, embedding(torch.tensor([[20, 21, end]]))], dim=1)
            torch.testing.assert_close(together[7 + row], model(inputs_embeds=alone).logits[0, -1])


def test_batches_beams_samples_and_fixed_caches_take_no_drafts(monkeypatch):
    """Which would change the time alone; they are not even read."""
    model, processor = drafting_model(), tiny_processor()
    monkeypatch.setattr(SalmonnProjector, "draft", lambda *_: pytest.fail("drafts"))
    options = {"max_new_tokens": 5}
    drafts = {"speculation_type": "ctc", "tokenizer": processor.tokenizer}
    for clips, kind in (
        (2, {}),
        (1, {"num_beams": 2}),
        (1, {"do_sample": True}),
        (1, {"cache_implementation": "static"}),
    ):
        inputs = processor.apply_transcription_request([noise(0.5, seed) for seed in range(clips)])
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, **kind)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **options, **kind, **drafts), expected)


def test_stopping_criteria_are_asked_after_each_token():
    """A pass may verify more than they allow."""
    model, processor = drafting_model(), tiny_processor()
    inputs = processor.apply_transcription_request([noise(1.0)])
    for limit in (1, 2, 3, 5):
        options = {
            "max_new_tokens": 24,
            "stopping_criteria": [MaxLengthCriteria(inputs["input_ids"].shape[1] + limit)],
        }
        expected = model.generate(**inputs, **options)
        drafted = model.generate(**inputs, **options, speculation_type="ctc", tokenizer=processor.tokenizer)
        assert torch.equal(drafted, expected)


def test_behind_a_wrong_candidate_what_was_predicted_is_verified():
    """The model puts a comma where the draft has none, and a question mark where it has a full stop."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    draft = CTCDraft(ids(" then is it here"), tokenizer, tokenizer.eos_token_id)
    assert draft.choose_candidates([]) == ids("Then is it here.") + [tokenizer.eos_token_id]
    assert draft.other_ends() == ids("!?")  # of the marks that are one token
    # Behind "Then" it says a comma; behind " " and "i", which it was given all the same, what follows in the draft.
    draft.update(ids("Then,is it here?") + [tokenizer.eos_token_id], 4)
    candidates = draft.choose_candidates(ids("Then,"))
    assert tokenizer.decode(candidates) == " is it here?" + tokenizer.eos_token


class WordTokenizer:
    """Tokens are words with the space before them, later pieces of words behind a bar, and marks; "$" is the end."""

    def __init__(self):
        self.texts = []

    def __call__(self, text, add_special_tokens=False):
        text = text.replace(" Skull", " Sk|ull")  # however it is written, as by a tokenizer without that word
        pieces = re.findall(r" ?[\w']+| ?\|[\w']+|\.\.\.|[^\w ]", text)
        self.texts += [piece for piece in pieces if piece not in self.texts]
        return {"input_ids": [self.texts.index(piece) for piece in pieces]}

    def decode(self, ids, **kwargs):
        return "".join(self.texts[index] for index in ids).replace("|", "")

    def convert_ids_to_tokens(self, index):
        return self.texts[index].replace(" ", "\u0120")


@pytest.mark.parametrize(
    "drafted, predicted, matches, revised",
    [
        # Words that the language model leaves out, of which the draft has two spellings each.
        (" did you ass ascertain entertain its end?$", " did you ascertain|ail its its end?$$", 2, " its end?$"),
        # A comma, and what is predicted behind the words.
        (" because you do you'll bed.$", " because you do, bed!$$", 3, " you'll bed!$"),
        # A mark that ends a sentence, and a hyphen.
        (" hello who are you.$", " hello! are you?$$", 1, " Who are you?$"),
        (" non functional in it.$", " non- in it...$$", 1, "functional in it...$"),
        # The later piece of a word does not replace a whole one.
        (" in the scanner.$", "|ar the scanner...$$", 0, " in the scanner...$"),
        # One word for another; behind the wrong one the draft is rather right.
        (" she has it him me.$", " she had no him me!$$", 1, " it him me!$"),
        # The same word with a capital.
        (" so and I hate.$", " so And I love!$$", 1, " I love.$"),
        # A name of several tokens, and a word that has several with a capital.
        (" was j|oe here.$", " was Joe|oe here.$$", 1, " here.$"),
        (" a crystal skull is here.$", " a Crystal Sk is here.$$", 1, " Skull is here.$"),
        (" a skull is here.$", " a Sk is here.$$", 1, "|ull is here.$"),
        # Words in the place of one of several pieces, and of the end.
        (" see the kit|ten here.$", " see the dog|gy here.$$", 2, " here.$"),
        (" see a comp.$", " see a comp|ress$$", 3, ".$"),
        # Behind a new sentence's mark the language model had not expected a capital.
        (" oh, we did.$", " oh. we did.$$", 1, " We did.$"),
        (" oh, linc did.$", " oh. LINC did.$$", 1, " LINC did.$"),
        # A transcript does not end with a word: the draft's own end is better.
        (" an overall.$", " overall it$.$", 0, ""),
    ],
)
def test_revised_drafts_by_hand(drafted, predicted, matches, revised):
    tokenizer = WordTokenizer()
    ids = {text: tokenizer(text)["input_ids"] for text in (drafted, predicted, revised)}
    draft = CTCDraft([], tokenizer, tokenizer("$")["input_ids"][0])
    draft.candidates = ids[drafted]
    assert len(ids[predicted]) == len(ids[drafted]) + 1
    assert tokenizer.decode(draft.revise(ids[predicted], matches)) == revised.replace("|", "")


def test_a_second_token_in_the_same_place_stands_before_the_rest():
    """What took the place of one drafted word was the first of two: "the dog" for "cat"."""
    tokenizer = WordTokenizer()
    draft = CTCDraft([], tokenizer, tokenizer("$")["input_ids"][0])
    draft.candidates = tokenizer(" see cat is here$")["input_ids"]
    draft.update(tokenizer(" see the is here.$")["input_ids"], 1)
    assert tokenizer.decode(draft.revised) == " is here.$"
    draft.candidates = draft.revised
    draft.update(tokenizer(" dog here.$$")["input_ids"], 0)
    assert tokenizer.decode(draft.revised) == " is here.$"


def test_pipeline_takes_the_option(tmp_path):
    model, processor = drafting_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    transcriber = pipeline("automatic-speech-recognition", model=str(tmp_path))
    clips = [noise(0.7, 1), noise(0.4, 2), noise(0.5, 3)]
    expected = [result["text"] for result in transcriber(clips)]
    used = []
    candidates = CTCDraft.choose_candidates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CTCDraft, "choose_candidates", lambda *a, **k: used.append(1) or candidates(*a, **k))
        assert [result["text"] for result in transcriber(clips, speculation_type="ctc")] == expected
        assert used
        used.clear()
        assert [r["text"] for r in transcriber(clips, batch_size=3, speculation_type="ctc")] == expected
        assert not used


def test_models_without_a_head_say_so():
    processor = tiny_processor()
    inputs = processor.apply_transcription_request([noise(0.5)])
    with pytest.raises(ValueError, match="CTC head"):
        tiny_model().generate(**inputs, speculation_type="ctc", tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match="tokenizer=processor.tokenizer"):
        drafting_model().generate(**inputs, speculation_type="ctc")


def test_stop_strings_and_streamers_as_in_plain_decoding(tmp_path):
    """Transformers does not hand them on to a decoding loop of one's own."""

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, processor = drafting_model(), tiny_processor()
    tokenizer = processor.tokenizer
    inputs = processor.apply_transcription_request([noise(1.0)])
    width = inputs["input_ids"].shape[1]
    new = model.generate(**inputs, max_new_tokens=24)[0, width:].tolist()
    stop = next(token for token in map(tokenizer.decode, new[3:]) if len(token) == 1 and token.isalnum())
    in_config = GenerationConfig(max_new_tokens=24, stop_strings=stop)
    for options in ({"max_new_tokens": 24, "stop_strings": [stop]}, {"generation_config": in_config}):
        plain, drafted = Streamer(), Streamer()
        expected = model.generate(**inputs, **options, tokenizer=tokenizer, streamer=plain)
        assert expected.shape[1] < width + 24
        drafts = {"speculation_type": "ctc", "tokenizer": tokenizer, "streamer": drafted}
        assert torch.equal(model.generate(**inputs, **options, **drafts), expected)
        assert drafted.tokens == plain.tokens

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    transcriber = pipeline("automatic-speech-recognition", model=str(tmp_path))
    expected = transcriber(noise(1.0), stop_strings=[stop])
    assert expected != transcriber(noise(1.0))
    assert transcriber(noise(1.0), stop_strings=[stop], speculation_type="ctc") == expected


def test_an_unknown_speculation_type_is_named():
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    with pytest.raises(ValueError, match="speculation_type='foo'"):
        drafting_model().generate(**inputs, speculation_type="foo")
