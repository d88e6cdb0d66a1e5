"""Adapters as transformers and PEFT know them: the trained LoRA, others beside it, and what PEFT writes."""

import copy
import json
import pickle

import pytest
import torch
from conftest import (
    ENCODER_LORA,
    LORA,
    noise,
    randomise_lora,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
)  # fmt: skip
from peft import IA3Config, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, WhisperForConditionalGeneration, pipeline

from salmonn_hf import SalmonnConfig, SalmonnForConditionalGeneration
from salmonn_hf.model.quantizer_salmonn import quantize_in_place

SECOND = {"r": 2, "target_modules": ["q_proj", "v_proj", "fc1"]}
MERGE_FIRST = r"LoRA of its own.*model\.merge_lora\(\)"


def logits(model):
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    with torch.no_grad():
        return model.eval()(**inputs).logits


def close(model, expected):
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A checkpoint with LoRA in both parts, of two ranks, and its model."""
    directory, model = tmp_path_factory.mktemp("own"), tiny_model(tiny_config(lora=LORA))
    model.add_lora(ENCODER_LORA, "audio_tower")
    randomise_lora(model).save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory, model


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint without LoRA, and its model."""
    directory, model = tmp_path_factory.mktemp("bare"), tiny_model()
    model.save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory, model


def merged_by_hand(model):
    """A model without adapters whose weights are those of `model` plus scale * B A of every adapter."""
    state_dict, merged = {}, tiny_model()
    for name, value in model.state_dict().items():
        if ".lora_" not in name:
            state_dict[name.replace(".base_layer.", ".")] = value.clone()
    for name, layer in model.named_modules():
        for adapter in getattr(layer, "lora_A", ()):
            product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
            state_dict[f"{name}.weight"] += layer.lora_alpha[adapter] / layer.r[adapter] * product
    merged.load_state_dict(state_dict)
    return merged


def with_second(directory):
    """A checkpoint's model with a second adapter that changes the output."""
    model = AutoModel.from_pretrained(directory)
    model.add_adapter(LoraConfig(**SECOND), "second")
    return randomise_lora(model, "lora_A.second") and randomise_lora(model, "lora_B.second", seed=1)


def wrapped(directory, **settings):
    """A `PeftModel` around a checkpoint's model, with an adapter that changes the output."""
    return randomise_lora(get_peft_model(AutoModel.from_pretrained(directory), LoraConfig(**SECOND, **settings)))


# The trained LoRA


def test_the_trained_lora_is_the_adapter_default(own):
    model = AutoModel.from_pretrained(own[0])
    assert model.active_adapters() == ["default"] and list(model.peft_config) == ["default"]
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(own[1]))


def test_switched_off_and_on(own):
    model = AutoModel.from_pretrained(own[0])
    model.disable_adapters()
    without = logits(model)
    bare = merged_by_hand(own[1])
    bare.load_state_dict(
        {n.replace(".base_layer.", "."): v for n, v in own[1].state_dict().items() if ".lora_" not in n}
    )
    assert torch.equal(without, logits(bare)) and not torch.allclose(without, logits(own[1]), atol=1e-2)
    model.enable_adapters()
    assert torch.equal(logits(model), logits(own[1]))


