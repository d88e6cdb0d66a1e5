"""Caches kept for the next turn: the answers of the whole conversation run anew, and no clip encoded twice."""

import copy

import pytest
import torch
from conftest import noise, tiny_model, tiny_processor
from test_window_merging import merging_model

CLIPS = ("input_features", "input_features_mask")


@pytest.fixture(scope="module", params=["plain", "merged"])
def pair(request):
    return (tiny_model(), tiny_processor()) if request.param == "plain" else merging_model(seed=3)


@pytest.fixture
def encoded(pair):
    """How many clips each pass of the speech encoder has."""
    counts = []
    hook = pair[0].audio_tower.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    yield counts
    hook.remove()


def first_turn(pair, prompts):
    model, processor = pair
    texts, clips = ["<|audio|> and <|audio|>? Tell", "<|audio|> x"], [noise(1.0), noise(2.5, 1), noise(0.7, 2)]
    inputs = processor(text=texts[:prompts], audio=clips[: prompts + 1])
    output = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
    return inputs, output.sequences, output.past_key_values


def behind(ids, mask, new_ids, new_mask=None):
    new_mask = torch.ones_like(new_ids) if new_mask is None else new_mask
    answered = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    return torch.cat([ids, new_ids], dim=1), torch.cat([mask, answered, new_mask], dim=1)


def continued(model, ids, mask, clips=None, **options):
    output = model.generate(input_ids=ids, attention_mask=mask, **(clips or {}), max_new_tokens=6, **options)
    return output[:, ids.shape[1] :]


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_question_about_the_same_clips(pair, encoded, prompts):
    model = pair[0]
    inputs, sequences, cache = first_turn(pair, prompts)
    question = torch.tensor([[40, 41, 42]] * prompts)
    ids, mask = behind(sequences, inputs["attention_mask"], question)
    clips = {name: inputs[name] for name in CLIPS}
    expected = continued(model, ids, mask, clips)
    encoded.clear()
    for given in ({}, clips):
        assert torch.equal(continued(model, ids, mask, given, past_key_values=copy.deepcopy(cache)), expected)
    # What is new alone: the question, and the last token of the answer, which no pass has taken yet.
    assert torch.equal(continued(model, ids[:, -4:], mask, past_key_values=copy.deepcopy(cache)), expected)
    assert encoded == []


@pytest.mark.parametrize("prompts", [1, 2])
def test_another_clip_in_the_next_turn(pair, encoded, prompts):
    model, processor = pair
    inputs, sequences, cache = first_turn(pair, prompts)
    clips = [noise(1.7, 7), noise(0.9, 8)][:prompts]
    question = processor(text=["<|audio|> q"] * prompts, audio=clips)
    ids, mask = behind(sequences, inputs["attention_mask"], question["input_ids"], question["attention_mask"])
    conversation = [noise(1.0), noise(2.5, 1), clips[0]] + ([noise(0.7, 2), clips[1]] if prompts == 2 else [])
    of_all = dict(processor.feature_extractor(conversation, return_tensors="pt"))
    expected = continued(model, ids, mask, of_all)
    encoded.clear()
    for given in (of_all, {name: question[name] for name in CLIPS}):
        assert torch.equal(continued(model, ids, mask, given, past_key_values=copy.deepcopy(cache)), expected)
    assert encoded == [prompts, prompts]

    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "past_key_values": cache}
    second = model.generate(input_ids=ids, attention_mask=mask, **of_all, **options)
    ids, mask = behind(second.sequences, mask, torch.tensor([[40, 41]] * prompts))
    expected = continued(model, ids, mask, of_all)
    encoded.clear()
    assert torch.equal(continued(model, ids, mask, past_key_values=second.past_key_values), expected)
    assert encoded == []


