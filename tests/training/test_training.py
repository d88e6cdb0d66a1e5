"""Training end to end on tiny parts: both stages by their own scripts, resume, what is trained and what is not."""

import io
import json
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from conftest import noise, tiny_config, tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, WhisperForConditionalGeneration, pipeline

from salmonn_hf import BeatsConfig, BeatsModel, SalmonnForConditionalGeneration
from salmonn_hf.data import task_prompts
from salmonn_hf.data.encoder_features import encode_clips, num_frames, pad_clips, trains_encoder
from salmonn_hf.evaluation.caption_metrics import CaptionMetricsError
from salmonn_hf.model import speech_decoder
from salmonn_hf.model.quantized_layers import linears, quantize_parts, quantized_linear
from salmonn_hf.model.sound_summary import SalmonnSoundSummary
from salmonn_hf.training import trainer as training
from salmonn_hf.training.trainer import (
    ClipCollator,
    SalmonnTrainer,
    SalmonnTrainingArguments,
    ctc_text,
    ctc_tokenizer,
    ctc_vocabulary,
    freeze_base_parts,
    last_checkpoint,
    load_speech,
    standardise_frames,
)

ROOT = Path(__file__).resolve().parents[2]
TINY_BEATS = BeatsConfig(
    embed_dim=8,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    num_conv_pos_embedding_groups=4,
)
WORDS = ["red", "blue", "green", "one", "two"]


