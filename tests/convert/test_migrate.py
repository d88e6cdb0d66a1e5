"""
Checkpoints of salmonn_hf 0.1.0, brought up to date: the same logits and token ids as that version gave for them.

`checkpoints_0_1_0` holds tiny ones that it wrote (adapters, merged in bfloat16, and with weights of 4 and 8 bits; of
both projectors), the base parts of the adapters, and in `expected.safetensors` what it gave for a clip of noise, in
float32: the logits of a prompt's last two positions, and the prompt with eight generated tokens.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import noise
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from salmonn_hf.convert.__main__ import main
from salmonn_hf.convert.migrate import migrate

OLD = Path(__file__).resolve().parents[1] / "checkpoints_0_1_0"
NAMES = sorted(file.parent.name for file in OLD.glob("*-*/config.json"))
EXPECTED = load_file(OLD / "expected.safetensors")


@pytest.fixture(autouse=True)
def base_parts(monkeypatch):
    """The adapters' base parts have names relative to their directory."""
    monkeypatch.chdir(OLD)


@pytest.fixture(params=NAMES)
def old(request, tmp_path):
    """An old checkpoint with its tokenizer, which all of them share."""
    directory = tmp_path / request.param
    shutil.copytree(OLD / request.param, directory)
    shutil.copytree(OLD / "tokenizer", directory, dirs_exist_ok=True)
    return directory


def check_outputs(directory, name):
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = AutoProcessor.from_pretrained(directory).apply_transcription_request(noise(1.2, 7))
    with torch.no_grad():
        logits = model(**inputs).logits[0, -2:]
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    # Not to the bit: processors add products in other orders.
    torch.testing.assert_close(logits, EXPECTED[f"{name}.logits"], atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, EXPECTED[f"{name}.tokens"])


def test_there_is_one_of_each():
    kinds = ("4bit", "adapter", "merged")
    assert NAMES == [f"{projector}-{kind}" for projector in ("qformer", "whisper") for kind in kinds]


def test_migrated_it_gives_what_it_gave(old, tmp_path):
    main(["migrate", str(old), str(tmp_path / "new")])
    check_outputs(tmp_path / "new", old.name)


def test_every_tensor_is_the_same(old, tmp_path):
    migrate(old, tmp_path / "new")
    before, after = (load_file(path / "model.safetensors") for path in (old, tmp_path / "new"))
    after = {old_name(key): value for key, value in after.items()}
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key


def old_name(key):
    """The projector was called connector, and some of its modules stood beside it."""
    own = key.removeprefix("projector.")
    beside = ("audio_norm.", "sound_norm.", "sound_summary.", "speech_tokens.", "ctc_head.")
    return own if own == key or own.startswith(beside) else f"connector.{own}"


def test_saved_again_it_stays_the_same(old, tmp_path):
    migrate(old, tmp_path / "new")
    AutoModel.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "again")
    check_outputs(tmp_path / "again", old.name)


def test_its_config_loses_nothing_but_training_settings(tmp_path):
    migrate(OLD / "whisper-adapter", tmp_path)
    old, config = json.loads((OLD / "whisper-adapter/config.json").read_text()), AutoConfig.from_pretrained(tmp_path)
    projector = config.projector_config
    shared = {"window_frames", "window_context", "window_reach", "merged_windows", "frame_mlp_size", "ctc_vocab_size"}
    for field in shared | {"ctc_trained_size", "sound_summary_size", "sound_kinds", "sound_name_size"}:
        assert getattr(projector, field) == old[field], field
    assert projector.dropout == old["qformer_config"]["hidden_dropout_prob"] == 0.05
    assert projector.num_layers == old["speech_decoder_layers"]
    assert (config.lora, config.audio_lora, config.sound_layers) == (old["lora"], old["audio_lora"], [1, 2])
    assert config.base_parts == {
        "audio_tower": "base/whisper", "language_model": "base/llm", "projector.speech_tokens": "base/whisper",
    }  # fmt: skip

    migrate(OLD / "qformer-4bit", tmp_path / "qformer")
    old = json.loads((OLD / "qformer-4bit/config.json").read_text())
    config = AutoConfig.from_pretrained(tmp_path / "qformer")
    projector = config.projector_config
    shared = {"window_frames", "window_stride", "queries_per_window", "pad_to_30_seconds", "ctc_vocab_size"}
    for field in shared | {"window_position_embeddings", "frame_mlp_size", "ctc_merges"}:
        assert getattr(projector, field) == old[field], field
    assert projector.output_norm == old["projector_norm"] is True
    of_connector = {"projector" if part == "connector" else part: bits for part, bits in old["quantization"].items()}
    assert config.quantized_parts == of_connector and config.dtype == torch.bfloat16


def test_shards_are_migrated(tmp_path):
    """A checkpoint of several files and their index."""
    source, weights = tmp_path / "qformer-merged", load_file(OLD / "qformer-merged/model.safetensors")
    shutil.copytree(OLD / "qformer-merged", source)
    shutil.copytree(OLD / "tokenizer", source, dirs_exist_ok=True)
    (source / "model.safetensors").unlink()
    keys, weight_map = sorted(weights), {}
    for part, half in enumerate((keys[::2], keys[1::2]), start=1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({key: weights[key] for key in half}, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    migrate(source, tmp_path / "new")
    check_outputs(tmp_path / "new", "qformer-merged")


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize("name", NAMES)
def test_unmigrated_it_names_the_command(load, name):
    with pytest.raises(ValueError, match="0.1.0.*python -m salmonn_hf.convert migrate OLD NEW"):
        load(OLD / name)


def test_what_needs_no_migration_is_refused(tmp_path, capsys):
    migrate(OLD / "qformer-adapter", tmp_path / "new")
    with pytest.raises(ValueError, match="new is no SALMONN checkpoint of salmonn_hf 0.1.0"):
        migrate(tmp_path / "new", tmp_path / "newer")
    with pytest.raises(ValueError, match="llm is no SALMONN checkpoint"):
        migrate("base/llm", tmp_path / "newer")
    assert not (tmp_path / "newer").exists()
    with pytest.raises(SystemExit, match="error: .*new exists and is not empty"):
        main(["migrate", "qformer-adapter", str(tmp_path / "new")])


def test_a_directory_without_a_config_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: .*config.json"):
        main(["migrate", str(tmp_path), str(tmp_path / "new")])
