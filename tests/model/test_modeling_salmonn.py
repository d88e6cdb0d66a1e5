"""The model: shapes and lengths, independence of the batch, generation, losses, against transformers' own parts."""

import copy

import pytest
import torch
from conftest import LANGUAGE_MODELS, noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from transformers import AutoConfig, AutoModelForCausalLM, Wav2Vec2Config
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from salmonn_hf import SalmonnFeatureExtractor, SalmonnForConditionalGeneration, SalmonnModel
from salmonn_hf.model.configuration_beats import BeatsConfig

SECONDS = [0.3, 29.0, 1.7, 4.0, 11.3]


def without_dropout(**kwargs):
    """A tiny config whose training mode computes what its evaluation mode does."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": 0}
    return tiny_config(qformer_config=tiny_config().projector_config.qformer_config.to_dict() | dropout, **kwargs)


def test_encoder_equals_whispers_own_on_30_seconds():
    model = tiny_model()
    whisper = WhisperEncoder(model.config.audio_config).eval()
    whisper.load_state_dict(model.audio_tower.state_dict())
    features = torch.randn(2, 80, 3000)
    ours = model.audio_tower(features, attention_mask=torch.ones(2, 3000)).last_hidden_state
    torch.testing.assert_close(ours, whisper(features).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_encoder_features_do_not_depend_on_the_batch(implementation):
    config = tiny_config()
    config._attn_implementation = implementation
    model = tiny_model(config)
    extractor = SalmonnFeatureExtractor()
    clips = [noise(s, i) for i, s in enumerate(SECONDS)]
    with torch.no_grad():
        batch = model.encode_audio(**extractor(clips, return_tensors="pt"))
        for row, clip in enumerate(clips):
            alone = model.encode_audio(**extractor([clip], return_tensors="pt"))
            length = int(batch["audio_frames_mask"][row].sum())
            assert length == alone["audio_frames"].shape[1]
            difference = batch["audio_frames"][row, :length] - alone["audio_frames"][0]
            assert difference.abs().max() < 2e-5


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_text_alone_is_the_language_model(model_type):
    """Without audio the logits are those of the language model itself, soft caps and embedding scale included."""
    model = tiny_model(tiny_config(model_type))
    reference = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    reference.load_state_dict(model.language_model.state_dict())
    input_ids = torch.randint(4, 300, (2, 9))
    torch.testing.assert_close(model(input_ids=input_ids).logits, reference(input_ids=input_ids).logits)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_batch_equals_single(model_type):
    config = tiny_config(model_type)
    model, processor = tiny_model(config), tiny_processor(config)
    clips = [noise(s, i) for i, s in enumerate(SECONDS)]
    generate = {"max_new_tokens": 6, "do_sample": False}
    batch = model.generate(**processor.apply_transcription_request(clips), **generate)[:, -6:]
    for row, clip in enumerate(clips):
        alone = model.generate(**processor.apply_transcription_request(clip), **generate)
        assert alone[0, -6:].tolist() == batch[row].tolist()


def test_learned_positions_do_not_count_padding():
    """Rotary embeddings see distances alone; of GPT-2's, each row must begin with the first."""
    text_config = AutoConfig.for_model(
        "gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    config = tiny_config(text_config=text_config)
    model, processor = tiny_model(config), tiny_processor(config)
    clips = [noise(0.4), noise(6.0)]
    generate = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    batch = model.generate(**processor.apply_transcription_request(clips), **generate).logits
    alone = model.generate(**processor.apply_transcription_request(clips[0]), **generate).logits
    for together, single in zip(batch, alone, strict=True):
        torch.testing.assert_close(together[0], single[0], atol=1e-4, rtol=1e-4)


def test_several_clips_in_one_prompt():
    model, processor = tiny_model(), tiny_processor()
    first, second = noise(1.0, 1), noise(2.5, 2)
    prompts = ["<|audio|> and <|audio|>?", "<|audio|>"]
    inputs = processor(text=prompts, audio=[first, second, first])
    both = model(**inputs).logits[0, -1]
    swapped = model(**processor(text=prompts[:1], audio=[second, first])).logits[0, -1]
    alone = model(**processor(text=prompts[:1], audio=[first, second])).logits[0, -1]
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, swapped, atol=1e-3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.3},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_generation_modes_are_the_language_models_own(kwargs):
    """Each gives what the language model alone gives for the same embeddings, and not what greedy search does."""
    model, processor = tiny_model(), tiny_processor()
    inputs = processor.apply_transcription_request([noise(1.0), noise(2.0)])
    clips = {name: inputs[name] for name in ("input_features", "input_features_mask")}
    embeds = model.embed_prompt(inputs["input_ids"], audio=model.project_audio(**clips))["inputs_embeds"]
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "inputs_embeds": embeds}
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=8, **kwargs)
    torch.manual_seed(0)
    expected = model.language_model.generate(**prompt, max_new_tokens=8, suppress_tokens=[3], **kwargs)
    assert torch.equal(output, expected)
    assert output.shape == (2 * kwargs.get("num_return_sequences", 1), inputs["input_ids"].shape[1] + 8)
    assert not torch.equal(output[:2], model.generate(**inputs, max_new_tokens=8))