def test_peft_reads_what_the_checkpoint_has(own):
    """The config puts layers of the same ranks and scales into a model without LoRA, of which the weights fit."""
    config = PeftConfig.from_pretrained(own[0])
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 8, str(own[0]))
    model = inject_adapter_in_model(PeftConfig.from_pretrained(own[0]), torch.nn.ModuleDict(bare_parts(own[1])))
    trained = {n: v for n, v in own[1].state_dict().items() if ".lora_" in n}
    assert {n: v.shape for n, v in model.state_dict().items() if ".lora_" in n} == {
        n: v.shape for n, v in trained.items()
    }
    scales = {n: m.scaling for n, m in own[1].named_modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")}
    assert scales == {n: m.scaling for n, m in model.named_modules() if hasattr(m, "lora_A")}


def bare_parts(model):
    return {name: getattr(tiny_model(), name) for name, _ in model.named_children()}


def test_its_state_dict_there_and_back(own):
    model = AutoModel.from_pretrained(own[0])
    weights, config = model.get_adapter_state_dict(), copy.deepcopy(model.peft_config["default"])
    assert len(weights) == 2 * (4 + 6)
    model.delete_adapter("default")
    assert not torch.allclose(logits(model), logits(own[1]), atol=1e-2)
    model.load_adapter(peft_config=config, adapter_state_dict=weights)
    assert torch.equal(logits(model), logits(own[1]))


def test_its_directory_is_loaded_as_an_adapter(own):
    model = AutoModel.from_pretrained(own[0])
    with pytest.raises(ValueError, match="use a different name"):
        model.load_adapter(own[0])
    model.delete_adapter("default")
    model.load_adapter(own[0])
    assert torch.equal(logits(model), logits(own[1]))


def test_deleted_it_is_not_saved(own, tmp_path):
    model = AutoModel.from_pretrained(own[0])
    model.delete_adapter("default")
    assert not any("base_layer" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.lora is None
    assert not (tmp_path / "adapter_config.json").exists()


def test_saved_over_a_checkpoint_with_lora(own, tmp_path):
    """Its adapter_config.json does not stay."""
    model = AutoModel.from_pretrained(own[0])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    model.merge_lora().save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), logits(own[1]))
    assert not (tmp_path / "adapter_config.json").exists()


def test_gradient_checkpointing_goes_on_and_off(own):
    model = AutoModel.from_pretrained(own[0]).train()
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    model.activation_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.language_model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad.norm() > 0
    model.activation_checkpointing_disable()
    assert torch.equal(logits(model), logits(own[1]))


def test_a_copy_has_its_adapters(own):
    for model in (copy.deepcopy(own[1]), pickle.loads(pickle.dumps(own[1]))):
        assert model.active_adapters() == ["default"]
        assert torch.equal(logits(model), logits(own[1]))


# A second adapter beside it


