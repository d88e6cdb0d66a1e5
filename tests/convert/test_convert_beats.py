"""Original BEATs checkpoints converted, exported again, and refused where they are damaged."""

import argparse
import json
import os

import pytest
import torch
from conftest import golden_path, noise
from test_modeling_beats import tiny_beats
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

from salmonn_hf import BeatsConfig, BeatsForAudioClassification, BeatsModel
from salmonn_hf.convert.__main__ import main
from salmonn_hf.convert.beats import (
    convert_beats,
    encoder_tensors,
    export_beats,
    from_original_key,
    read_beats_checkpoint,
    to_original_key,
)
from salmonn_hf.convert.original_checkpoint import load_original_checkpoint

BIAS = "encoder.layers.{}.self_attn.relative_attention_bias.weight"


@pytest.fixture(scope="module", params=[BeatsModel, BeatsForAudioClassification], ids=["pretrained", "finetuned"])
def original(request, tmp_path_factory):
    """The path of a tiny checkpoint in the original layout, and the model that it is of."""
    directory = tmp_path_factory.mktemp("original")
    model = tiny_beats(request.param, id2label={0: "Speech", 1: "Music", 2: "Rain"})
    model.save_pretrained(directory / "model")
    export_beats(directory / "model", directory / "beats.pt")
    return directory / "beats.pt", model


