"""Adapter checkpoints: only what was trained, put together with its base parts, merged to a full model."""

import json
from pathlib import Path

import pytest
import torch
from conftest import noise, randomise_lora, tiny_config, tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, WhisperForConditionalGeneration

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.base_parts import BasePartNotFoundError
from salmonn_hf.model import base_part_resolver as resolver
from salmonn_hf.model.checkpoint import config_from_base_parts
from salmonn_hf.model.configuration_beats import BeatsConfig
from salmonn_hf.model.modeling_beats import BeatsForAudioClassification, BeatsModel

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base_parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    WhisperForConditionalGeneration(tiny_config().audio_config).save_pretrained(root / "whisper")
    AutoModelForCausalLM.from_config(tiny_text_config(tie_word_embeddings=True)).save_pretrained(root / "llm")
    tiny_tokenizer().save_pretrained(root / "llm")
    return {"audio_tower": str(root / "whisper"), "language_model": str(root / "llm")}


@pytest.fixture
def adapter(base_parts, tmp_path):
    """A model whose trained parts are not zero, and the directory of its adapter checkpoint."""
    torch.manual_seed(2)
    config = config_from_base_parts(
        **base_parts,
        audio_token_id=3,
        projector_config={
            "qformer_config": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
            "window_frames": 8,
            "window_stride": 8,
            "queries_per_window": 2,
            "ctc_vocab_size": 4,
        },
    )
    model = SalmonnForConditionalGeneration.from_base_parts(config).eval()
    model.add_lora(LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or name.startswith("projector"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.projector.ctc_head.token_ids.copy_(torch.tensor([4, 5, 6, 7]))
    model.save_pretrained(tmp_path / "adapter")
    tiny_processor(config).save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("kind", [BeatsModel, BeatsForAudioClassification])
def test_beats_is_a_base_part(base_parts, tmp_path, kind):
    """Pretrained or fine-tuned, without its classifier; an adapter checkpoint names it and leaves it out."""
    beats = kind(
        BeatsConfig(
            embed_dim=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, num_labels=3,
        )
    )  # fmt: skip
    beats.save_pretrained(tmp_path / "beats")
    config = config_from_base_parts(
        **base_parts,
        sound_tower=str(tmp_path / "beats"),
        audio_token_id=3,
        projector_config={"qformer_config": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}},
    )
    assert config.projector_config.qformer_config.encoder_hidden_size == 32
    SalmonnForConditionalGeneration.from_base_parts(config).save_pretrained(tmp_path / "adapter")
    assert not any(key.startswith("sound_tower") for key in load_file(tmp_path / "adapter" / "model.safetensors"))
    model = AutoModel.from_pretrained(tmp_path / "adapter")
    own = beats.state_dict()
    loaded = model.sound_tower.state_dict()
    assert loaded
    for key, value in loaded.items():
        assert torch.equal(value, own[key if kind is BeatsModel else f"beats.{key}"]), key


def logits(model):
    inputs = tiny_processor(model.config).apply_transcription_request(noise(1.5))
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_the_file_holds_what_was_trained_and_nothing_else(adapter):
    model, directory = adapter
    saved = load_file(directory / "model.safetensors")
    for key in model.state_dict():
        trained = key.startswith("projector") or ".lora_" in key
        assert (key in saved) == trained, key
    assert json.loads((directory / "config.json").read_text())["base_parts"] == model.config.base_parts


@pytest.mark.parametrize("cls", [AutoModel, SalmonnForConditionalGeneration])
def test_loaded_adapter_is_the_trained_model(adapter, cls):
    model, directory = adapter
    loaded = cls.from_pretrained(directory)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert torch.equal(logits(model), logits(loaded))
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert loaded.name_or_path == str(directory)


def test_no_cache_directory_gets_into_the_config(base_parts, monkeypatch):
    monkeypatch.setattr("salmonn_hf.model.checkpoint.resolve_base_part", {n: base_parts[n] for n in base_parts}.get)
    config = config_from_base_parts("audio_tower", "language_model", audio_token_id=3)
    assert base_parts["language_model"] not in config.to_json_string()
    assert base_parts["audio_tower"] not in config.to_json_string()


def test_saved_again_it_is_the_same_file(adapter, tmp_path):
    _, directory = adapter
    SalmonnForConditionalGeneration.from_pretrained(directory).save_pretrained(tmp_path / "again")
    first, second = load_file(directory / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_merged_model_is_full_and_equal(adapter, tmp_path):
    model, directory = adapter
    before = logits(model)
    merged = SalmonnForConditionalGeneration.from_pretrained(directory).merge_lora()
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "full")
    full = AutoModel.from_pretrained(tmp_path / "full")
    assert full.config.base_parts is None and full.config.lora is None
    assert not any("lora" in key for key in full.state_dict())
    assert torch.equal(logits(full), logits(merged))


def test_dtype_and_device_map(adapter):
    _, directory = adapter
    loaded = AutoModel.from_pretrained(directory, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_missing_base_part_says_what_was_tried(adapter):
    _, directory = adapter
    config = json.loads((directory / "config.json").read_text())
    config["base_parts"]["language_model"] = "nobody/no-such-model"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BasePartNotFoundError, match="nobody/no-such-model"):
        AutoModel.from_pretrained(directory)


def test_a_base_part_of_another_size_is_named(adapter, tmp_path):
    _, directory = adapter
    AutoModelForCausalLM.from_config(tiny_text_config(intermediate_size=48)).save_pretrained(tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    config["base_parts"]["language_model"] = str(tmp_path / "other")
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other.*does not fit"):
        AutoModel.from_pretrained(directory)


def test_missing_left_over_and_truncated_tensors_are_refused(adapter):
    _, directory = adapter
    file = directory / "model.safetensors"
    complete = load_file(file)
    save_file({k: v for k, v in complete.items() if k != "projector.proj.weight"}, file)
    with pytest.raises(ValueError, match="missing.*projector.proj.weight"):
        AutoModel.from_pretrained(directory)
    save_file(complete | {"projector.extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="left over.*projector.extra"):
        AutoModel.from_pretrained(directory)
    save_file(complete, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match="not a complete safetensors file"):
        AutoModel.from_pretrained(directory)


def test_a_full_checkpoint_keeps_an_unmerged_adapter(tmp_path):
    model = tiny_model()
    model.add_lora(LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


def test_base_parts_are_fetched_as_the_checkpoint_is(adapter, monkeypatch):
    """With its token and cache, or not at all; the revision is the checkpoint's own."""
    _, directory = adapter
    config = json.loads((directory / "config.json").read_text())
    paths = {f"some/{part}": Path(path) for part, path in config["base_parts"].items()}
    config["base_parts"] = {part: f"some/{part}" for part in config["base_parts"]}
    (directory / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(
        "salmonn_hf.model.checkpoint.resolve_base_part", lambda name, **kwargs: asked.append(kwargs) or paths[name]
    )
    settings = {"token": "hf_mine", "cache_dir": str(directory.parent), "local_files_only": True}
    for cls in (AutoModel, SalmonnForConditionalGeneration):
        cls.from_pretrained(directory, revision="main", **settings)
    SalmonnForConditionalGeneration.from_base_parts(AutoConfig.from_pretrained(directory), **settings)
    AutoModel.from_pretrained(directory)
    assert asked == [settings] * 6 + [{}] * 2


def test_with_local_files_alone_nothing_is_fetched(adapter, monkeypatch):
    """Neither from the hub nor from a package registry."""
    _, directory = adapter
    config = json.loads((directory / "config.json").read_text())
    config["base_parts"]["audio_tower"] = "openai/whisper-tiny"  # which has a copy in a registry
    (directory / "config.json").write_text(json.dumps(config))
    looked_up = []
    monkeypatch.setattr(resolver, "_find_copy", lambda name, tried, fetch: looked_up.append((name, fetch)))
    monkeypatch.setattr(resolver, "from_hub_cache", lambda *_: None)
    monkeypatch.setattr(resolver, "from_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(BasePartNotFoundError, match="(?s)whisper-tiny.*local_files_only was given"):
        AutoModel.from_pretrained(directory, local_files_only=True)
    assert looked_up == [("openai/whisper-tiny", False)]


def test_what_peft_merges_into_base_parts_is_saved(adapter, tmp_path):
    """The base parts on disk are without it; what is taken out again leaves them as they are."""
    _, directory = adapter
    config = AutoConfig.from_pretrained(directory)
    config.lora = None
    bare = SalmonnForConditionalGeneration.from_base_parts(config).eval()
    bare.save_pretrained(tmp_path / "bare")
    for take_out in ("merge_and_unload", "unload"):
        wrapped = get_peft_model(AutoModel.from_pretrained(tmp_path / "bare"), LoraConfig(target_modules=["q_proj"]))
        randomise_lora(wrapped)
        expected = logits(wrapped) if take_out == "merge_and_unload" else logits(bare)
        getattr(wrapped, take_out)().save_pretrained(tmp_path / take_out)
        loaded = AutoModel.from_pretrained(tmp_path / take_out)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_a_second_adapter_beside_an_adapter_checkpoint(adapter, tmp_path):
    model, directory = adapter
    loaded = AutoModel.from_pretrained(directory)
    assert loaded.active_adapters() == ["default"]
    loaded.add_adapter(LoraConfig(target_modules=["k_proj", "fc2"]), "second")
    assert torch.equal(logits(loaded), logits(model))
    randomise_lora(loaded, "lora_B.second").save_pretrained(tmp_path / "second")
    again = AutoModel.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(logits(again), logits(loaded), rtol=1e-4, atol=1e-4)
    again.delete_adapter("adapter")
    again.save_pretrained(tmp_path / "again")
    assert "language_model.model.norm.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("saved", [{"max_shard_size": "2KB"}, {"max_shard_size": "2KB", "variant": "fp16"}, {}])
def test_shards_variants_and_subfolders_are_read(adapter, saved, tmp_path):
    model, inner = adapter[0], tmp_path / "there" / "inner"
    model.save_pretrained(inner, **saved)
    assert (len(list(inner.glob("*.safetensors"))) > 1) == bool(saved)
    variant = saved.get("variant")
    for cls in (AutoModel, SalmonnForConditionalGeneration):
        for place in ({"subfolder": "inner"}, {}):
            directory = inner.parent if place else inner
            assert torch.equal(logits(cls.from_pretrained(directory, variant=variant, **place)), logits(model))


def test_an_adapter_for_a_checkpoint_in_a_subfolder(adapter, tmp_path):
    model, inner = adapter[0], tmp_path / "there" / "inner"
    model.save_pretrained(inner, max_shard_size="2KB")
    loaded = AutoModel.from_pretrained(inner.parent, subfolder="inner")
    loaded.add_adapter(LoraConfig(target_modules=["k_proj", "fc2"]), "second")
    randomise_lora(loaded, "lora_B.second").save_pretrained(tmp_path / "second" / "inner", max_shard_size="2KB")
    again = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "second", subfolder="inner")
    torch.testing.assert_close(logits(again), logits(loaded), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no variant 'bf16'.*leave variant out"):
        loaded.save_pretrained(tmp_path / "third", variant="bf16")
    assert not (tmp_path / "third").exists()
    again.delete_adapter(["default", "adapter"])
    again.load_adapter(inner.parent, subfolder="inner")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("option", [{"init_lora_weights": i} for i in ("pissa", "olora")] + [{"bias": "lora_only"}])
def test_adapters_that_change_base_parts_are_refused(adapter, option, tmp_path):
    model, config = AutoModel.from_pretrained(adapter[1]), LoraConfig(target_modules=["k_proj", "fc2"], **option)
    before = logits(model)
    full = AutoModel.from_pretrained(adapter[1]).merge_lora()
    full.save_pretrained(tmp_path / "full")
    full = AutoModel.from_pretrained(tmp_path / "full")
    full.add_adapter(config, "second")
    full.save_pretrained(tmp_path / "second")
    for put_in in (
        lambda: model.add_adapter(config, "second"),
        lambda: model.load_adapter(tmp_path / "second", "second"),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*base parts.*leave it out"):
            put_in()
    assert model.active_adapters() == ["default"] and torch.equal(logits(model), before)


@pytest.mark.parametrize("option", [{"bias": "all"}, {"modules_to_save": ["norm"]}])
def test_own_lora_that_changes_base_parts_is_refused(adapter, option):
    config = AutoConfig.from_pretrained(adapter[1])
    config.lora = None
    model = SalmonnForConditionalGeneration.from_base_parts(config)
    with pytest.raises(ValueError, match=f"{next(iter(option))}.*base parts.*leave it out"):
        model.add_lora(LORA | option)
    assert model.config.lora is None and not hasattr(model, "peft_config")


def test_an_adapter_whose_weights_are_not_there_is_refused(adapter, tmp_path):
    _, directory = adapter
    loaded = AutoModel.from_pretrained(directory)
    loaded.add_adapter(LoraConfig(target_modules=["k_proj"]), "second")
    loaded.save_pretrained(tmp_path / "second")
    (tmp_path / "second" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="holds no adapter_model.safetensors"):
        AutoModel.from_pretrained(tmp_path / "second")


def test_who_asks_what_was_loaded_is_told_what_lacked(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = next(key for key in weights if key.startswith("projector."))
    del weights[lacking]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks projector"):
        SalmonnForConditionalGeneration.from_pretrained(tmp_path)
    _, report = SalmonnForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {lacking}


TINY_BEATS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "embed_dim": 8,
}
TINY_BEATS |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


@pytest.mark.parametrize(
    ("settings", "on_disk"),
    [
        ({}, ("audio_tower", "projector", "language_model")),
        ({"ctc_vocab_size": 7}, ("projector", "language_model")),
        ({"num_layers": 1}, ("audio_tower", "language_model")),
        ({"sound_config": BeatsConfig(**TINY_BEATS)}, ("sound_tower", "language_model")),
    ],
    ids=["qformer", "ctc", "whisper", "beats"],
)
def test_parts_may_lie_on_disk(settings, on_disk, tmp_path):
    """What is there is on the meta device until its module is called: no module takes another's weights."""
    model, processor = tiny_model(tiny_config(**settings)), tiny_processor(tiny_config(**settings))
    processor.feature_extractor.return_input_values = "sound_config" in settings
    inputs = processor.apply_transcription_request([noise(1.0)])
    model.save_pretrained(tmp_path)
    parts = [name for name, _ in model.named_children()]
    device_map = {part: "disk" if part in on_disk else "cpu" for part in parts}
    settings = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
    offloaded = SalmonnForConditionalGeneration.from_pretrained(tmp_path, **settings)
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