def write_parquet(path, count, seed=0, text_column="text"):
    rows = []
    for index in range(count):
        file = io.BytesIO()
        soundfile.write(file, noise(0.4 + 0.3 * (index % 4), seed + index), 16000, format="FLAC")
        rows.append({"audio": {"bytes": file.getvalue(), "path": f"{index}.flac"}, text_column: WORDS[index % 5]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Directories of tiny base parts, as a hub would hold them, and of speech."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = tiny_config()
    WhisperForConditionalGeneration(config.audio_config).save_pretrained(root / "whisper")
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(root / "llm")
    tiny_tokenizer().save_pretrained(root / "llm")
    BeatsModel(TINY_BEATS).save_pretrained(root / "beats")
    write_parquet(root / "train.parquet", 12)
    write_parquet(root / "eval.parquet", 4, seed=100)
    return root


def whisper_with_tokens(path):
    """A whole Whisper, whose decoder the connector can start from, with its tokenizer."""
    config = tiny_config().audio_config
    config.vocab_size = len(tiny_tokenizer())
    WhisperForConditionalGeneration(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def stage1_recipe(parts, output, **overrides):
    recipe = {
        "audio_tower": str(parts / "whisper"),
        "language_model": str(parts / "llm"),
        "window_frames": 4,
        "window_stride": 4,
        "qformer_hidden_size": 16,
        "qformer_heads": 2,
        "qformer_intermediate_size": 32,
        "frame_mlp_size": 16,
        "ctc_merges": 5,
        "train_files": [str(parts / "train.parquet")],
        "eval_file": str(parts / "eval.parquet"),
        "joined_clips": 2,
        "feature_cache": str(parts / "cache"),
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": 3,
    }
    return recipe | overrides


def run(script, recipe, tmp_path, monkeypatch, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", [script, str(path), *overrides])
    runpy.run_path(str(ROOT / "training" / script), run_name="__main__")


STAGE1_KEYS = (
    "audio_tower",
    "language_model",
    "sound_tower",
    "window_frames",
    "window_stride",
    "qformer_hidden_size",
    "qformer_heads",
    "qformer_intermediate_size",
    "frame_mlp_size",
    "ctc_merges",
)


def stage2_recipe(parts, output, start, **overrides):
    recipe = stage1_recipe(parts, output, lora_r=4, lora_target_modules=["q_proj", "up_proj"], **overrides)
    return {key: value for key, value in recipe.items() if key not in STAGE1_KEYS} | {"model_name_or_path": str(start)}


def history(output):
    state = json.loads((Path(last_checkpoint(output)) / "trainer_state.json").read_text())
    return state["log_history"]


def test_both_stages_from_recipes(parts, tmp_path, monkeypatch):
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "one"), tmp_path, monkeypatch)
    recipe = stage2_recipe(parts, tmp_path / "two", tmp_path / "one")
    run("run_stage2.py", recipe, tmp_path, monkeypatch, "--bf16", "true")

    tensors = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two").state_dict()
    saved = sum(f.stat().st_size for f in (tmp_path / "two").glob("*.safetensors"))
    assert saved < sum(t.numel() * t.element_size() for t in tensors.values()) / 2  # the frozen parts are not in it
    whisper = WhisperForConditionalGeneration.from_pretrained(parts / "whisper", dtype=torch.bfloat16)
    torch.testing.assert_close(tensors["audio_tower.conv1.weight"], whisper.model.encoder.conv1.weight.data)
    assert tensors["language_model.model.layers.0.self_attn.q_proj.lora_B.default.weight"].abs().sum() > 0
    assert json.loads((tmp_path / "two" / "config.json").read_text()).get("use_cache", True)
    assert any("eval_wer" in entry for entry in history(tmp_path / "two"))
    losses = [entry for entry in history(tmp_path / "two") if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["audio_seconds_per_second"] > 0 for entry in losses)
    assert not list((tmp_path / "two").glob(".partial*"))
    assert (tmp_path / "two" / "skipped.tsv").read_text() == "path\treason\tdetail\n"


def test_a_run_without_checkpoints_fills_the_cache(parts, tmp_path, monkeypatch):
    """Of training and evaluation clips alike, though they fill no shard."""
    recipe = stage1_recipe(parts, tmp_path / "run", feature_cache=str(tmp_path / "cache"), joined_clips=0)
    recipe |= {"save_strategy": "no", "eval_strategy": "no"}
    run("run_stage1.py", recipe, tmp_path, monkeypatch)
    shards = [safe_open(file, "pt") for file in (tmp_path / "cache").glob("*/*.safetensors")]
    assert len({key.split(".")[0] for shard in shards for key in shard.keys()}) == 12 + 4


def test_the_cache_changes_nothing_but_the_time(parts, tmp_path, monkeypatch):
    """Encoders, tasks, weights, masks, noise: the same losses without a cache, filling one, and from it."""
    sources = [
        {"path": str(parts / "train.parquet"), "task": "asr", "weight": 0.5},
        {"path": str(parts / "train.parquet"), "task": "audiocaption", "weight": 0.5},
    ]
    changes = {"sound_tower": str(parts / "beats"), "sources": sources, "masked_frames": 0.2, "max_steps": 7}
    runs, filled = {}, str(tmp_path / "cache")
    settings = {"quiet": ("", 0.0), "none": ("", 0.5), "filling": (filled, 0.5), "filled": (filled, 0.5)}
    for name, (cache, frame_noise) in settings.items():
        recipe = stage1_recipe(parts, tmp_path / name, feature_cache=cache, frame_noise=frame_noise, **changes)
        recipe = {key: value for key, value in recipe.items() if key not in ("train_files", "joined_clips")}
        run("run_stage1.py", recipe, tmp_path, monkeypatch)
        runs[name] = [entry["loss"] for entry in history(tmp_path / name) if "loss" in entry]
        if name == "filling":
            monkeypatch.setattr(BeatsModel, "forward", None)  # from here on nothing may be encoded
    assert len(runs["none"]) == 7 and runs["none"] == runs["filling"] == runs["filled"]
    assert runs["none"] != runs["quiet"]


def test_both_stages_with_a_connector_from_whispers_decoder(parts, tmp_path, monkeypatch):
    whisper = whisper_with_tokens(tmp_path / "whisper")
    connector = {"speech_decoder_layers": 1, "window_frames": 4, "window_stride": 4, "queries_per_window": 1}
    recipe = stage1_recipe(parts, tmp_path / "one", frame_mlp_size=8, window_context=2, **connector)
    read, start = [], speech_decoder.start_from_whisper
    monkeypatch.setattr(speech_decoder, "start_from_whisper", lambda *args: (read.extend(args[2]), start(*args)))
    run("run_stage1.py", recipe | {"audio_tower": str(whisper)}, tmp_path, monkeypatch)
    texts = [tiny_tokenizer().decode(token_ids) for _, token_ids in read]
    assert texts and all(text == f" {text.strip()}" for text in texts)  # as Whisper spells them: one space before
    first = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "one")
    assert 0 < first.config.ctc_trained_size <= first.config.ctc_vocab_size
    recipe = stage2_recipe(parts, tmp_path / "two", tmp_path / "one", ctc_loss_weight=0.5)
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    assert all(np.isfinite(entry["loss"]) for entry in history(tmp_path / "two") if "loss" in entry)
    second = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert second.config.ctc_trained_size == first.config.ctc_trained_size
    assert not torch.equal(first.connector.layers[0].fc1.weight, second.connector.layers[0].fc1.weight)

    # Sounds come last: the summary is fitted to the captions once, and trained on with everything else.
    fits, heard, summary = [], [], SalmonnSoundSummary.forward
    fit = training.fit_sound_summary
    monkeypatch.setattr(training, "fit_sound_summary", lambda *args: fits.append(args[2]) or fit(*args))
    monkeypatch.setattr(
        SalmonnSoundSummary, "forward", lambda s, x, *args: heard.append(x.abs().max()) or summary(s, x, *args)
    )
    monkeypatch.setattr("salmonn_hf.model.sound_summary.FIT_STEPS", 3)
    captions = [{"path": str(parts / "train.parquet"), "task": "audiocaption"}]
    sounds = {"sources": captions, "sound_layers": [2], "sound_summary_size": 8, "sound_kinds": 4, "frame_noise": 1e6}
    for steps in (2, 4):
        recipe = stage2_recipe(parts, tmp_path / "three", tmp_path / "two", ctc_loss_weight=0.5, **sounds)
        run("run_stage2.py", recipe | {"max_steps": steps, "save_steps": 2}, tmp_path, monkeypatch)
    assert [len(clips) for clips in fits] == [12 + 1]  # and some of what is spoken
    assert max(heard) < 1e3  # without the noise, which would be heard as a deviation of the frames
    third = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "three")
    assert third.config.sound_layers == [2] and (third.sound_summary.names >= 0).any()


