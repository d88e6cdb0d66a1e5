"""`generate`: ways of decoding, against the language model alone on the same embeddings; audio without a prompt."""

import copy

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from test_window_merging import merging_model
from transformers import AutoModelForCausalLM, GenerationConfig

CLIPS = ("input_features", "input_features_mask")
PROMPTS, NOISES = ["<|audio|> and <|audio|>? Tell", "<|audio|> x"], [(1.0, 0), (2.5, 1), (0.7, 2)]


def models():
    return {"plain": (tiny_model(), tiny_processor()), "merged": merging_model(seed=3)}


@pytest.fixture(scope="module", params=["plain", "merged"])
def pair(request):
    return models()[request.param]


def inputs_of(processor, prompts=2):
    return processor(text=PROMPTS[:prompts], audio=[noise(*clip) for clip in NOISES[: prompts + 1]])


def by_language_model(model, inputs, **options):
    """New tokens of the language model alone, which has the prompt's ids beside its embeddings."""
    audio = model.project_audio(**{name: inputs[name] for name in CLIPS})
    prompt = model.embed_prompt(inputs["input_ids"], inputs["attention_mask"], audio=audio)
    prompt = {name: prompt[name] for name in ("input_ids", "inputs_embeds", "attention_mask")}
    torch.manual_seed(0)
    sequences = model.language_model.generate(**prompt, **{"suppress_tokens": [3], "max_new_tokens": 8} | options)
    return sequences[:, prompt["input_ids"].shape[1] :]


def new_tokens(model, inputs, **options):
    torch.manual_seed(0)
    sequences = model.generate(**inputs, **{"max_new_tokens": 8} | options)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(sequences[: len(inputs["input_ids"]), :width], inputs["input_ids"][: len(sequences)])
    return sequences[:, width:]


def collected(streamer_of):
    """What a streamer is given, in a row."""

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    streamer = Streamer()
    return streamer_of(streamer), streamer.tokens


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[88]]},
        {"min_new_tokens": 5},
        {"guidance_scale": 1.7},
        {"exponential_decay_length_penalty": (2, 1.5)},
    ],
    ids=str,
)
def test_options_do_what_they_do_in_the_language_model(pair, options, prompts):
    inputs = inputs_of(pair[1], prompts)
    expected = by_language_model(pair[0], inputs, **options)
    assert torch.equal(new_tokens(pair[0], inputs, **options), expected)
    config = GenerationConfig(max_new_tokens=8, **options)
    assert torch.equal(new_tokens(pair[0], inputs, generation_config=config, max_new_tokens=8), expected)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_no_token(pair, options, prompts):
    model, processor = pair
    inputs = inputs_of(processor, prompts)
    output = model.generate(**inputs, max_new_tokens=8, **options)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    assert torch.equal(sequences[:, inputs["input_ids"].shape[1] :], by_language_model(model, inputs))


def language_model(**settings):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_text_config(**settings)).eval()


