"""Quantised checkpoints as transformers knows them: their `quantization_config`, and the quantiser that it names."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_quantized_layers import QUANTIZATION, quantized_tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    WhisperForConditionalGeneration,
)

import salmonn_hf
from salmonn_hf import SalmonnConfig, SalmonnForConditionalGeneration, SalmonnQuantizationConfig
from salmonn_hf.model.checkpoint import config_from_base_parts
from salmonn_hf.model.quantized_layers import QuantizedEmbedding, QuantizedLinear, quantize_parts
from salmonn_hf.model.quantizer_salmonn import quantize_in_place, set_quantized_parts

DTYPES = [torch.float32, torch.bfloat16]
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


def tied_config():
    return tiny_config(text_config=tiny_text_config(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A checkpoint with all of its weights in floating point."""
    directory = tmp_path_factory.mktemp("full")
    tiny_model(tied_config()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A checkpoint of a projector and LoRA, on base parts in float32."""
    root = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    WhisperForConditionalGeneration(tiny_config().audio_config).save_pretrained(root / "whisper")
    AutoModelForCausalLM.from_config(tied_config().text_config).save_pretrained(root / "llm")
    tiny_tokenizer().save_pretrained(root / "llm")
    projector = tiny_config().projector_config.to_dict()
    config = config_from_base_parts(str(root / "whisper"), str(root / "llm"), projector, audio_token_id=3)
    model = SalmonnForConditionalGeneration.from_base_parts(config)
    model.add_lora(LORA)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or name.startswith("projector"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.fixture
def quantised(tmp_path):
    """A checkpoint of 4 and 8 bits, and its model."""
    model = quantized_tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised", model


def test_config_round_trip(tmp_path):
    """`config.json` has it as transformers writes any; `AutoConfig` needs no model for it."""
    config = tiny_config()
    assert config.quantized_parts == {} and config.library_quantization is None
    assert "quantization_config" not in config.to_dict()
    set_quantized_parts(config, QUANTIZATION)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "salmonn", "parts": QUANTIZATION, "language_model": None}
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SalmonnConfig and loaded.quantization_config == written
    assert loaded.quantized_parts == QUANTIZATION and loaded.library_quantization is None
    again = SalmonnQuantizationConfig.from_dict(written)
    assert again.to_dict() == written
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == written
    set_quantized_parts(loaded, {})
    assert "quantization_config" not in loaded.to_dict() and loaded.quantized_parts == {}


def test_another_librarys_format_stays_in_the_config(tmp_path):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["audio_tower"])
    config = tiny_config()
    config.quantization_config = SalmonnQuantizationConfig({"projector": {"bits": 8}}, nf4)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.library_quantization == json.loads(json.dumps(nf4.to_dict()))
    set_quantized_parts(loaded, {})  # as where the projector is trained on
    assert loaded.quantized_parts == {} and loaded.library_quantization["quant_method"] == "bitsandbytes"
    plain = tiny_config()
    plain.quantization_config = nf4  # as from_pretrained(..., quantization_config=nf4) leaves it
    assert plain.quantized_parts == {} and plain.library_quantization["bnb_4bit_quant_type"] == "nf4"


def test_unusable_settings_are_refused(full):
    with pytest.raises(TypeError, match="part'"):
        SalmonnQuantizationConfig(part=QUANTIZATION)
    with pytest.raises(ValueError, match="language model is in parts, and has another library's"):
        SalmonnQuantizationConfig(QUANTIZATION, BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="no part 'encoder'"):
        AutoModel.from_pretrained(full, quantization_config=SalmonnQuantizationConfig({"encoder": {"bits": 8}}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_checkpoint_is_rounded_while_it_is_loaded(full, dtype, tmp_path):
    settings = SalmonnQuantizationConfig(QUANTIZATION)
    model = AutoModel.from_pretrained(full, dtype=dtype, quantization_config=settings)
    expected = AutoModel.from_pretrained(full, dtype=dtype)
    quantize_parts(expected, QUANTIZATION)
    assert isinstance(model.audio_tower.layers[0].fc1, QuantizedLinear)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert_same_weights(model, expected)
    inputs = tiny_processor().apply_transcription_request([noise(1.0), noise(0.4)])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.dtype == dtype and again.config.quantized_parts == QUANTIZATION
    assert_same_weights(again, model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_checkpoint_is_rounded_while_it_is_loaded(adapter, dtype, tmp_path):
    """And what is saved of it, the projector and LoRA alone, gives the same model, whatever the precision of both."""
    model = AutoModel.from_pretrained(
        adapter, dtype=dtype, quantization_config=SalmonnQuantizationConfig(QUANTIZATION)
    )
    expected = AutoModel.from_pretrained(adapter)  # its files are in float32
    quantize_parts(expected, QUANTIZATION)
    assert_same_weights(model, expected.to(dtype))
    assert isinstance(model.language_model.model.layers[0].self_attn.q_proj.base_layer, QuantizedLinear)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(".lora_" in name or name.startswith("projector.") for name in saved)
    assert saved["projector.proj.weight"].dtype == torch.int8
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.quantized_parts == QUANTIZATION and again.dtype == dtype
    assert_same_weights(again, model)


def test_one_that_is_quantised_already_stays_as_it_is(adapter, quantised, tmp_path):
    """transformers says so."""
    directory, model = quantised
    other = SalmonnQuantizationConfig({"language_model": {"bits": 8}})
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert_same_weights(AutoModel.from_pretrained(directory, quantization_config=other), model)
    first = AutoModel.from_pretrained(adapter, quantization_config=SalmonnQuantizationConfig(QUANTIZATION))
    first.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert_same_weights(AutoModel.from_pretrained(tmp_path / "adapter", quantization_config=other), first)


@pytest.mark.parametrize("given", [False, True])
def test_a_quantised_checkpoint_is_saved_again_to_the_bit(quantised, given, tmp_path):
    """Also after a forward pass, and from a state dict that is given: Trainer does so, of sharded models too."""
    directory, model = quantised
    loaded = AutoModel.from_pretrained(directory)
    assert_same_weights(loaded, model)
    assert not loaded.is_quantized and getattr(loaded, "hf_quantizer", None) is None
    with torch.no_grad():
        loaded(**tiny_processor().apply_transcription_request([noise(1.0)]))
    state_dict = loaded.state_dict() if given else None
    if given:
        state_dict["projector.proj.bias"] = state_dict["projector.proj.bias"] + 1
    loaded.save_pretrained(tmp_path / "again", state_dict=state_dict)
    first, second = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    if given:
        first["projector.proj.bias"] += 1
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"]["parts"] == QUANTIZATION


def test_the_config_of_a_loaded_model_loads_and_is_left_alone(quantised, adapter):
    directory, model = quantised
    config = AutoModel.from_pretrained(directory).config
    settings = config.quantization_config
    assert_same_weights(AutoModel.from_pretrained(directory, config=config), model)
    assert config.quantization_config is settings and config.quantized_parts == QUANTIZATION
    config = AutoModel.from_pretrained(adapter, quantization_config=SalmonnQuantizationConfig(QUANTIZATION)).config
    fresh = SalmonnForConditionalGeneration.from_base_parts(config)  # of base parts that are rounded likewise
    assert isinstance(fresh.audio_tower.layers[0].fc1, QuantizedLinear)
    given = AutoConfig.from_pretrained(adapter)
    AutoModel.from_pretrained(adapter, config=given, quantization_config=SalmonnQuantizationConfig(QUANTIZATION))
    assert given.quantized_parts == {}


def test_quantising_in_place_adds_to_what_is_noted(tmp_path):
    model = tiny_model(tied_config())
    quantize_in_place(model, {"projector": {"bits": 8}})
    quantize_in_place(model, {"embedding": {"bits": 8}})
    assert model.config.quantized_parts == {"projector": {"bits": 8}, "embedding": {"bits": 8}}
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModel.from_pretrained(tmp_path), model)


def test_trainer_takes_a_quantised_checkpoint(quantised, tmp_path):
    """It refuses what transformers counts as quantised, unless that is wrapped by PEFT."""
    model = AutoModel.from_pretrained(quantised[0])
    model.requires_grad_(False)
    model.add_lora(LORA)
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False, learning_rate=0.1
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(model, arguments, train_dataset=[inputs], data_collator=lambda examples: dict(examples[0]))
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".lora_B." in name for name in changed)
    trainer.save_model(tmp_path / "trained")
    saved = load_file(tmp_path / "trained" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    loaded = AutoModel.from_pretrained(tmp_path / "trained")
    assert loaded.config.quantized_parts == QUANTIZATION and not loaded.is_quantized


def test_peft_wraps_a_quantised_checkpoint(quantised, tmp_path):
    model = get_peft_model(AutoModel.from_pretrained(quantised[0]), LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()


ORDERS = {
    "the package first": "import salmonn_hf; packaged = load(); remote = load_remote()",
    "the checkpoint's code first": "remote = load_remote(); import salmonn_hf; packaged = load()",
}
SCRIPT = """
import sys, torch, numpy
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

directory, clip = sys.argv[1], numpy.load(sys.argv[2])

def load():
    from salmonn_hf import SalmonnForConditionalGeneration
    return SalmonnForConditionalGeneration.from_pretrained(directory)

def load_remote():
    model_class = get_class_from_dynamic_module("modeling_salmonn.SalmonnForConditionalGeneration", directory)
    return model_class.from_pretrained(directory)

{order}
processor = salmonn_hf.SalmonnProcessor.from_pretrained(directory)
inputs = processor.apply_transcription_request([clip])
with torch.no_grad():
    for model in (packaged, remote):
        layers = [layer for layer in model.modules() if type(layer).__name__.startswith("Quantized")]
        own = type(model).__module__.rpartition(".")[0]
        assert layers and {{type(layer).__module__.rpartition(".")[0] for layer in layers}} == {{own}}, own
        numpy.save(sys.argv[3] + own.split(".")[0], model(**inputs).logits.float().numpy())
"""


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=[pytest.mark.slow] * order.startswith("the package")) for order in ORDERS]
)
def test_the_package_and_a_checkpoints_own_code_in_one_process(quantised, order, tmp_path):
    directory, model = quantised
    tiny_processor(model.config).save_pretrained(directory)
    clip = noise(0.5)
    np.save(tmp_path / "clip.npy", clip)
    package = str(Path(salmonn_hf.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(order=ORDERS[order]), directory, tmp_path / "clip.npy", f"{tmp_path}/"],
        capture_output=True, text=True, env={"PYTHONPATH": package, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    with torch.no_grad():
        inputs = tiny_processor(model.config).apply_transcription_request([clip])
        expected = AutoModel.from_pretrained(directory)(**inputs).logits.float()
    for name in ("salmonn_hf", "transformers_modules"):
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / f"{name}.npy")), expected, atol=0, rtol=0)