def test_beams_keep_the_clips_of_a_prompt_together():
    """Each beam of a prompt must get the prompt's own clips, as greedy search does."""
    model, processor = tiny_model(), tiny_processor()
    prompts = ["<|audio|> and <|audio|>?", "none?", "<|audio|>"]
    inputs = processor(text=prompts, audio=[noise(1.0, 1), noise(2.5, 2), noise(0.7, 3)])
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    greedy = model.generate(**inputs, **options).scores[0].log_softmax(-1)
    beams = model.generate(**inputs, **options, num_beams=2).scores[0].log_softmax(-1).view(len(prompts), 2, -1)
    for beam in beams.unbind(1):
        torch.testing.assert_close(beam, greedy, atol=1e-4, rtol=1e-4)


def test_audio_is_encoded_once_whatever_the_beams():
    model, processor = tiny_model(), tiny_processor()
    encoded = []
    model.audio_tower.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    inputs = processor.apply_transcription_request([noise(1.0), noise(2.0)])
    model.generate(**inputs, max_new_tokens=3, num_beams=3)
    assert encoded == [2]


def test_the_audio_token_is_never_generated():
    """Were it, the next step would look for audio embeddings that nobody gave."""
    model, processor = tiny_model(), tiny_processor()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = 0
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.full((300,), -50.0))
        model.get_output_embeddings().bias[3] = 50.0
    inputs = processor.apply_transcription_request(noise(1.0))
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert 3 not in output[0, inputs["input_ids"].shape[1] :]


def test_the_lm_head_sees_one_block_of_memory():
    """Of a slice of a batch, torch would copy the whole LM head for each row: half of the time of a training step."""
    model, processor = tiny_model(), tiny_processor()
    seen = []
    model.language_model.lm_head.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0].shape[1], inputs[0].is_contiguous()))
    )
    inputs = processor(text=["<|audio|>abc", "<|audio|>abcdef"], audio=[noise(0.5), noise(1.0)])
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    model.train()(**inputs, labels=labels, logits_to_keep=4)
    assert seen == [(1, True), (1, True), (4, True)]


def test_labels_from_the_first_token_on():
    model, processor = tiny_model(without_dropout()), tiny_processor()
    inputs = processor(text=["abc"])
    losses = [m(**inputs, labels=inputs["input_ids"]).loss for m in (model.eval(), model.train())]
    torch.testing.assert_close(*losses)


