"""Checkpoints with LoRA of their own, by name on a hub, where transformers loads what adapter_config.json names."""

import json

import pytest
from conftest import LORA, randomise_lora, tiny_config, tiny_model, tiny_processor
from peft import LoraConfig
from test_push import command, hub, online  # noqa: F401
from transformers import AutoModel

from salmonn_hf.hub.push import push_to_hub

# ruff: noqa: F811 (fixtures of another file)

pytestmark = pytest.mark.slow

LOAD = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, pipeline

directory, expected, *names = sys.argv[1:]
saved, answers = load_file(expected), {}
if directory != "none":
    AutoModel.from_pretrained(directory).push_to_hub("alice/method")
    AutoProcessor.from_pretrained(directory).push_to_hub("alice/method")
for name in names:
    transcriber = pipeline("automatic-speech-recognition", model=name, trust_remote_code=True)
    for model in (AutoModel.from_pretrained(name, trust_remote_code=True), transcriber.model):
        loaded = model.state_dict()
        assert saved.keys() <= loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved), name
        answers[name] = [type(model).__module__, model.active_adapters()]
print(json.dumps(answers))
"""


@pytest.fixture
def checkpoint(tmp_path):
    model = randomise_lora(tiny_model(tiny_config(lora=LORA)))
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def base_named(hub, name):
    return json.loads(hub.files(name)["adapter_config.json"])["base_model_name_or_path"]


def test_pushed_and_uploaded_checkpoints_load(online, command, checkpoint):
    """By our command, by transformers' method, and file by file."""
    online.add("alice/files", checkpoint)
    push_to_hub(checkpoint, "alice/pushed")
    assert base_named(online, "alice/pushed") == "alice/pushed"
    names = ["alice/files", "alice/pushed", "alice/method"]
    result = command("-c", "import salmonn_hf" + LOAD, checkpoint, checkpoint / "model.safetensors", *names)
    assert result.returncode == 0, result.stderr
    assert base_named(online, "alice/method") == "alice/method"
    answers = json.loads(result.stdout.splitlines()[-1])
    assert answers == {name: ["salmonn_hf.model.modeling_salmonn", ["default"]] for name in names}


def test_without_the_package(online, command, checkpoint):
    push_to_hub(checkpoint, "alice/pushed")
    result = command("-c", LOAD, "none", checkpoint / "model.safetensors", "alice/pushed")
    assert result.returncode == 0, result.stderr
    ((module, adapters),) = json.loads(result.stdout.splitlines()[-1]).values()
    assert module.startswith("transformers_modules.alice.pushed.") and adapters == ["default"]


def test_an_adapter_of_a_checkpoint_on_the_hub(online, command, checkpoint, tmp_path):
    push_to_hub(checkpoint, "alice/pushed")
    model = AutoModel.from_pretrained(checkpoint)
    model.add_adapter(LoraConfig(r=2, target_modules=["down_proj"]), "second")
    model.name_or_path = "alice/pushed"
    randomise_lora(model, "lora_B.second").save_pretrained(tmp_path / "second")
    online.add("alice/second", tmp_path / "second")
    result = command("-c", LOAD, "none", checkpoint / "model.safetensors", "alice/second")
    assert result.returncode == 0, result.stderr
    ((_, adapters),) = json.loads(result.stdout.splitlines()[-1]).values()
    assert adapters == ["default", "adapter"]