@pytest.mark.parametrize("how", ["argument", "generation_config", "model"])
def test_prompt_lookup_gives_the_greedy_text(pair, how):
    model, processor = copy.deepcopy(pair[0]), pair[1]
    inputs, options = inputs_of(processor, 1), {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    expected = by_language_model(model, inputs)
    if how == "model":
        model.generation_config.update(**options)
        options = {}
    elif how == "generation_config":
        options = {"generation_config": GenerationConfig(max_new_tokens=8, **options)}
    assert torch.equal(new_tokens(model, inputs, **options), expected)


@pytest.mark.parametrize("assistant", ["language model", "its own", "itself", "other vocabulary"])
def test_assistants_give_the_greedy_text(pair, assistant):
    model, processor = pair
    inputs, options = inputs_of(processor, 1), {}
    if assistant == "other vocabulary":
        options = {"tokenizer": processor.tokenizer, "assistant_tokenizer": tiny_processor().tokenizer}
    options["assistant_model"] = {
        "language model": language_model,
        "its own": lambda: model.language_model,
        "itself": lambda: copy.deepcopy(model),
        "other vocabulary": lambda: language_model(vocab_size=280),
    }[assistant]()
    assert torch.equal(new_tokens(model, inputs, **options), by_language_model(model, inputs))


def test_an_assistant_that_hears_drafts_from_what_it_hears():
    model, processor = tiny_model(), tiny_processor()
    inputs, passes, assistant = inputs_of(processor, 1), [], copy.deepcopy(model)
    model.language_model.register_forward_hook(lambda *_: passes.append(1))
    model.generate(**inputs, max_new_tokens=8, assistant_model=assistant)
    assert len(passes) < 8  # deaf, it would be wrong at every token
    with pytest.raises(ValueError, match="assistant_model makes 34 audio tokens of the clips and this model 50"):
        merged = models()["merged"][0]
        model.generate(**inputs, max_new_tokens=8, assistant_model=merged)


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({"assistant_early_exit": 1}, 1),
        ({"use_mtp": True}, 1),
        ({"token_healing": True}, 1),
        ({"cache_implementation": "paged"}, 1),
        ({"penalty_alpha": 0.6, "top_k": 4}, 1),
        ({"dola_layers": "high"}, 1),
        ({"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5}, 1),
        ({"prompt_lookup_num_tokens": 3}, 2),
        ({"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}, 1),
        ({"prompt_lookup_num_tokens": 3, "stop_strings": ["a"]}, 1),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(pair, options, prompts):
    inputs = inputs_of(pair[1], prompts)
    with pytest.raises(ValueError, match=next(iter(options))):
        pair[0].generate(**inputs, max_new_tokens=8, tokenizer=pair[1].tokenizer, **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        config = GenerationConfig(max_new_tokens=8, **options)
        pair[0].generate(**inputs, generation_config=config, tokenizer=pair[1].tokenizer)


def test_a_suppressed_token_of_the_callers_leaves_the_audio_token_suppressed(pair):
    model, processor = copy.deepcopy(pair[0]), pair[1]
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(300))
    head.bias.data[3] = 1e4
    inputs = inputs_of(processor, 1)
    for suppressed in ([100], [], None):
        assert 3 not in new_tokens(model, inputs, suppress_tokens=suppressed)


def test_max_and_min_length_count_the_prompt_as_it_was_given(pair):
    model, processor = pair
    inputs = inputs_of(processor)
    width = inputs["input_ids"].shape[1]
    expected = by_language_model(model, inputs)
    assert torch.equal(new_tokens(model, inputs, max_new_tokens=None, max_length=width + 8), expected)
    config = GenerationConfig(max_length=width + 8)
    assert torch.equal(model.generate(**inputs, generation_config=config)[:, width:], expected)
    longer = by_language_model(model, inputs, min_new_tokens=8)
    assert torch.equal(new_tokens(model, inputs, min_length=width + 8), longer)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_streamers_see_the_sequences(pair, options):
    model, processor = pair
    inputs = inputs_of(processor, 1)
    output, seen = collected(lambda streamer: model.generate(**inputs, max_new_tokens=8, streamer=streamer, **options))
    assert seen == output[0].tolist()


def test_embeddings_are_merged_with_audio(pair):
    model, processor = pair
    inputs = inputs_of(processor, 1)
    clips = {name: inputs[name] for name in CLIPS}
    embeds, mask = model.get_input_embeddings()(inputs["input_ids"]), {"attention_mask": inputs["attention_mask"]}
    torch.testing.assert_close(model(inputs_embeds=embeds, **mask, **clips).logits, model(**inputs).logits)
    expected = by_language_model(model, inputs)
    assert torch.equal(model.generate(inputs_embeds=embeds, **mask, **clips, max_new_tokens=8), expected)
    assert torch.equal(new_tokens(model, inputs, inputs_embeds=embeds), expected)
    with pytest.raises(ValueError, match="audio placeholders"):  # and not that the audio is left out
        model.generate(inputs_embeds=embeds + 1, **clips, max_new_tokens=8)
    for option in ({"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=next(iter(option))):
            model.generate(inputs_embeds=embeds, **clips, max_new_tokens=8, **option)


def test_position_ids_of_the_prompt_as_it_was_given(pair):
    model, processor = pair
    inputs = inputs_of(processor)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(new_tokens(model, inputs, position_ids=positions), by_language_model(model, inputs))
    one = inputs_of(processor, 1)
    counted = torch.arange(one["input_ids"].shape[1])[None]
    torch.testing.assert_close(model(**one, position_ids=counted).logits, model(**one).logits)
    assert not torch.allclose(model(**one, position_ids=3 * counted).logits, model(**one).logits, atol=1e-2)


def test_of_audio_alone_a_transcript_is_asked_for(pair):
    model, processor = copy.deepcopy(pair[0]), pair[1]
    clips = [noise(*clip) for clip in NOISES]
    request, features = processor.apply_transcription_request(clips), processor(clips, sampling_rate=16000)
    with pytest.raises(ValueError, match="transcription_ids"):
        model.generate(**features)
    model.generation_config.transcription_ids = processor.transcription_ids()
    expected = new_tokens(model, request)
    assert torch.equal(model.generate(**features, max_new_tokens=8), expected)
    positional = model.generate(
        features["input_features"], attention_mask=features["input_features_mask"], max_length=8
    )
    assert torch.equal(positional, expected)
    assert torch.equal(model.generate(**model.encode_audio(**features), max_new_tokens=8), expected)
    assert model.generate(**features, min_new_tokens=99).shape == (3, 16 + 15 * 2.7 // 1)  # 2.5 s and Whisper's 0.2
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(**features, prompt_lookup_num_tokens=3)
    output, seen = collected(lambda s: model.generate(**processor(clips[0]), max_new_tokens=8, streamer=s))
    assert seen == output[0].tolist() and len(seen) <= 8


def test_a_saved_checkpoint_knows_what_to_ask(tmp_path):
    """Whichever of model and processor is saved first, and from there to the next checkpoint."""
    model, processor = tiny_model(), tiny_processor()
    features = processor(noise(1.0), sampling_rate=16000)
    expected = new_tokens(model, processor.apply_transcription_request(noise(1.0)))
    for name, order in (("one", (model, processor)), ("other", (processor, tiny_model()))):
        for part in order:
            part.save_pretrained(tmp_path / name)
        type(model).from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-again")
        loaded = type(model).from_pretrained(tmp_path / f"{name}-again")
        assert torch.equal(loaded.generate(**features, max_new_tokens=8), expected)


def test_both_encoders_must_get_the_same_clips():
    from salmonn_hf.model.configuration_beats import BeatsConfig

    sound_config = BeatsConfig(
        embed_dim=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    config = tiny_config(sound_config=sound_config)
    model, processor = tiny_model(config), tiny_processor(config)
    processor.feature_extractor.return_input_values = True
    inputs = processor.apply_transcription_request([noise(1.0), noise(1.0, 1)])
    fewer = {name: value[:1] if name.startswith("input_values") else value for name, value in inputs.items()}
    none = {name: value for name, value in inputs.items() if not name.startswith("input_values")}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="same clips"):
            call(**fewer)
        with pytest.raises(ValueError, match="input_values are missing"):
            call(**none)


def test_arguments_by_their_place(pair):
    """All of `generate` in transformers, up to those behind the streamer."""
    inputs = inputs_of(pair[1], 1)
    ids, clips = inputs["input_ids"], {name: inputs[name] for name in CLIPS}
    config = GenerationConfig(guidance_scale=3.0, max_new_tokens=8)
    negative = torch.tensor([[40, 41, 42]])
    expected = pair[0].generate(ids, config, **clips, negative_prompt_ids=negative)
    assert not torch.equal(expected, pair[0].generate(ids, config, **clips))
    none = [None] * 6
    assert torch.equal(pair[0].generate(ids, config, *none, negative, **clips), expected)
    with pytest.raises(TypeError, match="negative_prompt_ids"):
        pair[0].generate(ids, config, *none, negative, negative_prompt_ids=negative, **clips)
    with pytest.raises(TypeError, match="arguments"):
        pair[0].generate(ids, config, *none, negative, None, None, 7, **clips)


def test_the_same_input_by_two_names_is_refused(pair):
    inputs = dict(inputs_of(pair[1], 1))
    with pytest.raises(ValueError, match="inputs.* input_ids"):
        pair[0].generate(inputs["input_ids"], **inputs)
    with pytest.raises(ValueError, match="inputs.* input_features"):
        pair[0].generate(inputs["input_features"], **inputs)


@pytest.mark.parametrize("other", [{"vocab_size": 280}, {"audio_token_id": 4}], ids=str)
def test_an_assistant_that_hears_needs_the_same_vocabulary(pair, other):
    model, processor = pair
    text_config = {"text_config": tiny_text_config(vocab_size=280)} if "vocab_size" in other else other
    inputs = inputs_of(processor, 1)
    tokenizers = {"tokenizer": processor.tokenizer, "assistant_tokenizer": tiny_processor().tokenizer}
    for options in ({}, tokenizers):
        with pytest.raises(ValueError, match="assistant_model has a vocabulary"):
            model.generate(
                **inputs, max_new_tokens=4, assistant_model=tiny_model(tiny_config(**text_config)), **options
            )
