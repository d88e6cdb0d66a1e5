"""Training end to end on tiny parts: both stages by their own scripts, resume, what is trained and what is not."""

import io
import json
import logging
import runpy
import shutil
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
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, WhisperForConditionalGeneration

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.audio import AudioError
from salmonn_hf.feature_cache import build_feature_cache
from salmonn_hf.training import (
    CachedSpeechDataset,
    CrossFittedDataset,
    SpeechArguments,
    SpeechCollator,
    change_speed,
    ctc_text,
    ctc_tokenizer,
    ctc_vocabulary,
    freeze_base_parts,
    join_clips,
    load_speech,
    mask_frames,
    speech_dataset,
    standardise_frames,
    text_fold,
)

ROOT = Path(__file__).resolve().parents[1]
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
    write_parquet(root / "train.parquet", 12)
    write_parquet(root / "eval.parquet", 4, seed=100)
    return root


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


SHARED_KEYS = (
    "train_files eval_file feature_cache per_device_train_batch_size max_steps learning_rate save_strategy save_steps "
    "eval_strategy eval_steps logging_steps remove_unused_columns use_cpu seed"
).split()


def run(script, recipe, tmp_path, monkeypatch, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", [script, str(path), *overrides])
    runpy.run_path(str(ROOT / "training" / script), run_name="__main__")


def test_both_stages_from_recipes(parts, tmp_path, monkeypatch):
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "one"), tmp_path, monkeypatch)
    recipe = stage1_recipe(parts, tmp_path / "two", lora_r=4, lora_target_modules=["q_proj", "up_proj"])
    for key in (
        "audio_tower",
        "language_model",
        "window_frames",
        "window_stride",
        "qformer_hidden_size",
        "qformer_heads",
        "qformer_intermediate_size",
        "frame_mlp_size",
        "ctc_merges",
    ):
        del recipe[key]
    run(
        "run_stage2.py",
        recipe | {"model_name_or_path": str(tmp_path / "one")},
        tmp_path,
        monkeypatch,
        "--bf16",
        "true",
    )

    tensors = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "two").state_dict()
    saved = sum(f.stat().st_size for f in (tmp_path / "two").glob("*.safetensors"))
    assert saved < sum(t.numel() * t.element_size() for t in tensors.values()) / 2  # the frozen parts are not in it
    whisper = WhisperForConditionalGeneration.from_pretrained(parts / "whisper", dtype=torch.bfloat16)
    torch.testing.assert_close(tensors["audio_tower.conv1.weight"], whisper.model.encoder.conv1.weight.data)
    assert tensors["language_model.model.layers.0.self_attn.q_proj.lora_B.default.weight"].abs().sum() > 0
    assert json.loads((tmp_path / "two" / "config.json").read_text()).get("use_cache", True)
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    assert any("eval_wer" in entry for entry in state["log_history"])


def test_resumed_training_ends_as_an_unbroken_run(parts, tmp_path, monkeypatch, caplog):
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "whole"), tmp_path, monkeypatch)
    broken = stage1_recipe(parts, tmp_path / "broken")
    run("run_stage1.py", broken, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")  # as if killed after step 2
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to where caplog listens
    run("run_stage1.py", broken, tmp_path, monkeypatch)
    assert "missing keys" not in caplog.text  # the frozen parts are never in a checkpoint
    states = [
        SalmonnForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken")
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_labels_cover_the_answer_only():
    processor = tiny_processor()
    collator = SpeechCollator(processor, [])
    examples = [{"audio_frames": torch.randn(n, 16), "text": text} for n, text in ((20, " one"), (50, "green two "))]
    batch = collator(examples)
    for row, text in enumerate(["one", "green two"]):
        answer = batch["input_ids"][row][batch["labels"][row] != -100]
        assert processor.tokenizer.decode(answer) == text + "<|im_end|>"
        assert (batch["input_ids"][row] == 3).sum() == processor.num_audio_tokens(len(examples[row]["audio_frames"]))
        asked = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        prompt = processor.apply_chat_template(processor.transcription_messages(), add_generation_prompt=True)
        seen = processor.tokenizer.decode(asked).replace("<|audio|>", "")
        assert seen == prompt.replace("<|audio|>", "") + text + "<|im_end|>"


def test_collated_prompt_is_that_of_the_transcription_request():
    """Training and inference must see the same tokens for the same clip."""
    model, processor = tiny_model(), tiny_processor()
    clip = noise(1.3)
    inputs = processor.apply_transcription_request(clip)
    frames = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])["audio_frames"][0]
    assert (
        SpeechCollator(processor, []).prompt_ids(processor.num_audio_tokens(len(frames)))
        == inputs["input_ids"][0].tolist()
    )