def test_a_new_adapter_changes_nothing_and_is_trained_alone(own):
    model = AutoModel.from_pretrained(own[0])
    model.add_adapter(LoraConfig(**SECOND), "second")
    assert model.active_adapters() == ["default", "second"]
    assert torch.equal(logits(model), logits(own[1]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 5 and all(".second." in name for name in trained)


def test_both_are_heard(own):
    model = with_second(own[0])
    expected = logits(merged_by_hand(model))
    assert not torch.allclose(expected, logits(own[1]), atol=1e-2)
    close(model, expected)
    close(copy.deepcopy(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(own[1]))
    model.set_adapter(["default", "second"])
    close(model, expected)
    close(model.merge_lora(), expected)


def test_a_second_adapter_deleted(own, tmp_path):
    model = with_second(own[0])
    model.delete_adapter("second")
    assert model.active_adapters() == ["default"] and torch.equal(logits(model), logits(own[1]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(own[1]))


@pytest.mark.parametrize("name", [None, "default"])
def test_a_name_that_is_taken_is_refused(own, name):
    model = AutoModel.from_pretrained(own[0])
    with pytest.raises(ValueError, match="default already exists. Please use a different name"):
        model.add_adapter(LoraConfig(**SECOND), name)
    assert torch.equal(logits(model), logits(own[1]))


@pytest.mark.parametrize("checkpoint", ["own", "bare"])
def test_an_adapter_that_cannot_be_put_in_leaves_the_model_as_it_was(checkpoint, request, tmp_path):
    directory, original = request.getfixturevalue(checkpoint)
    model = AutoModel.from_pretrained(directory)
    adapters = list(getattr(model, "peft_config", ()))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter(LoraConfig(target_modules=["no_such_layer"]), "second")
    other = tiny_model(tiny_config(text_config=tiny_text_config(hidden_size=48, head_dim=12)))
    get_peft_model(other, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit this model, .*second.*Load it into the checkpoint"):
        model.load_adapter(tmp_path, "second")
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert list(getattr(model, "peft_config", ())) == adapters
    assert torch.equal(logits(model), logits(original))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "again")), logits(original))


def test_a_second_adapter_is_saved_alone_and_loaded_everywhere(own, tmp_path):
    model = with_second(own[0])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert model.active_adapters() == ["default", "second"]
    assert not (tmp_path / "model.safetensors").exists()
    later = AutoModel.from_pretrained(own[0])
    later.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="no hotswap; leave it out"):
        later.load_adapter(tmp_path, "second", hotswap=True)
    named, report = SalmonnForConditionalGeneration.from_pretrained(
        tmp_path, adapter_name="mine", output_loading_info=True
    )
    assert not report["missing_keys"] and named.active_adapters() == ["default", "mine"]
    transcriber = pipeline("automatic-speech-recognition", model=str(tmp_path))
    for loaded in (AutoModel.from_pretrained(tmp_path), later, named, transcriber.model):
        close(loaded, expected)


@pytest.mark.parametrize("active", ["second", "default"])
def test_what_would_be_loaded_otherwise_is_not_saved(own, active, tmp_path):
    model = with_second(own[0])
    model.set_adapter(active)
    with pytest.raises(ValueError, match=r"set_adapter\(\['default', 'second'\]\).*merge_lora\(\)"):
        model.save_pretrained(tmp_path)


def test_an_adapter_without_its_base_is_not_saved(own, tmp_path):
    model = with_second(own[0])
    model.delete_adapter("default")  # which the checkpoint has still
    never_saved = tiny_model()
    never_saved.add_adapter(LoraConfig(**SECOND))
    for each in (model, never_saved):
        expected = logits(each)
        with pytest.raises(ValueError, match="without its base.*Call merge_lora"):
            each.save_pretrained(tmp_path)
        each.merge_lora().save_pretrained(tmp_path)
        close(AutoModel.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize("merged", [["default", "second"], ["second"], ["default"]])
def test_an_adapter_of_a_merged_model_names_a_base_that_has_the_same(own, merged, tmp_path):
    model = with_second(own[0])
    model.set_adapter(merged)
    model.merge_lora().add_adapter(LoraConfig(**SECOND), "third")
    expected = logits(randomise_lora(model, "lora_B.third"))
    if merged == ["default"]:
        model.save_pretrained(tmp_path)
    else:
        with pytest.raises(ValueError, match="without its base.*Call merge_lora"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        model.merge_lora().save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), expected)


def test_a_checkpoint_that_lora_was_put_into_is_no_base(bare, tmp_path):
    model = AutoModel.from_pretrained(bare[0])
    model.add_lora(LORA)
    randomise_lora(model).add_adapter(LoraConfig(**SECOND), "second")
    with pytest.raises(ValueError, match="without its base"):
        model.save_pretrained(tmp_path)


def test_an_adapter_put_beside_disabled_ones_enables_them(own, tmp_path):
    model = with_second(own[0])
    model.save_pretrained(tmp_path)
    expected = logits(model)
    model.delete_adapter("second")
    model.disable_adapters()
    model.load_adapter(tmp_path, "second")
    close(model, expected)
    model.disable_adapters()
    model.add_adapter(LoraConfig(r=2, target_modules=["down_proj"]), "third")
    close(model, expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".third." in name for name in trained)


def test_disabled_adapters_are_not_merged(bare):
    model = AutoModel.from_pretrained(bare[0])
    model.add_adapter(LoraConfig(**SECOND, modules_to_save=["projector"]))
    model.projector.modules_to_save["default"].proj.weight.data += 0.1
    expected = logits(randomise_lora(model))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(bare[1]))
    with pytest.raises(ValueError, match=r"disabled.*enable_adapters\(\)"):
        model.merge_lora()
    assert torch.equal(logits(model), logits(bare[1]))
    model.enable_adapters()
    close(model, expected)
    close(model.merge_lora(), expected)


def test_modules_to_save_are_saved_and_merged(bare, tmp_path):
    model = AutoModel.from_pretrained(bare[0])
    model.add_adapter(LoraConfig(**SECOND, modules_to_save=["projector"]))
    model.projector.modules_to_save["default"].proj.weight.data += 0.1
    expected = logits(randomise_lora(model))
    model.save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), expected)
    model.merge_lora().save_pretrained(tmp_path / "merged")
    close(AutoModel.from_pretrained(tmp_path / "merged"), expected)