@torch.no_grad()
def test_a_cache_that_forward_made(pair, encoded):
    model, processor = pair
    inputs = processor(text="<|audio|> and", audio=noise(2.5, 1))
    cache = model(**inputs, use_cache=True).past_key_values
    ids, mask = behind(inputs["input_ids"], inputs["attention_mask"], torch.tensor([[40, 41, 42]]))
    expected = model(input_ids=ids, attention_mask=mask, **{name: inputs[name] for name in CLIPS}).logits[:, -3:]
    encoded.clear()
    by_forward = model(input_ids=ids[:, -3:], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(by_forward, expected, atol=1e-4, rtol=1e-4)
    assert continued(model, ids, mask, past_key_values=cache)[0, 0] == expected[0, -1].argmax()
    assert encoded == []


def test_what_does_not_fit_the_cache_is_refused(pair):
    model = pair[0]
    inputs, sequences, cache = first_turn(pair, 1)
    with pytest.raises(ValueError, match="hold all input_ids already"):
        model.generate(input_ids=sequences[:, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(input_ids=sequences, past_key_values=cache, prompt_lookup_num_tokens=2)
    if hasattr(cache, "salmonn_prompt"):
        with pytest.raises(ValueError, match="of another prompt"):
            model.generate(input_ids=sequences.flip(1), past_key_values=cache, max_new_tokens=2)


def test_a_regrouped_cache_goes_with_as_many_rows(pair):
    model = pair[0]
    inputs, sequences, cache = first_turn(pair, 1)
    ids, mask = behind(sequences, inputs["attention_mask"], torch.tensor([[40, 41, 42]]))
    expected = continued(model, ids, mask, past_key_values=copy.deepcopy(cache))
    two = copy.deepcopy(cache)
    two.batch_repeat_interleave(2)
    both, of_both = ids.repeat(2, 1), mask.repeat(2, 1)
    for rows in (both, both[:, -4:]):
        assert torch.equal(continued(model, rows, of_both, past_key_values=copy.deepcopy(two)), expected.repeat(2, 1))
    beams = continued(model, ids, mask, {name: inputs[name] for name in CLIPS}, num_beams=2)
    assert torch.equal(continued(model, ids, mask, past_key_values=copy.deepcopy(two), num_beams=2), beams)
    for ids_of, cache_of, options in (
        (ids, two, {}),
        (ids[:, -4:], two, {}),
        (both, cache, {}),
        (ids, cache, {"num_beams": 2}),
        (ids, cache, {"do_sample": True, "num_return_sequences": 2}),
    ):
        mask_of = of_both if len(ids_of) == 2 else mask
        with pytest.raises(ValueError, match="past_key_values have"):
            continued(model, ids_of, mask_of, past_key_values=copy.deepcopy(cache_of), **options)


def test_one_row_of_several_prompts(pair):
    model = pair[0]
    inputs, sequences, cache = first_turn(pair, 2)
    ids, mask = behind(sequences, inputs["attention_mask"], torch.tensor([[40, 41, 42]] * 2))
    cache.batch_select_indices(torch.tensor([1]))
    if hasattr(cache, "salmonn_prompt"):  # which has the rows of both
        for rows in (ids[1:], ids[1:, -4:]):
            with pytest.raises(ValueError, match="past_key_values"):
                continued(model, rows, mask[1:], past_key_values=copy.deepcopy(cache))
    else:
        expected = continued(model, ids[1:], mask[1:], past_key_values=copy.deepcopy(cache))
        assert torch.equal(continued(model, ids[1:, -4:], mask[1:], past_key_values=cache), expected)


def test_a_cache_that_ends_within_a_clip_is_refused(pair):
    model = pair[0]
    inputs, sequences, cache = first_turn(pair, 1)
    ids, mask = behind(sequences, inputs["attention_mask"], torch.tensor([[40, 41, 42]]))
    answer = sequences.shape[1] - inputs["input_ids"].shape[1]
    cache.crop(-(answer + 10))  # the text behind the last clip has fewer tokens
    for clips in ({}, {name: inputs[name] for name in CLIPS}):
        with pytest.raises(ValueError, match="Behind past_key_values"):
            continued(model, ids, mask, clips, past_key_values=copy.deepcopy(cache))