@pytest.fixture(scope="module")
def stage1_model(parts, tmp_path_factory):
    """A stage 1 adapter of a language model whose shapes torch's 4-bit kernel takes."""
    root = tmp_path_factory.mktemp("stage1")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    AutoModelForCausalLM.from_config(tiny_text_config(**sizes)).save_pretrained(root / "llm")
    tiny_tokenizer().save_pretrained(root / "llm")
    patch = pytest.MonkeyPatch()
    recipe = stage1_recipe(parts, root / "one", language_model=str(root / "llm"), max_steps=2, eval_strategy="no")
    run("run_stage1.py", recipe, root, patch)
    patch.undo()
    return root / "one"


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
        expected = quantized_linear(base.get_submodule(name.replace(".base_layer", "")), 4, 64)
        assert torch.equal(layer.weight, expected.weight), name
    with safe_open(tmp_path / "two" / "model.safetensors", "pt") as file:
        assert not [k for k in file.keys() if k.startswith("language_model") and ".lora_" not in k]
        assert sum(".lora_" in key for key in file.keys()) == 28
    config = model.config.from_pretrained(tmp_path / "two")
    config.quantization = None  # on the base part as it is, into which LoRA can be merged
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
    """As training/quantize.py makes it, LoRA kept and the connector in 8 bits; or in bfloat16, rounded on the way."""
    model = SalmonnForConditionalGeneration.from_pretrained(stage1_model, dtype=torch.bfloat16)
    connector = model.connector.proj.weight.detach().clone()
    model.config.base_parts = None
    if start == "quantised":
        model.add_lora({"r": 2, "target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path / "full")
    quantization = {"language_model": {"bits": 4, "group_size": 32}, "connector": {"bits": 8}}
    quantize_parts(model, quantization)
    model.config.quantization = quantization
    model.save_pretrained(tmp_path / "quantised")
    tiny_processor(model.config).save_pretrained(tmp_path / start)
    changes = {"group_size": 32, "learning_rate": 1e-3, "max_steps": 2}
    run("run_stage2.py", qlora_recipe(parts, tmp_path / "two", tmp_path / start, **changes), tmp_path, monkeypatch)

    trained = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert trained.config.quantization == {"language_model": {"bits": 4, "group_size": 32}}
    assert trained.config.lora["r"] == (2 if start == "quantised" else 8)
    state, before = trained.state_dict(), model.state_dict()
    assert len(linears(trained.language_model)) == 14
    for name in linears(trained.language_model):
        key = f"language_model.{name}.weight"
        assert state[key].dtype == torch.uint8
        assert torch.equal(state[key], before.get(key, before.get(key.replace(".base_layer", "")))), key
    moved = trained.connector.proj.weight - connector
    assert 0 < moved.norm() < 0.5 * connector.norm()  # trained from where it was
    assert any("eval_wer" in entry for entry in history(tmp_path / "two"))
    if start == "quantised":
        with pytest.raises(ValueError, match="'bits': 4, 'group_size': 32} already; leave out language_model_bits"):
            run("run_stage2.py", qlora_recipe(parts, tmp_path / "x", tmp_path / start), tmp_path, monkeypatch)


def test_a_larger_lora_is_cut_to_the_recipes_rank(parts, stage1_model, tmp_path, monkeypatch):
    run("run_stage2.py", stage2_recipe(parts, tmp_path / "two", stage1_model, max_steps=2), tmp_path, monkeypatch)
    for name, rank in (("smaller", 3), ("larger", 8)):
        recipe = stage2_recipe(parts, tmp_path / name, tmp_path / "two", max_steps=2) | {"lora_r": rank}
        run("run_stage2.py", recipe, tmp_path, monkeypatch)
        trained = SalmonnForConditionalGeneration.from_pretrained(tmp_path / name)
        assert trained.config.lora["r"] == min(rank, 4)
        key = "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        assert len(trained.state_dict()[key]) == min(rank, 4)


def test_data_seed_changes_the_clips_and_not_the_start(parts, stage1_model, tmp_path, monkeypatch):
    """Such runs can be averaged: the mean reads, and lies between them."""
    still = {"learning_rate": 0.0, "eval_strategy": "no", "speed_factors": [0.9, 1.0, 1.1]}
    moving = {"eval_strategy": "no"}
    for name, seed, settings in (("a", 1, still), ("b", 2, still), ("c", 1, moving), ("d", 2, moving)):
        recipe = stage2_recipe(parts, tmp_path / name, stage1_model, **settings) | {"lora_learning_rate": None}
        run("run_stage2.py", recipe, tmp_path, monkeypatch, "--data_seed", str(seed))
    losses = [[entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in "ab"]
    assert losses[0] != losses[1]
    a, b, c, d = (load_file(tmp_path / name / "model.safetensors") for name in "abcd")
    assert all(torch.equal(a[key], b[key]) for key in a) and any(".lora_A" in key for key in a)

    directories = [str(tmp_path / name) for name in "cd"]
    monkeypatch.setattr(sys, "argv", ["average.py", *directories, "--output_dir", str(tmp_path / "mean")])
    runpy.run_path(str(ROOT / "training" / "average.py"), run_name="__main__")
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean.keys() == c.keys() and any(not torch.equal(c[key], d[key]) for key in c)
    for key, value in mean.items():
        expected = ((c[key].float() + d[key].float()) / 2).to(c[key].dtype) if value.is_floating_point() else c[key]
        assert torch.equal(value, expected), key
    transcriber = pipeline("automatic-speech-recognition", model=str(tmp_path / "mean"))
    assert isinstance(transcriber(noise(1.0))["text"], str)


def test_lora_in_the_encoder_is_trained_and_resumed(parts, stage1_model, tmp_path, monkeypatch):
    """Its frames change with each step: none are kept, and masks go on what the encoder hears."""
    changes = {"audio_lora_r": 2, "time_masks": 1, "frequency_masks": 1, "lora_dropout": 0.0, "bf16": True}
    changes |= {"feature_cache": "cache"}
    monkeypatch.chdir(tmp_path)
    for name, steps in (("two", 4), ("broken", 2), ("broken", 4)):
        recipe = stage2_recipe(parts, tmp_path / name, stage1_model, max_steps=steps, save_steps=2) | changes
        run("run_stage2.py", recipe | {"lr_scheduler_type": "constant"}, tmp_path, monkeypatch)
    assert not (tmp_path / "cache").exists()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "broken"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    in_encoder = {key: value for key, value in whole.items() if key.startswith("audio_tower.")}
    assert in_encoder and all(".lora_" in key for key in in_encoder)
    assert all(value.any() for key, value in in_encoder.items() if ".lora_B." in key)  # which start at zero
    trained = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert trained.config.audio_lora["r"] == 2 and trained.config.audio_lora["lora_alpha"] == 4
    with pytest.raises(ValueError, match="frame_noise change what a frozen speech encoder gave"):
        recipe = stage2_recipe(parts, tmp_path / "noise", tmp_path / "two", frame_noise=0.1)
        run("run_stage2.py", recipe, tmp_path, monkeypatch)


def test_the_encoder_is_adapted_in_stage_1_and_its_features_kept_in_stage_2(parts, tmp_path, monkeypatch):
    """LoRA in float32 beside weights in bfloat16, in all that encodes clips."""
    stage1 = stage1_recipe(parts, tmp_path / "one", feature_cache=str(tmp_path / "cache"), bf16=True)
    run("run_stage1.py", stage1 | {"audio_lora_r": 2, "time_masks": 1}, tmp_path, monkeypatch)
    assert not (tmp_path / "cache").exists()
    start = load_file(tmp_path / "one" / "model.safetensors")
    in_encoder = [key for key in start if key.startswith("audio_tower.")]
    assert in_encoder and all(start[key].any() for key in in_encoder if ".lora_B." in key)
    changes = {"freeze_encoder_lora": True, "feature_cache": str(tmp_path / "cache"), "bf16": True}
    recipe = stage2_recipe(parts, tmp_path / "two", tmp_path / "one", max_steps=2)
    run("run_stage2.py", recipe | changes, tmp_path, monkeypatch)
    assert list((tmp_path / "cache").glob("*/*.safetensors"))
    trained = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(trained[key], start[key]) for key in in_encoder)
    assert any("language_model" in key for key in trained)


def test_transcripts_learnt_from_a_teacher(parts, stage1_model, tmp_path, monkeypatch):
    """The teacher is the start itself, so there is nothing to learn of speech; and its words are read as before."""
    run("run_stage2.py", stage2_recipe(parts, tmp_path / "two", stage1_model, max_steps=2), tmp_path, monkeypatch)
    recipe = stage2_recipe(parts, tmp_path / "three", tmp_path / "two", max_steps=2)
    recipe |= {"teacher_name_or_path": str(tmp_path / "two"), "lora_dropout": 0.0}
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    assert all(abs(entry["loss"]) < 0.05 for entry in history(tmp_path / "three") if "loss" in entry)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "three"))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(("connector", "ctc")))