def test_the_audio_changes_the_logits():
    model, processor = tiny_model(), tiny_processor()
    logits = [model(**processor.apply_transcription_request(noise(2.0, seed))).logits[0, -1] for seed in (1, 2)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_loss_is_that_of_transformers_and_counts_items_in_batch():
    model, processor = tiny_model(without_dropout()), tiny_processor()
    inputs = processor(text=["<|audio|>abc", "<|audio|>abcdef"], audio=[noise(0.5), noise(1.0)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 4, -100)
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    count = int((labels != -100).sum())
    summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(2 * count)).loss
    torch.testing.assert_close(summed, expected / 2)
    model.train()
    assert model(**inputs, labels=labels).logits.shape == output.logits.shape  # complete, in training too
    of_answers = model(**inputs, labels=labels, logits_to_keep=7)
    torch.testing.assert_close(of_answers.loss, expected, atol=1e-4, rtol=1e-4)
    assert of_answers.logits.shape[1] == 7
    with pytest.raises(ValueError, match="logits_to_keep=6 leaves out"):
        model(**inputs, labels=labels, logits_to_keep=6)


def test_logits_of_chosen_positions_have_the_loss_of_all():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor(text=["<|audio|>abc", "<|audio|>abcdef"], audio=[noise(0.5), noise(1.0)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 4, -100)
    expected = model(**inputs, labels=labels, num_items_in_batch=5)
    width = labels.shape[1]
    chosen = torch.tensor([0, *range(width - 8, width - 1)])
    mask = torch.zeros(width, dtype=torch.bool).index_fill(0, chosen, True)
    for kept in (chosen, chosen - width, chosen.flip(0), mask):
        output = model(**inputs, labels=labels, logits_to_keep=kept, num_items_in_batch=5)
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(output.logits, expected.logits[:, kept])
    with pytest.raises(ValueError, match="logits_to_keep leaves out"):
        model(**inputs, labels=labels, logits_to_keep=chosen[:-1])


def test_encoded_audio_can_stand_in_for_features():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor.apply_transcription_request([noise(0.7), noise(2.0)])
    direct = model(**inputs).logits
    encoded = model.encode_audio(inputs.pop("input_features"), inputs.pop("input_features_mask"))
    torch.testing.assert_close(model(**inputs, **encoded).logits, direct)


def test_gradient_checkpointing_changes_nothing():
    processor = tiny_processor()
    inputs = processor(text=["<|audio|>abc"], audio=[noise(1.0)])
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(without_dropout())
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.projector.proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_a_frozen_encoder_stays_in_evaluation_mode():
    model = tiny_model()
    model.audio_tower.requires_grad_(False)
    model.train()
    assert not model.audio_tower.training and model.projector.training and model.language_model.training


def test_bfloat16_is_near_float32():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor.apply_transcription_request(noise(2.0))
    exact = model(**inputs).logits
    rounded = model.to(torch.bfloat16)(**inputs).logits.float()
    assert (exact - rounded).norm() / exact.norm() < 0.05


def test_headless_model_shares_the_checkpoint(tiny_checkpoint):
    headless = SalmonnModel.from_pretrained(tiny_checkpoint)
    full = SalmonnForConditionalGeneration.from_pretrained(tiny_checkpoint)
    assert isinstance(full, SalmonnModel)
    inputs = tiny_processor().apply_transcription_request(noise(1.0))
    hidden = headless(**inputs).last_hidden_state
    torch.testing.assert_close(full.get_output_embeddings()(hidden), full(**inputs).logits)


def test_a_sound_encoder_joins_in():
    """Any encoder of raw audio fits the second place; here a tiny Wav2Vec2 of other width and other length."""
    sound_config = Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
        conv_stride=(16, 20), conv_kernel=(16, 20), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, mask_time_prob=0.0,
    )  # fmt: skip
    config = tiny_config(sound_config=sound_config)
    assert config.projector_config.qformer_config.encoder_hidden_size == 16 + 24
    model, processor = tiny_model(config), tiny_processor(config)
    processor.feature_extractor.return_input_values = True
    clips = [noise(1.0, 1), noise(3.1, 2)]
    inputs = processor.apply_transcription_request(clips)
    batch = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    alone = model.generate(**processor.apply_transcription_request(clips[0]), max_new_tokens=4, do_sample=False)
    assert batch[0].tolist() == alone[0, -4:].tolist()
    silenced = inputs["input_values"].clone() * 0
    assert not torch.allclose(model(**inputs).logits, model(**{**inputs, "input_values": silenced}).logits, atol=1e-3)


@pytest.mark.parametrize("pad_to_30_seconds", [False, True])
def test_beats_joins_in(pad_to_30_seconds):
    """Clips of any length, alone as in a batch; the shortest are shorter than one of BEATs' patches."""
    sound_config = BeatsConfig(
        embed_dim=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    config = tiny_config(sound_config=sound_config, pad_to_30_seconds=pad_to_30_seconds)
    model, processor = tiny_model(config), tiny_processor(config)
    processor.feature_extractor.return_input_values = True
    processor.feature_extractor.pad_to_30_seconds = pad_to_30_seconds
    clips = [noise(seconds, seed) for seed, seconds in enumerate([0.05, 3.1, 0.6])]
    with torch.no_grad():
        batch = model(**processor.apply_transcription_request(clips)).logits[:, -1]
        for row, clip in enumerate(clips):
            alone = model(**processor.apply_transcription_request(clip)).logits[0, -1]
            torch.testing.assert_close(batch[row], alone, atol=1e-4, rtol=1e-4)


def test_sound_frames_of_the_speech_encoders_layers():
    """Sound frames are the mean of those layers' outputs in transformers' own encoder, and reach the answer."""
    model, processor = tiny_model(tiny_config(sound_layers=[1, 2])), tiny_processor()
    whisper = WhisperEncoder(model.config.audio_config).eval()
    whisper.load_state_dict(model.audio_tower.state_dict())
    features, mask = torch.randn(1, 80, 3000), torch.ones(1, 3000)
    encoded = model.encode_audio(features, mask)
    layers = whisper(features, output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(encoded["sound_frames"], sum(layers) / 2, atol=1e-5, rtol=0)
    assert encoded["sound_frames_mask"].equal(encoded["audio_frames_mask"])

    inputs = processor.apply_transcription_request([noise(1.0, 1), noise(3.1, 2)])
    alone = processor.apply_transcription_request(noise(1.0, 1))
    torch.testing.assert_close(model(**inputs).logits[0, -1], model(**alone).logits[0, -1], atol=1e-4, rtol=1e-4)
    frames = model.encode_audio(inputs.pop("input_features"), inputs.pop("input_features_mask"))
    silenced = frames | {"sound_frames": torch.randn_like(frames["sound_frames"])}
    assert not torch.allclose(model(**inputs, **frames).logits, model(**inputs, **silenced).logits, atol=1e-3)


@pytest.mark.parametrize("layers", [[], [0], [1, 3]])
def test_layers_that_the_speech_encoder_lacks_are_refused(layers):
    with pytest.raises(ValueError, match="layers, from 1 to 2"):
        tiny_config(sound_layers=layers)


def test_layers_and_a_sound_encoder_are_one_too_many():
    with pytest.raises(ValueError, match="leave out these or sound_config"):
        tiny_config(sound_layers=[1], sound_config=BeatsConfig())


def test_tied_and_untied_language_models():
    for tied in (False, True):
        config = tiny_config(text_config=tiny_text_config(tie_word_embeddings=tied))
        model = SalmonnForConditionalGeneration(config)
        same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert same == tied


def test_outputs_as_tuples():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor.apply_transcription_request(noise(1.0))
    clips = {name: inputs[name] for name in ("input_features", "input_features_mask")}
    expected, headless = model(**inputs), SalmonnModel.forward(model, **inputs)
    for how in ({"return_dict": False}, {}):
        model.config.return_dict = bool(how)
        torch.testing.assert_close(model(**inputs, **how)[0], expected.logits)
        assert model(**inputs, **how, labels=inputs["input_ids"])[0].ndim == 0
        assert torch.equal(SalmonnModel.forward(model, **inputs, **how)[0], headless.last_hidden_state)
        assert isinstance(model.get_audio_features(**clips, **how), tuple)
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_audio_features_with_the_encoders_layers():
    config = tiny_config(sound_layers=[1])
    config._attn_implementation = "eager"
    model = tiny_model(config)
    features = SalmonnFeatureExtractor()([noise(1.0), noise(0.4)], return_tensors="pt")
    plain = model.get_audio_features(**features)
    assert plain.hidden_states is None and plain.attentions is None
    full = model.get_audio_features(**features, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(full.pooler_output, plain.pooler_output)
    assert len(full.hidden_states) == 3 and len(full.attentions) == 2
    torch.testing.assert_close(full.hidden_states[-1], full.last_hidden_state)
    assert full.attentions[0].shape == (2, 2, 60, 60)


def test_a_mask_of_the_features_may_be_left_out():
    model = tiny_model()
    features = SalmonnFeatureExtractor()([noise(1.0)], return_tensors="pt")
    with_mask = model.get_audio_features(**features).pooler_output
    torch.testing.assert_close(model.get_audio_features(features["input_features"]).pooler_output, with_mask)


def test_the_parts_by_their_general_names():
    model = tiny_model()
    assert model.get_encoder("audio") is model.audio_tower and model.get_decoder() is model.language_model
    assert model.get_encoder() is model  # there is no encoder of text


@pytest.mark.parametrize("settings", [{}, {"num_layers": 1}])
def test_a_model_can_be_copied_after_a_pass(settings):
    config = tiny_config(**settings)
    model, processor = tiny_model(config), tiny_processor(config)
    inputs = processor.apply_transcription_request(noise(1.0))
    logits = model(**inputs).logits
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, logits)


def test_the_speech_encoders_layers_where_its_config_asks():
    config = tiny_config()
    config.audio_config.output_hidden_states = True
    features = tiny_processor(config).feature_extractor([noise(1.0)], return_tensors="pt")
    assert len(tiny_model(config).get_audio_features(**features).hidden_states) == 3
    assert tiny_model().get_audio_features(**features).hidden_states is None


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2"])
def test_a_static_cache_changes_no_token(model_type):
    model, processor = tiny_model(tiny_config(model_type)), tiny_processor()
    inputs = processor.apply_transcription_request([noise(1.0), noise(0.5)])
    settings = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    assert model.generate(**inputs, **settings, cache_implementation="static").tolist() == plain.tolist()