def test_stage_2_on_connectors_that_have_not_seen_the_clip(parts, tmp_path, monkeypatch):
    """Two connectors, each trained without one fold; stage 2 then trains LoRA alone, on both folds' clips."""
    for fold in (0, 1):
        recipe = stage1_recipe(parts, tmp_path / f"fold{fold}", folds=2, left_out_fold=fold, joined_clips=0)
        run("run_stage1.py", recipe, tmp_path, monkeypatch)
    recipe = {k: v for k, v in recipe.items() if k in SHARED_KEYS} | {
        "model_name_or_path": str(tmp_path / "fold0"),
        "fold_connectors": [str(tmp_path / "fold0"), str(tmp_path / "fold1")],
        "joined_clips": 3,
        "output_dir": str(tmp_path / "two"),
    }
    run("run_stage2.py", recipe, tmp_path, monkeypatch)
    before, after = [
        SalmonnForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("fold0", "two")
    ]
    lora = [key for key in after if ".lora_B" in key]
    assert lora and all(after[key].abs().sum() > 0 for key in lora)
    assert all(torch.equal(after[key].float(), before[key].float()) for key in before if key.startswith("connector"))


def test_each_clip_goes_through_the_connector_that_was_trained_without_it(parts):
    class Connector(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.audio_norm = torch.nn.LayerNorm(16)
            self.name = name

        def connect_audio(self, frames, mask):
            return torch.full((frames.shape[1] // 4, 8), self.name), None

    class Cache(list):
        lengths = np.array([8, 12, 16, 20, 24])

    texts = ["Red!", "blue", "green", "one", "two"]
    dataset = CachedSpeechDataset([(Cache(torch.zeros(n, 16) for n in Cache.lengths), texts)])
    fitted = CrossFittedDataset(dataset, [Connector(float(fold)) for fold in range(3)], joined_clips=4)
    for item, text in enumerate(texts):
        assert fitted[item]["audio_embeds"].unique().tolist() == [text_fold(text, 3)]
        assert fitted[item]["audio_embeds"].requires_grad is False
        assert text not in dataset_without(texts, text_fold(text, 3))
    for item in range(5, 9):
        words = fitted[item]["text"].split()
        expected = [float(text_fold(word, 3)) for word in words for _ in range(Cache.lengths[texts.index(word)] // 4)]
        assert fitted[item]["audio_embeds"][:, 0].tolist() == expected
        assert fitted.lengths[item] == len(expected) * 4
    assert len({text_fold(f"word {n}", 3) for n in range(50)}) == 3
    assert text_fold("Don't stop.", 3) == text_fold(" don’t STOP", 3)  # copies of a sentence stay together


def dataset_without(texts, fold):
    class Cache(list):
        lengths = np.array([4] * len(texts))

    dataset = CachedSpeechDataset([(Cache(torch.zeros(4, 16) for _ in texts), texts)]).without_fold(fold, 3)
    return [dataset[item]["text"] for item in range(len(dataset))]


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
    freeze_base_parts(model, lora=False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)
    freeze_base_parts(model, alignment=False)
    assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())


def test_feature_cache_holds_what_the_encoder_gives(tmp_path):
    model, processor = tiny_model().to(torch.bfloat16), tiny_processor()
    data = load_speech([write_parquet(tmp_path / "a.parquet", 5)])
    cache = build_feature_cache(data["audio"], model, processor.feature_extractor, tmp_path / "cache", batch_seconds=2)
    assert len(cache) == 5
    for index, clip in enumerate(data["audio"]):
        waveform, _ = soundfile.read(io.BytesIO(clip["bytes"]), dtype="float32")
        features = processor.feature_extractor([waveform], return_tensors="pt")
        expected = model.encode_audio(**features)["audio_frames"][0]
        assert cache[index].shape == expected.shape and cache.lengths[index] == len(expected)
        torch.testing.assert_close(cache[index], expected, atol=0.05, rtol=0.05)
    again = build_feature_cache(
        data["audio"], None_if_encoding(model), processor.feature_extractor, tmp_path / "cache"
    )
    assert torch.equal(again[3], cache[3])


class None_if_encoding:
    """A model that must not be asked to encode: everything has to come from the cache."""

    def __init__(self, model):
        self.config, self.audio_tower, self.name_or_path = model.config, model.audio_tower, model.name_or_path


def test_a_broken_clip_stops_the_cache_by_name_and_leaves_nothing(tmp_path):
    rows = [{"audio": {"bytes": b"not audio", "path": "bad.flac"}, "text": "one"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    data = load_speech([str(tmp_path / "bad.parquet")])
    with pytest.raises(AudioError, match="bad.flac"):
        build_feature_cache(data["audio"], tiny_model(), tiny_processor().feature_extractor, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_joined_clips_hold_all_their_words(tmp_path):
    data = load_speech([write_parquet(tmp_path / "a.parquet", 8)])
    joined = join_clips(data, count=3, seconds=(3.0, 6.0))
    again = join_clips(data, count=3, seconds=(3.0, 6.0))
    assert joined["text"] == again["text"]
    for row in joined:
        waveform, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        words = row["text"].split()
        shortest = 0.4 * len(words)
        assert rate == 16000 and shortest <= len(waveform) / rate <= 6.1 and set(words) <= set(WORDS)
        silent = np.abs(waveform) < 1e-4
        runs = np.diff(np.flatnonzero(np.diff(np.r_[0, silent, 0])))[::2]
        assert (runs > 1000).sum() == len(words) - 1  # a pause between two clips, none at the ends


def test_changed_speed_moves_pitch_and_length_and_keeps_the_words(tmp_path):
    tone = np.sin(2 * np.pi * 400 * np.arange(16000) / 16000).astype(np.float32)
    [row] = change_speed(speech_dataset([(tone, "tone.flac", "one")]), 0.8)
    waveform, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
    assert rate == 16000 and row["text"] == "one" and abs(len(waveform) - 20000) <= 1
    assert np.abs(np.fft.rfft(waveform)).argmax() * 16000 / len(waveform) == pytest.approx(320, abs=1)


def test_copies_at_other_speeds_are_added_for_the_named_files_only(tmp_path):
    files = [write_parquet(tmp_path / name, count) for name, count in (("a.parquet", 2), ("b.parquet", 3))]
    arguments = SpeechArguments(train_files=files, eval_file=files[0], speeds=[0.9, 1.1], speed_files=files[1:])
    assert [len(part) for part in arguments.load()[0]] == [2, 3, 3, 3]
    arguments.speed_files = None
    assert [len(part) for part in arguments.load()[0]] == [2, 3, 2, 2, 3, 3]


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
    standardise_frames(model, [{"audio_frames": clip} for clip in frames])
    normed = model.audio_norm(torch.cat(frames))
    torch.testing.assert_close(normed.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.std(0), torch.ones(16), atol=1e-3, rtol=0)


def test_masked_frames_are_whole_runs_of_the_mean_and_only_in_training():
    torch.manual_seed(0)
    frames = torch.randn(1000, 4)
    masked = mask_frames(frames, 0.1)
    changed = (masked != frames).any(1)
    torch.testing.assert_close(masked[changed], frames.mean(0).expand(int(changed.sum()), 4))
    assert 0.05 < changed.float().mean() <= 0.102  # runs may overlap
    edges = torch.diff(torch.nn.functional.pad(changed.int(), (1, 1)))
    lengths = (edges == -1).nonzero() - (edges == 1).nonzero()
    assert lengths.min() >= 6

    cache = type("Cache", (list,), {"lengths": [1000]})([frames])
    assert torch.equal(CachedSpeechDataset([(cache, ["a"])])[0]["audio_frames"], frames)
    assert not torch.equal(CachedSpeechDataset([(cache, ["a"])], 0.1)[0]["audio_frames"], frames)


@pytest.mark.parametrize("length", [1, 5, 6, 7])
def test_short_clips_can_be_masked(length):
    for seed in range(20):
        torch.manual_seed(seed)
        assert mask_frames(torch.randn(length, 4), 0.5).shape == (length, 4)


def test_a_missing_column_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 1, text_column="sentence")
    with pytest.raises(ValueError, match="no column 'text'"):
        load_speech([path])
    assert load_speech([path], text_column="sentence")["text"] == ["red"]


def test_empty_transcripts_are_left_out(tmp_path):
    rows = [{"audio": {"bytes": None, "path": "x"}, "text": t} for t in ("a", "  ", "b")]
    cache = [torch.zeros(n + 1, 2) for n in range(3)]
    dataset = CachedSpeechDataset([(type("Cache", (list,), {"lengths": [1, 2, 3]})(cache), [r["text"] for r in rows])])
    assert dataset.texts == ["a", "b"] and dataset.lengths == [1, 3] and len(dataset[1]["audio_frames"]) == 3