def changed(path, tmp_path, change):
    """A copy of a checkpoint after `change(checkpoint)`."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@torch.no_grad()
def test_convert(original, tmp_path):
    path, model = original
    report = convert_beats(path, tmp_path / "out")
    assert f"left out, the same as layer 0's: {BIAS.format(1)}" in report
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    inputs = AutoFeatureExtractor.from_pretrained(tmp_path / "out")([noise(1.0), noise(0.4, 1)], return_tensors="pt")
    auto_class = AutoModel if type(model) is BeatsModel else AutoModelForAudioClassification
    loaded, loading = auto_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(model) and not any(loading.values())
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])

    config, tensors = read_beats_checkpoint(path)
    assert config.architectures == [type(model).__name__]
    encoder = BeatsModel(config).eval()
    encoder.load_state_dict(encoder_tensors(tensors))
    states = getattr(model, "beats", model)(**inputs).last_hidden_state
    assert torch.equal(encoder(**inputs).last_hidden_state, states)


def test_command_line(original, tmp_path, capsys):
    main(["beats", str(original[0]), str(tmp_path / "out")])
    assert f"{original[0]} -> {tmp_path / 'out'}" in capsys.readouterr().out
    main(["export", str(tmp_path / "out"), str(tmp_path / "back.pt")])
    assert "back.pt" in capsys.readouterr().out
    assert read_beats_checkpoint(tmp_path / "back.pt")[0] == read_beats_checkpoint(original[0])[0]
    with pytest.raises(SystemExit, match="error: .*not empty"):
        main(["beats", str(original[0]), str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["beats_tiny", "beats_tiny_finetuned"])
def test_round_trip(name, tmp_path):
    original = golden_path(f"{name}.pt")
    convert_beats(original, tmp_path / "out")
    export_beats(tmp_path / "out", tmp_path / "again.pt")
    before, after = (torch.load(path, weights_only=True) for path in (original, tmp_path / "again.pt"))
    assert before["cfg"] == after["cfg"] and before.get("label_dict") == after.get("label_dict")
    assert before.keys() == after.keys() and before["model"].keys() == after["model"].keys()
    for key, tensor in before["model"].items():
        assert tensor.dtype == after["model"][key].dtype and torch.equal(tensor, after["model"][key]), key
        if not key.startswith("predictor.") and key not in (BIAS.format(1), BIAS.format(2)):
            assert to_original_key(from_original_key(key)) == key


@torch.no_grad()
def test_pipeline(original, tmp_path, caplog):
    path, model = original
    if type(model) is BeatsModel:
        pytest.skip("only a fine-tuned checkpoint classifies")
    convert_beats(path, tmp_path / "out")
    classifier = pipeline("audio-classification", model=str(tmp_path / "out"))
    clip = noise(1.0)
    scores = {answer["label"]: answer["score"] for answer in classifier(clip)}
    expected = model(torch.as_tensor(clip)[None]).logits[0].sigmoid()
    assert scores == pytest.approx(dict(zip(("Speech", "Music", "Rain"), expected.tolist(), strict=True)), abs=1e-6)
    assert "not supported" not in caplog.text


def test_every_setting_is_read(original, tmp_path):
    settings = {
        "encoder_layers": 2,
        "activation_fn": "gelu_accurate",
        "layer_norm_first": True,
        "deep_norm": False,
        "dropout": 0.2,
        "attention_dropout": 0.3,
        "activation_dropout": 0.4,
        "encoder_layerdrop": 0.05,
        "dropout_input": 0.6,
        "predictor_dropout": 0.7,
        "layer_wise_gradient_decay_ratio": 0.8,
        "max_distance": 900,
    }
    config, _ = read_beats_checkpoint(changed(original[0], tmp_path, lambda c: c["cfg"].update(settings)))
    assert (config.num_hidden_layers, config.hidden_act, config.pre_norm) == (2, "gelu_pytorch_tanh", True)
    assert (config.hidden_dropout, config.attention_dropout, config.activation_dropout) == (0.2, 0.3, 0.4)
    assert (config.layerdrop, config.feat_proj_dropout, config.classifier_dropout) == (0.05, 0.6, 0.7)
    assert (config.gradient_decay, config.max_distance, config.deep_norm) == (0.8, 900, False)
    # What the cfg does not say is as the original has it, not as the published models have it.
    config, _ = read_beats_checkpoint(changed(original[0], tmp_path, lambda c: c["cfg"].pop("max_distance")))
    assert config.max_distance == 1280 != BeatsConfig().max_distance


def test_unread_setting_is_reported(original, tmp_path):
    path = changed(original[0], tmp_path, lambda c: c["cfg"].update(mask_prob=0.8))
    assert "cfg['mask_prob'] = 0.8" in convert_beats(path, tmp_path / "out")


def without_tensor(checkpoint):
    del checkpoint["model"]["encoder.layers.1.fc1.bias"]


def with_a_tensor_more(checkpoint):
    checkpoint["model"]["decoder.weight"] = torch.zeros(1)


def with_a_layer_more(checkpoint):
    checkpoint["model"]["encoder.layers.2.fc1.bias"] = torch.zeros(32)


def with_another_shape(checkpoint):
    checkpoint["model"]["layer_norm.weight"] = torch.zeros(9)


def with_another_bias(checkpoint):
    checkpoint["model"][BIAS.format(1)] = checkpoint["model"][BIAS.format(1)] + 1


@pytest.mark.parametrize(
    "change, message",
    [
        (without_tensor, r"missing tensors \['encoder.layers.1.fc1.bias'\]"),
        (with_a_tensor_more, r"left over \['decoder.weight'\]"),
        (with_a_layer_more, r"left over \['encoder.layers.2.fc1.bias'\]"),
        (with_another_shape, r"layer_norm.weight has shape \(9,\), but its place in the model has \(8,\)"),
        (with_another_bias, "differs from layer 0's"),
        (lambda c: c.pop("cfg"), "no dict 'cfg'"),
        (lambda c: c.pop("model"), "no dict 'model'"),
        (lambda c: c["cfg"].pop("input_patch_size"), "no input_patch_size"),
        (lambda c: c["cfg"].update(activation_fn="glu"), r"cfg\['activation_fn'\] is 'glu'"),
        (lambda c: c["cfg"].update(activation_fn=["gelu"]), r"cfg\['activation_fn'\] is \['gelu'\]"),
        (lambda c: c["cfg"].update(encoder_layers="two"), "num_hidden_layers"),
        (lambda c: c["cfg"].update(encoder_layers=3), "missing tensors"),
        (lambda c: c["cfg"].update(encoder_ffn_embed_dim=64), r"fc1.weight has shape \(32, 16\)"),
        (lambda c: c["cfg"].update(encoder_attention_heads=3), "num_attention_heads 3"),
        (lambda c: c["cfg"].update(layer_norm_first=True), "pre_norm"),
        (lambda c: c.update(label_dict={0: "Speech"}), "label_dict has 1 entries"),
    ],
)
def test_bad_checkpoint(original, change, message, tmp_path):
    path = changed(original[0], tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        convert_beats(path, tmp_path / "out")
    assert str(path) in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["changed.pt"]  # nothing half-written


def test_occupied_directory(original, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert_beats(original[0], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_export_needs_a_whole_beats_model(original, tmp_path):
    convert_beats(original[0], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="lacks the tensors"):
        export_beats(tmp_path / "out", tmp_path / "beats.pt")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    with pytest.raises(ValueError, match="'hubert'"):
        export_beats(tmp_path / "out", tmp_path / "beats.pt")
    assert not (tmp_path / "beats.pt").exists()


class Code:
    """Unpickled without care, it makes a directory."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickled_code_is_not_run(tmp_path):
    path, target = tmp_path / "code.pt", tmp_path / "ran"
    torch.save({"cfg": {}, "model": {}, "extra": Code(target)}, path)
    with pytest.raises(ValueError, match=r"code\.pt holds pickled code \(posix\.mkdir\), which is not run"):
        load_original_checkpoint(path)
    assert not target.exists()
    torch.save({"model": {}, "args": argparse.Namespace(layers=2)}, path)
    with pytest.raises(ValueError, match=r"argparse\.Namespace"):
        load_original_checkpoint(path)


def test_damaged_files(original, tmp_path):
    content = original[0].read_bytes()
    path = tmp_path / "beats.pt"
    for damaged in (content[: len(content) // 2], content[:100], b"", b"<!DOCTYPE html><html></html>", b"hello\n"):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"beats\.pt is .*Download it again"):
            load_original_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_original_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        load_original_checkpoint(tmp_path / "none.pt")
