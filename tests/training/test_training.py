"""Training end to end on tiny parts: both stages by their own scripts, resume, what is trained and what is not."""

import io
import json
import runpy
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
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration, pipeline

from salmonn_hf import BeatsConfig, BeatsModel, SalmonnForConditionalGeneration
from salmonn_hf.model.sound_summary import SalmonnSoundSummary
from salmonn_hf.model.whisper_projector import WhisperProjector
from salmonn_hf.training import initialization
from salmonn_hf.training.checkpoints import last_checkpoint

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
    tiny_tokenizer().save_pretrained(root / "whisper")
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


WHISPER_PROJECTOR = {
    "model_type": "salmonn_whisper_projector",
    "num_layers": 1,
    "window_frames": 4,
    "window_context": 2,
    "frame_mlp_size": 8,
}


def stage1_recipe(parts, output, dropout=0.1, **overrides):
    qformer = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    qformer |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    recipe = {
        "audio_tower": str(parts / "whisper"),
        "language_model": str(parts / "llm"),
        "projector_config": {
            "qformer_config": qformer,
            "window_frames": 4,
            "window_stride": 4,
            "window_position_embeddings": True,
            "output_norm": True,
            "frame_mlp_size": 16,
            "ctc_merges": 5,
        },
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
    "projector_config",
)


def stage2_recipe(parts, output, start, **overrides):
    recipe = stage1_recipe(parts, output, lora_r=4, lora_target_modules=["q_proj", "up_proj"])
    recipe = {key: value for key, value in recipe.items() if key not in STAGE1_KEYS}
    return recipe | {"model_name_or_path": str(start)} | overrides


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


def test_both_stages_with_a_projector_from_whispers_decoder(parts, tmp_path, monkeypatch):
    whisper = whisper_with_tokens(tmp_path / "whisper")
    recipe = stage1_recipe(parts, tmp_path / "one", projector_config=WHISPER_PROJECTOR)
    examples, start = [], WhisperProjector.initialize
    monkeypatch.setattr(WhisperProjector, "initialize", lambda *args: (examples.extend(args[3]), start(*args)))
    run("run_stage1.py", recipe | {"audio_tower": str(whisper)}, tmp_path, monkeypatch)
    texts = [tiny_tokenizer().decode(token_ids) for _, token_ids in examples]
    assert texts and all(text == f" {text.strip()}" for text in texts)  # as Whisper spells them: one space before
    first = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "one")
    projector = first.config.projector_config
    assert 0 < projector.ctc_trained_size <= projector.ctc_vocab_size
    recipe = stage2_recipe(parts, tmp_path / "two", tmp_path / "one", ctc_loss_weight=0.5)
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    assert all(np.isfinite(entry["loss"]) for entry in history(tmp_path / "two") if "loss" in entry)
    second = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert second.config.projector_config.ctc_trained_size == projector.ctc_trained_size
    assert not torch.equal(first.projector.layers[0].fc1.weight, second.projector.layers[0].fc1.weight)

    # Sounds come last: the summary is fitted to the captions once, and trained on with everything else.
    fits, heard, summary = [], [], SalmonnSoundSummary.forward
    fit = initialization.fit_sound_summary
    monkeypatch.setattr(initialization, "fit_sound_summary", lambda *args: fits.append(args[2]) or fit(*args))
    monkeypatch.setattr(
        SalmonnSoundSummary,
        "forward",
        lambda s, x, *args, **named: heard.append(x.abs().max()) or summary(s, x, *args, **named),
    )
    monkeypatch.setattr("salmonn_hf.training.sound_kinds.FIT_STEPS", 3)
    captions = [{"path": str(parts / "train.parquet"), "task": "audiocaption"}]
    summary_config = {"sound_summary_size": 8, "sound_kinds": 4}
    sounds = {"sources": captions, "sound_layers": [2], "projector_config": summary_config, "frame_noise": 1e6}
    for steps in (2, 4):
        recipe = stage2_recipe(parts, tmp_path / "three", tmp_path / "two", ctc_loss_weight=0.5, **sounds)
        run("run_stage2.py", recipe | {"max_steps": steps, "save_steps": 2}, tmp_path, monkeypatch)
    assert [len(clips) for clips in fits] == [12 + 1]  # and some of what is spoken
    assert max(heard) < 1e3  # without the noise, which would be heard as a deviation of the frames
    third = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "three")
    assert third.config.sound_layers == [2] and (third.projector.sound_summary.names >= 0).any()


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
    of_projector = [name for name in before if name.startswith("projector")]
    assert of_projector and all(torch.equal(before[name], after[name]) for name in of_projector)


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
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "one", dropout=0.0), tmp_path, monkeypatch)
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


def test_a_field_that_the_projector_does_not_have_is_refused(parts, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    recipe = stage2_recipe(parts, tmp_path / "out", tmp_path / "model", projector_config={"merged_windows": 8})
    with pytest.raises(ValueError, match="WindowQFormerConfig has no field 'merged_windows'"):
        run("run_stage2.py", recipe, tmp_path, monkeypatch)