def test_a_teacher_with_a_sound_encoder_hears_the_sound_frames(parts, tmp_path, monkeypatch):
    settings = {"sound_tower": str(parts / "beats"), "max_steps": 1}
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "one", **settings), tmp_path, monkeypatch)
    run("run_stage2.py", stage2_recipe(parts, tmp_path / "two", tmp_path / "one", max_steps=1), tmp_path, monkeypatch)
    recipe = stage2_recipe(parts, tmp_path / "three", tmp_path / "two", max_steps=1)
    recipe |= {"teacher_name_or_path": str(tmp_path / "two"), "lora_dropout": 0.0}
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    assert all(abs(entry["loss"]) < 0.05 for entry in history(tmp_path / "three") if "loss" in entry)


def test_gradients_of_accumulated_batches_are_those_of_one(parts, tmp_path, monkeypatch):
    """Of unequal batches too: both losses are means over all target tokens of a step."""
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "one", qformer_dropout=0.0), tmp_path, monkeypatch)
    runs = []
    for batch, accumulation in ((6, 1), (2, 3)):
        output = tmp_path / f"{batch}x{accumulation}"
        recipe = stage2_recipe(parts, output, tmp_path / "one", lora_dropout=0.0, ctc_loss_weight=0.5, max_steps=4)
        recipe |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run("run_stage2.py", recipe, tmp_path, monkeypatch)
        runs.append([(entry["loss"], entry["grad_norm"]) for entry in history(output) if "loss" in entry])
    np.testing.assert_allclose(runs[0], runs[1], rtol=2e-3)  # frames are bfloat16


