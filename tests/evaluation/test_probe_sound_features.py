"""Small BEATs of one's own beside Whisper's layers: tokens, crops, features and probes."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, tiny_config
from test_sources import embedded, flac, write
from transformers import WhisperFeatureExtractor, WhisperModel

from salmonn_hf import BeatsConfig, BeatsModel

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "eval" / "probe_sound_features.py"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = tiny_config().audio_config
    config.encoder_layers = 3
    WhisperModel(config).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(path)
    return path


def test_the_layers_are_those_of_transformers(whisper):
    clip = noise(30.0)
    ours = SCRIPT["Whisper"](str(whisper), [1, 2], [noise(0.5), noise(1.0)])
    features = WhisperFeatureExtractor.from_pretrained(whisper)(clip, sampling_rate=16000, return_tensors="pt")
    encoder = WhisperModel.from_pretrained(whisper, dtype=torch.bfloat16).encoder.eval()
    with torch.no_grad():
        theirs = encoder(features.input_features.bfloat16(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours.frames(clip), torch.cat(theirs).float(), rtol=0.02, atol=0.02)


def test_a_token_is_that_of_its_own_patch():
    config = BeatsConfig()
    tokenizer = SCRIPT["RandomTokenizer"](config)
    fbank = torch.randn(1, 48, 128)
    changed = fbank.clone()
    changed[0, 16:32, 32:48] += torch.randn(16, 16) * 5  # the third of the second step
    tokens, others = tokenizer(fbank)[0], tokenizer(changed)[0]
    assert tokens.shape == (24,) and tokens[10] != others[10]
    assert BeatsModel(SCRIPT["SMALL_BEATS"]).patch_embedding(changed).shape[1] == 24
    embedding = SCRIPT["BeatsPatchEmbedding"](config)
    moved = (embedding(fbank) != embedding(changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [10]


def test_crops_come_from_the_clips():
    clips = [np.arange(100_000, dtype=np.float32), -np.arange(1, 1001, dtype=np.float32)]
    for batch in SCRIPT["crops"](clips, 8, 3):
        for row in batch.numpy():
            step = np.diff(row)
            assert (step == 1).all() or (row < 0).all() and len(np.unique(row)) == 1000


def test_a_probe_finds_what_features_tell_and_nothing_else():
    torch.manual_seed(0)
    y, truth = torch.arange(200) % 5, torch.arange(60) % 5
    told = [torch.randn(len(labels), 16) + 4 * torch.eye(16)[labels] for labels in (y, truth)]
    assert min(SCRIPT["probe"](*told, y, truth).values()) > 0.9
    untold = [torch.randn(len(labels), 16) for labels in (y, truth)]
    assert max(SCRIPT["probe"](*untold, y, truth).values()) < 0.5


def test_command(whisper, tmp_path, monkeypatch):
    clips = [embedded(flac(0.1 + 0.3 * i, i), None, label="abcabc"[i]) for i in range(6)]
    file = write(tmp_path / "clips.parquet", clips)
    more = write(tmp_path / "more.parquet", [{"audio": clip["audio"], "text": "other columns"} for clip in clips])
    arguments = ["--train", file, "--test", file, "--audio", file, more, "--whisper", whisper]
    arguments += ["--whisper_layers", 1, 2, "--steps", 2, "--batch_size", 2, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["probe_sound_features.py", *map(str, arguments)])
    SCRIPT["main"]()
    accuracy = json.loads((tmp_path / "out" / "result.json").read_text())["accuracy"]
    assert len(accuracy) == 4 + 1 + 3
    assert all(row["nearest"] == 1 for row in accuracy.values())  # each clip is its own nearest
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 2 + 8
