"""Training with the language model in 4 bits."""

# ruff: noqa: F811 (fixtures of another file)

import pytest
import torch
import yaml
from conftest import noise, tiny_processor
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import ROOT, history, parts, run, stage1_model  # noqa: F401
from transformers import AutoModelForCausalLM

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.model.quantized_layers import linears, quantized_module
from salmonn_hf.model.quantizer_salmonn import quantize_in_place
from salmonn_hf.training.trainer import SalmonnTrainer


def qlora_recipe(parts, output, start, **overrides):
    """The repository's recipe with other data, sizes and steps."""
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "small" / "stage2_qlora.yaml").read_text())
    changes = {
        "model_name_or_path": str(start),
        "sources": [{"path": str(parts / "train.parquet"), "task": "asr"}],
        "eval_sources": [{"path": str(parts / "eval.parquet"), "task": "asr"}],
        "feature_cache": str(parts / "cache"),
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "warmup_steps": 0,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    return recipe | changes | overrides


def logits_of(model):
    inputs = tiny_processor(model.config).apply_transcription_request([noise(1.0), noise(0.4)])
    with torch.no_grad():
        return model(**inputs).logits


def test_qlora_by_its_recipe_and_resumed(parts, stage1_model, tmp_path, monkeypatch):
    """Evaluation in the middle packs the weights for torch's kernel; the best checkpoint is loaded behind it."""
    trained, evaluate = [], SalmonnTrainer.evaluate

    def keep_model(trainer, *args, **kwargs):
        trained.append(trainer.model)
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(SalmonnTrainer, "evaluate", keep_model)
    run("run_stage2.py", qlora_recipe(parts, tmp_path / "two", stage1_model), tmp_path, monkeypatch)
    model = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert torch.equal(logits_of(model), logits_of(trained[-1].eval()))  # which was run before it was saved
    layers = linears(model.language_model)
    assert len(layers) == 14 and all(layer.weight.dtype == torch.uint8 for layer in layers.values())
    base = AutoModelForCausalLM.from_pretrained(stage1_model.parent / "llm")
    for name, layer in layers.items():  # frozen: still the base part's values, rounded
        layer.unpack()
        expected = quantized_module(base.get_submodule(name.replace(".base_layer", "")), 4, 64)
        assert torch.equal(layer.weight, expected.weight), name
    with safe_open(tmp_path / "two" / "model.safetensors", "pt") as file:
        assert not [k for k in file.keys() if k.startswith("language_model") and ".lora_" not in k]
        assert sum(".lora_" in key for key in file.keys()) == 28
    config = model.config.from_pretrained(tmp_path / "two")
    config.quantization_config = None  # on the base part as it is, into which LoRA can be merged
    wide = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two", config=config, dtype=torch.float32)
    for name, layer in linears(wide.language_model).items():
        assert torch.equal(layer.weight, base.get_submodule(name.replace(".base_layer", "")).weight), name
    before = logits_of(wide)
    torch.testing.assert_close(logits_of(wide.merge_lora()), before, rtol=1e-4, atol=1e-4)
    # Another run is broken off after two steps; its checkpoint is reloaded, evaluated and trained on.
    recipe = qlora_recipe(parts, tmp_path / "broken", stage1_model)
    step = SalmonnTrainer.training_step

    def broken_step(trainer, *args):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args)

    monkeypatch.setattr(SalmonnTrainer, "training_step", broken_step)
    with pytest.raises(KeyboardInterrupt):
        run("run_stage2.py", recipe, tmp_path, monkeypatch)
    monkeypatch.setattr(SalmonnTrainer, "training_step", step)
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    weights = [load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("two", "broken")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("start", ["quantised", "full"])
def test_qlora_from_a_full_checkpoint(parts, stage1_model, start, tmp_path, monkeypatch):
    """As training/quantize.py makes it, LoRA kept and the projector in 8 bits; or in bfloat16, rounded on the way."""
    model = SalmonnForConditionalGeneration.from_pretrained(stage1_model, dtype=torch.bfloat16)
    projector = model.projector.proj.weight.detach().clone()
    model.config.base_parts = None
    if start == "quantised":
        model.add_lora({"r": 2, "target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path / "full")
    quantize_in_place(model, {"language_model": {"bits": 4, "group_size": 32}, "projector": {"bits": 8}})
    model.save_pretrained(tmp_path / "quantised")
    tiny_processor(model.config).save_pretrained(tmp_path / start)
    changes = {"group_size": 32, "learning_rate": 1e-3, "max_steps": 2}
    run("run_stage2.py", qlora_recipe(parts, tmp_path / "two", tmp_path / start, **changes), tmp_path, monkeypatch)

    trained = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert trained.config.quantized_parts == {"language_model": {"bits": 4, "group_size": 32}}
    assert trained.config.lora["r"] == (2 if start == "quantised" else 8)
    state, before = trained.state_dict(), model.state_dict()
    assert len(linears(trained.language_model)) == 14
    for name in linears(trained.language_model):
        key = f"language_model.{name}.weight"
        assert state[key].dtype == torch.uint8
        assert torch.equal(state[key], before.get(key, before.get(key.replace(".base_layer", "")))), key
    moved = trained.projector.proj.weight - projector
    assert 0 < moved.norm() < 0.5 * projector.norm()  # trained from where it was
    assert any("eval_wer" in entry for entry in history(tmp_path / "two"))
    if start == "quantised":
        with pytest.raises(ValueError, match="'bits': 4, 'group_size': 32} already; leave out language_model_bits"):
            run("run_stage2.py", qlora_recipe(parts, tmp_path / "x", tmp_path / start), tmp_path, monkeypatch)