def test_stage_3_trains_on_the_models_own_long_answers(parts, tmp_path, monkeypatch):
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "one"), tmp_path, monkeypatch)
    run("run_stage2.py", stage2_recipe(parts, tmp_path / "two", tmp_path / "one"), tmp_path, monkeypatch)
    recipe = stage2_recipe(parts, tmp_path / "three", tmp_path / "two", stories=3, max_new_tokens=6, max_steps=2)
    recipe["sources"] = [{"path": str(parts / "train.parquet"), "task": "audio_story_telling"}]
    for key in ("train_files", "joined_clips", "lora_r", "lora_target_modules"):
        del recipe[key]
    run("run_stage3.py", recipe, tmp_path, monkeypatch)
    stories = pq.read_table(tmp_path / "three" / "stories.parquet").to_pylist()
    assert len(stories) == 3 and {row["task"] for row in stories} == {"audio_story_telling"}
    assert not {row["text"] for row in stories} & set(WORDS)  # not the transcripts of these clips
    before, after = (
        SalmonnForConditionalGeneration.from_pretrained(tmp_path / n).state_dict() for n in ("two", "three")
    )
    key = "language_model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert not torch.equal(before[key], after[key])


def test_early_stopping_on_the_word_error_rate(parts, tmp_path, monkeypatch):
    recipe = stage1_recipe(parts, tmp_path / "one", early_stopping_patience=2, eval_steps=2, max_steps=40)
    run("run_stage1.py", recipe | {"learning_rate": 0.0}, tmp_path, monkeypatch)  # so nothing gets better
    evaluations = [entry for entry in history(tmp_path / "one") if "eval_wer" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    with pytest.raises(ValueError, match="early_stopping_patience needs evaluations"):
        run("run_stage1.py", recipe | {"eval_strategy": "no"}, tmp_path, monkeypatch)


CAPTIONS = [
    ["A dog barks loudly, twice.", "A large dog is barking"],
    ["Rain falls on a tin roof", "It's raining on metal"],
    ["A car engine starts.", "An engine is started and revs"],
    ["Birds sing in the forest", "Several birds chirp"],
]
ANSWERS = ["a large dog is barking", "Rain is falling on a roof", "", "Birds sing."]
QUESTIONS = [("Is it a dog?", ["yes"]), ("How many?", ["three", "a few"]), ("Who?", ["a dog"]), ("Where?", ["here"])]


@pytest.fixture(scope="module")
def described(parts):
    """Sources of held-out clips: with two captions each, with questions, and with transcripts."""
    clips = [row["audio"] for row in pq.read_table(parts / "eval.parquet").to_pylist()]
    captions = [{"audio": clip, "captions": texts} for clip, texts in zip(clips, CAPTIONS, strict=True)]
    asked = [
        {"audio": clip, "question": question, "answers": answers, "task": "QA"}
        for clip, (question, answers) in zip(clips, QUESTIONS, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(captions), parts / "captions.parquet")
    pq.write_table(pa.Table.from_pylist(asked), parts / "questions.parquet")
    return [
        {"path": str(parts / "captions.parquet"), "columns": {"text": "captions"}, "task": "audiocaption"},
        {"path": str(parts / "questions.parquet"), "columns": {"text": "answers"}},
        {"path": str(parts / "eval.parquet")},
    ]


def evaluation_recipe(parts, output, start, sources, **overrides):
    recipe = stage2_recipe(parts, output, start, max_steps=8, eval_steps=1, save_steps=1, save_total_limit=2)
    del recipe["eval_file"]
    return recipe | {"eval_sources": sources, "per_device_eval_batch_size": 3} | overrides


def answering(monkeypatch, answer):
    """Give the model's answers: `answer(evaluation, clip, prompt)`, both counted from 0; its length tells a clip."""
    evaluations, evaluate = [], SalmonnTrainer.evaluate

    def counted(trainer, *args, **kwargs):
        evaluations.append(evaluate)
        return evaluate(trainer, *args, **kwargs)

    def answers(model, processor, prompts, audio_embeds, max_new_tokens):
        clips = [round((prompt.count(3) * 0.08 - 0.6) / 0.3) for prompt in prompts]  # with 0.2 s of silence behind
        texts = processor.batch_decode(prompts)
        assert max_new_tokens >= 96 or not any("heard" in text for text in texts)  # a caption may outlast its clip
        return [answer(len(evaluations) - 1, clip, text) for clip, text in zip(clips, texts, strict=True)]

    monkeypatch.setattr(SalmonnTrainer, "evaluate", counted)
    monkeypatch.setattr(training, "generate_answers", answers)


@pytest.fixture
def java():
    pytest.importorskip("pycocoevalcap", reason="CIDEr-D needs pycocoevalcap: pip install -e .[captions]")
    if shutil.which("java") is None:
        pytest.skip("CIDEr-D needs Java: apt-get install default-jre-headless")


def pycocoevalcaps_cider(answers):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(captions):
        return PTBTokenizer().tokenize({i: [{"caption": c} for c in texts] for i, texts in enumerate(captions)})

    return Cider().compute_score(tokens(CAPTIONS), tokens([[text] for text in answers]))[0]


def test_each_task_of_a_mix_has_its_metric(parts, stage1_model, described, java, tmp_path, monkeypatch):
    """Of all references of a clip: CIDEr-D of captions, accuracy of answers, word error rate of speech."""

    def answer(evaluation, clip, prompt):
        if "heard" in prompt:
            return ANSWERS[clip]
        return "red" if "Transcribe" in prompt else ["Yes, it is.", "A few.", "a cat", "Here!"][clip]

    printed = []
    monkeypatch.setattr(SalmonnTrainer, "log_sample", lambda self, *pair: printed.append(pair))
    answering(monkeypatch, answer)
    recipe = evaluation_recipe(parts, tmp_path / "two", stage1_model, described, max_steps=1)
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    (logged,) = [entry for entry in history(tmp_path / "two") if "eval_wer" in entry]
    assert logged["eval_wer"] == 3 / 4 and logged["eval_accuracy"] == 3 / 4
    assert logged["eval_cider"] == pytest.approx(pycocoevalcaps_cider(ANSWERS), abs=1e-9)
    assert logged["eval_cider"] > 1
    assert {("red", "red"), (CAPTIONS[0][0], ANSWERS[0]), ("yes", "Yes, it is.")} <= set(printed)


def test_early_stopping_on_cider(parts, stage1_model, described, java, tmp_path, monkeypatch):
    right = [1, 3, 1, 2, 0]  # captions of each evaluation; the last is that of the best checkpoint
    answering(monkeypatch, lambda evaluation, clip, _: CAPTIONS[clip][0] if clip < right[evaluation] else "")
    best = {"early_stopping_patience": 2, "metric_for_best_model": "eval_cider"}
    recipe = evaluation_recipe(parts, tmp_path / "two", stage1_model, described[:1], **best)
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    evaluations = [entry for entry in history(tmp_path / "two") if "eval_cider" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2, 3, 4] and "eval_wer" not in evaluations[0]
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    files = [tmp_path / "two" / name / "model.safetensors" for name in (".", "checkpoint-2")]
    final, expected = map(load_file, files)
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in final.items())


def test_an_evaluation_that_cannot_be_is_refused_at_the_start(parts, stage1_model, described, tmp_path, monkeypatch):
    monkeypatch.setattr(SalmonnTrainer, "train", None)
    recipe = evaluation_recipe(parts, tmp_path / "two", stage1_model, described[:1], early_stopping_patience=2)
    with pytest.raises(ValueError, match="metric_for_best_model is 'wer'.*of the tasks audiocaption, gives cider"):
        run("run_stage2.py", recipe, tmp_path, monkeypatch)
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CaptionMetricsError, match="The evaluation set has captions.*apt-get install default-jre"):
        recipe |= {"metric_for_best_model": "cider"}
        run("run_stage2.py", recipe, tmp_path, monkeypatch)