KINDS = {
    "dora": lambda: LoraConfig(**SECOND, use_dora=True),
    "rslora": lambda: LoraConfig(**SECOND, use_rslora=True),
    "ia3": lambda: IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "lokr": lambda: LoKrConfig(target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds(own, kind, tmp_path):
    """Around the layers of LoRA, or in them: saved, loaded, merged and taken out."""
    model = AutoModel.from_pretrained(own[0])
    model.add_adapter(KINDS[kind](), "second")
    close(model, logits(own[1]))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = logits(model)
    assert not torch.allclose(expected, logits(own[1]), atol=1e-2)
    model.save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), expected)
    close(copy.deepcopy(model).merge_lora(), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model), logits(own[1]))


def test_trained_tokens_beside_another_adapter_are_refused(own, bare, tmp_path):
    config = LoraConfig(**SECOND, trainable_token_indices=[5, 6])
    with pytest.raises(ValueError, match=r"trainable_token_indices.*merge_lora\(\)"):
        AutoModel.from_pretrained(own[0]).add_adapter(config, "second")
    model = randomise_lora(get_peft_model(AutoModel.from_pretrained(bare[0]), config))
    model.save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), logits(model))


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_an_adapter_that_changes_weights_is_not_taken_out(bare, option, tmp_path):
    model = AutoModel.from_pretrained(bare[0])
    model.add_adapter(LoraConfig(**SECOND, **option), "second")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    expected = logits(model)
    with pytest.raises(ValueError, match="'second'.*(init_lora_weights|bias)=.*Load the checkpoint again"):
        model.delete_adapter("second")
    close(model, expected)
    model.save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), expected)
    close(model.merge_lora(), expected)


def test_adapters_inside_a_part_are_not_lost(bare, tmp_path):
    model = AutoModel.from_pretrained(bare[0])
    model.language_model.add_adapter(LoraConfig(**SECOND))
    expected = logits(randomise_lora(model))
    with pytest.raises(ValueError, match=r"put into a part of the model.*merge_lora\(\)"):
        model.save_pretrained(tmp_path)
    model.merge_lora().save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), expected)


# PEFT's own model


@pytest.mark.parametrize("name", ["default", "second"])
def test_peft_around_a_model_with_lora_is_refused(own, name):
    model, config = AutoModel.from_pretrained(own[0]), LoraConfig(**SECOND)
    for put_in in (
        lambda: get_peft_model(model, config, adapter_name=name),
        lambda: get_peft_model(model, config, adapter_name=name, mixed=True),
        lambda: get_peft_model(model.language_model, config, adapter_name=name),
        lambda: inject_adapter_in_model(config, model, name),
        lambda: PeftModel.from_pretrained(model, own[0], adapter_name=name),
    ):
        with pytest.raises(ValueError, match=MERGE_FIRST):
            put_in()
    assert model.active_adapters() == ["default"] and torch.equal(logits(model), logits(own[1]))


def test_peft_is_told_where_the_weights_of_a_checkpoint_are(own):
    model = AutoModel.from_pretrained(own[0])
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"whole checkpoint.*model\.load_adapter"):
        PeftModel.from_pretrained(model, own[0])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_new_peft_model_is_the_model(bare, task_type):
    model = get_peft_model(AutoModel.from_pretrained(bare[0]), LoraConfig(**SECOND, task_type=task_type))
    assert torch.equal(logits(model), logits(bare[1]))
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    answers = [each.generate(**inputs, max_new_tokens=4) for each in (model, bare[1])]
    assert torch.equal(*answers)


def test_what_peft_saves_is_loaded_everywhere(bare, tmp_path):
    model = wrapped(bare[0])
    expected = logits(model)
    close(merged_by_hand(model.base_model.model), expected)
    model.save_pretrained(tmp_path)
    later = AutoModel.from_pretrained(bare[0])
    later.load_adapter(tmp_path)
    for loaded in (
        AutoModel.from_pretrained(tmp_path),
        SalmonnForConditionalGeneration.from_pretrained(tmp_path),
        PeftModel.from_pretrained(AutoModel.from_pretrained(bare[0]), tmp_path),
        later,
    ):
        close(loaded, expected)
    later.delete_adapter("default")
    later.save_pretrained(tmp_path / "without")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "without")), logits(bare[1]))


def test_an_adapter_of_the_merged_model_fits_the_checkpoint(own, tmp_path):
    model = randomise_lora(get_peft_model(AutoModel.from_pretrained(own[0]).merge_lora(), LoraConfig(**SECOND)))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.active_adapters() == ["default", "adapter"]
    close(loaded, logits(model))