def test_a_full_disk_leaves_the_last_checkpoint(parts, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    recipe = stage1_recipe(parts, tmp_path / "one", eval_strategy="no", save_total_limit=1, feature_cache="")
    save, limits = SalmonnTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(trainer, *args):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(trainer, *args)

    monkeypatch.setattr(SalmonnTrainer, "_save_checkpoint", fill_disk)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="Cannot write checkpoint-4 to .*goes on from checkpoint-2, which is whole"):
            run("run_stage1.py", recipe, tmp_path, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_a_half_written_checkpoint_is_never_chosen(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "absent") is None


def example(seconds, text, messages=None, seed=0):
    features = tiny_processor().feature_extractor([noise(seconds, seed)], return_tensors="pt")
    clip = {"input_features": features["input_features"][0]}
    return {"clip": clip, "messages": messages, "task": "asr", "text": text, "path": "x", "seconds": seconds}


def test_labels_cover_the_answer_only_whatever_the_padding_side():
    processor = tiny_processor()
    asked = task_prompts.messages("QA", "How many?", system="Be brief.", draw=(0, 0, 0))
    examples = [example(0.4, " one"), example(1.0, "green two "), example(0.7, "three", asked)]
    batches = []
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        batches.append(ClipCollator(processor, [])(examples))
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batches[0][name], batches[1][name])
    batch = batches[0]
    requests = [processor.transcription_messages(), processor.transcription_messages(), asked]
    for row, text in enumerate(["one", "green two", "three"]):
        answer = batch["input_ids"][row][batch["labels"][row] != -100]
        assert processor.tokenizer.decode(answer) == text + "<|im_end|>"
        assert batch["labels"][row, -1] == processor.tokenizer.eos_token_id
        frames = num_frames(examples[row]["clip"])
        assert (batch["input_ids"][row] == 3).sum() == processor.num_audio_tokens(frames)
        seen = processor.tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row] == 1])
        prompt = processor.apply_chat_template(requests[row], add_generation_prompt=True)
        assert seen.replace("<|audio|>", "") == prompt.replace("<|audio|>", "") + text + "<|im_end|>"
    assert "Be brief." in seen and "How many?" in seen


def test_loss_is_on_the_answer_on_either_side_of_the_padding():
    """Right-padded rows, as other collators make them, give the loss of left-padded ones."""
    model, processor = tiny_model(), tiny_processor()
    model.training = True  # the outermost alone: logits are left out as in training, and there is no dropout
    batch = ClipCollator(processor, [])([example(0.4, "one"), example(1.0, "green two", seed=1)])
    frames = pad_clips(encode_clips(model, batch["clips"]))
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    positions = {"position_ids": (text["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    padding = int((text["attention_mask"][0] == 0).sum())
    right = {name: torch.stack([value[0].roll(-padding), value[1]]) for name, value in (text | positions).items()}
    assert padding > 0
    torch.testing.assert_close(
        model(**text, **positions, **frames).loss, model(**right, **frames).loss, rtol=1e-5, atol=1e-6
    )


def test_collated_prompt_is_that_of_the_transcription_request():
    """Training and inference must see the same tokens for the same clip."""
    model, processor = tiny_model(), tiny_processor()
    clip = noise(1.3)
    inputs = processor.apply_transcription_request(clip)
    frames = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])["audio_frames"][0]
    assert ClipCollator(processor, []).prompt_ids(len(frames)) == inputs["input_ids"][0].tolist()


def test_clips_that_cannot_be_decoded_are_left_out_of_the_batch():
    model = tiny_model(tiny_config(ctc_vocab_size=3))
    collator = ClipCollator(tiny_processor(), [40, 41, 42])
    bad = {"path": "bad.flac", "skipped": "damaged"}
    batch = collator([bad, example(0.4, "one")])
    assert batch["skipped"] == [("bad.flac", "damaged")] and len(batch["clips"]) == len(batch["labels"]) == 1
    # Nothing is put in the place of a batch that is lost: it gives neither loss nor gradient.
    batch = collator([bad])
    freeze_base_parts(model)
    frames = pad_clips(encode_clips(model, batch["clips"]))
    batch = {name: value for name, value in batch.items() if name not in ("clips", "seconds", "skipped")}
    one = torch.tensor(1)
    output = model(**batch, **frames, num_items_in_batch=one, num_ctc_labels=one)
    output.loss.backward()
    assert output.loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_only_transcripts_are_spelt_and_only_captions_are_bags_of_words():
    """What the CTC head learns of a sound must not be its caption: the clip says none of its words."""
    processor = tiny_processor()
    tokens = [processor.tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "abc"]
    collator = ClipCollator(processor, tokens)
    examples = [
        example(0.4, text) | {"task": task} for task, text in (("asr", "ab"), ("audiocaption", "C"), ("QA", "b"))
    ]
    batch = collator(examples)
    assert [[label for label in row if label != -100] for row in batch["ctc_labels"].tolist()] == [[0, 1], [], []]
    captions = [[label for label in row if label != -100] for row in batch["caption_labels"].tolist()]
    assert captions == [[], processor.tokenizer(" c", add_special_tokens=False).input_ids, []]
    assert "caption_labels" not in collator(examples[::2])
    assert "caption_labels" not in ClipCollator(processor, tokens, caption_bags=False)(examples)


def test_a_missing_column_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 1, text_column="sentence")
    with pytest.raises(ValueError, match="no column 'text'"):
        load_speech([path])
    assert load_speech([path], text_column="sentence")["text"] == ["red"]