def test_an_adapter_in_the_directory_of_its_checkpoint(bare, tmp_path):
    model = wrapped(bare[0])
    AutoModel.from_pretrained(bare[0]).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), logits(model))


def test_merged_and_unmerged(bare, tmp_path):
    model = wrapped(bare[0])
    expected = logits(model)
    model.merge_adapter()
    close(model, expected)
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\)"):
        model.get_base_model().save_pretrained(tmp_path)
    model.unmerge_adapter()
    close(model, expected)
    with model.disable_adapter():
        close(model, logits(bare[1]))


def test_unloaded_it_is_saved_as_it_was(bare, tmp_path):
    wrapped(bare[0]).unload().save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(bare[1]))


def test_merged_and_unloaded_it_is_saved_as_it_is(bare, tmp_path):
    model = wrapped(bare[0])
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    close(AutoModel.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize("base", [None, "nobody/no-such-checkpoint", "language model"])
def test_an_adapter_of_nothing_is_refused(bare, base, tmp_path, monkeypatch):
    wrapped(bare[0]).save_pretrained(tmp_path)
    if base == "language model":
        base = str(tmp_path / "llm")
        bare[1].language_model.save_pretrained(base)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    monkeypatch.setattr("salmonn_hf.model.modeling_salmonn.SalmonnModel.__init__", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"is an adapter.*model\.load_adapter"):
        SalmonnForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no config.json"):
        SalmonnConfig.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_kind_is_refused(bare, tmp_path):
    bare[1].language_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama', not of a SALMONN"):
        SalmonnForConditionalGeneration.from_pretrained(tmp_path)


# Weights of few bits


@pytest.mark.parametrize("settings", [{"bits": 4, "group_size": 32}, {"bits": 8}])
def test_lora_beside_few_bits(own, settings, tmp_path):
    """It is saved and loaded twice; PEFT would merge it into integers without a word, or fail half-way."""
    model = AutoModel.from_pretrained(own[0])
    quantize_in_place(model, {"language_model": settings})
    expected = logits(model)
    for directory in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(directory)
        model = AutoModel.from_pretrained(directory)
        assert model.active_adapters() == ["default"] and torch.equal(logits(model), expected)
    model.add_adapter(LoraConfig(**SECOND), "second")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="cannot be merged into 4 or 8 bits, as language_model is"):
        model.merge_lora()


@pytest.mark.parametrize("settings", [{"bits": 4, "group_size": 32}, {"bits": 8}])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_peft_does_not_merge_into_few_bits(bare, settings, safe_merge):
    model = AutoModel.from_pretrained(bare[0])
    quantize_in_place(model, {"language_model": settings})
    before = logits(model)
    model = randomise_lora(get_peft_model(model, LoraConfig(**SECOND)))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into 4 or 8 bits"):
            merge(safe_merge=safe_merge)
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("base_parts", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_lora_beside_nf4_is_saved_again(base_parts, double, tmp_path):
    """In bitsandbytes' format the language model is no base part any more. Before any inference: see the docs."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e .[quant]")
    text = tiny_text_config(hidden_size=64, head_dim=16, num_key_value_heads=4, intermediate_size=128)
    model = randomise_lora(tiny_model(tiny_config(text_config=text, lora=LORA)))
    if base_parts:
        WhisperForConditionalGeneration(model.config.audio_config).save_pretrained(tmp_path / "whisper")
        AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "llm")
        parts = {"audio_tower": str(tmp_path / "whisper"), "language_model": str(tmp_path / "llm")}
        model.config.base_parts = parts
    model.save_pretrained(tmp_path / "wide")
    kept = ["audio_tower", "projector", "language_model.lm_head", r".*\.lora_[AB]"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double, llm_int8_skip_modules=kept,
    )  # fmt: skip
    model = AutoModel.from_pretrained(tmp_path / "wide", quantization_config=nf4, dtype=torch.float32)
    model.save_pretrained(tmp_path / "one")
    AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = AutoModel.from_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="cannot be merged into 4 or 8 bits"):
        again.merge_lora()
    assert again.active_adapters() == ["default"]
    assert type(again.language_model.model.layers[0].mlp.down_proj.base_layer).__name__ == "Linear4bit"
    assert torch.equal(logits(again), logits(model))