def test_ctc_text():
    assert ctc_text("  Don’t -- I said: STOP!  ") == " don't i said stop"


def test_only_salmonns_own_parts_train():
    model = tiny_model(tiny_config(ctc_vocab_size=3)).to(torch.bfloat16)
    model.add_lora({"r": 2, "target_modules": ["q_proj"]})
    freeze_base_parts(model)
    for name, parameter in model.named_parameters():
        trained = name.startswith(("audio_norm", "connector", "ctc_head")) or ".lora_" in name
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    freeze_base_parts(model, alignment_only=True)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)
    assert not trains_encoder(model)
    model.add_lora({"r": 2, "target_modules": ["q_proj"]}, "audio_tower")
    for keep_words, trained in ((False, "audio_tower."), (True, "language_model.")):
        freeze_base_parts(model, alignment_only=not keep_words, keep_words=keep_words)
        adapters = {n: p.requires_grad for n, p in model.named_parameters() if ".lora_" in n}
        assert all(requires == name.startswith(trained) for name, requires in adapters.items())
        assert trains_encoder(model) != keep_words


def test_what_comes_from_whisper_and_lora_have_learning_rates_of_their_own(tmp_path):
    windows = {"window_frames": 4, "window_stride": 4, "queries_per_window": 1, "frame_mlp_size": 8}
    model = tiny_model(tiny_config(ctc_vocab_size=3, speech_decoder_layers=1, **windows))
    for part in ("language_model", "audio_tower"):
        model.add_lora({"r": 2, "target_modules": ["q_proj"]}, part)
    freeze_base_parts(model)
    arguments = SalmonnTrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=1e-3,
        speech_decoder_learning_rate=1e-4,
        audio_lora_learning_rate=2e-3,
        use_cpu=True,
    )
    trainer = SalmonnTrainer(model=model, args=arguments, lora_learning_rate=1e-2)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    expected = {"connector.query": 1e-4, "connector.layers": 1e-4, "connector.layer_norm": 1e-4}
    expected |= {"connector.frame_mlp": 1e-3, "audio_norm": 1e-3, "ctc_head": 1e-3, "language_model": 1e-2}
    expected["audio_tower"] = 2e-3
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kind,) = (kind for kind in expected if name.startswith(f"{kind}.") or name == kind)
            assert rates[id(parameter)] == expected[kind], name
            seen.add(kind)
    assert seen == set(expected)


def test_training_leaves_cudnns_attention_out(tmp_path):
    """Its backward pass gives NaN for masked sequences of 64 tokens where all scores of a row are low."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    arguments = SalmonnTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    SalmonnTrainer(model=tiny_model(tiny_config()), args=arguments)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    if torch.cuda.is_available():
        query, key, value = torch.randn(3, 1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
        query[..., 0], key[..., 0] = 1.0, -960.0
        mask = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril()[None, None]
        heard = torch.nn.functional.scaled_dot_product_attention(query.requires_grad_(), key, value, attn_mask=mask)
        heard.sum().backward()
        assert query.grad.isfinite().all()


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


def test_standardised_frames_have_mean_0_and_variance_1():
    model = tiny_model()
    frames = [torch.randn(50, 16) * torch.linspace(0.1, 10, 16) + torch.arange(16) for _ in range(20)]

    class Clips(list):
        cache = None

    model.sound_norm = torch.nn.LayerNorm(16)
    examples = [{"clip": {"audio_frames": clip, "sound_frames": 3 * clip.roll(5, 1)}} for clip in frames]
    standardise_frames(model, Clips(examples))
    sound = model.sound_norm(torch.cat([example["clip"]["sound_frames"] for example in examples]))
    torch.testing.assert_close(sound.std(0), torch.ones(16), atol=1e-3, rtol=0)
    normed = model.audio_norm(torch.cat(frames))
    torch.testing.assert_close(normed.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.std(0), torch.ones(16), atol=1e-3, rtol=0)


def test_windows_of_a_qformer_cannot_be_merged(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    script = runpy.run_path(str(ROOT / "training" / "run_stage2.py"))
    arguments = script["ModelArguments"](str(tmp_path), merged_windows=8)
    with pytest.raises(ValueError, match="merged_windows is 8, but without speech_decoder_layers"):
        script["load_model"](arguments, torch.float32)
