"""
The code in a checkpoint, from a hub, in a process that has neither the package nor any library that is optional.

From a hub, transformers looks at the imports of every module; of a directory, at those of the first alone.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer
from hub_server import Hub
from test_quantized_layers import quantized_tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, WhisperForConditionalGeneration, pipeline
from transformers.dynamic_module_utils import get_relative_import_files

import salmonn_hf
from salmonn_hf.base_parts import REGISTRY_COPIES
from salmonn_hf.model.checkpoint import config_from_base_parts

ROOT = Path(__file__).resolve().parents[2]
MODEL_ROOM = Path(salmonn_hf.__file__).parent / "model"
MODULES = {file.name for file in MODEL_ROOM.glob("*.py")} - {"__init__.py"}
REQUIRED = ["torch", "transformers", "safetensors", "numpy", "soundfile", "soxr", "huggingface_hub", "tokenizers"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}

# Read by Python as it starts: hides packages as if they were not installed.
SITECUSTOMIZE = """
import sys

HIDDEN = frozenset({hidden!r})


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Hiding, sys.meta_path)
"""
SCRIPT = """
import json, sys
from importlib.util import find_spec
from pathlib import Path

assert not any(map(find_spec, ["salmonn_hf", "peft", "gguf", "accelerate", "datasets", "torchcodec"]))
from transformers import AutoModel, AutoProcessor, pipeline

clip, saved, *names = sys.argv[1:]
answers = {}
for name in names:
    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=True)
        model.save_pretrained(Path(saved) / name)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        inputs = processor.apply_transcription_request([clip])
        output = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
        transcriber = pipeline("automatic-speech-recognition", model=name, trust_remote_code=True)
        answers[name] = {
            "pipeline": transcriber(clip, max_new_tokens=20)["text"],
            "model": processor.batch_decode(output, skip_special_tokens=True)[0],
            "module": type(model).__module__,
        }
    except Exception as error:
        answers[name] = {"type": type(error).__name__, "error": str(error)}
print(json.dumps(answers))
"""


def optional_packages() -> list[str]:
    """Everything that is installed here, but what a checkpoint may ask for and what that itself needs."""
    needed, names = set(), [*REQUIRED]
    while names:
        name = re.sub("[-_.]+", "-", names.pop()).lower()
        if name not in needed:
            needed.add(name)
            requirements = [line for line in requirements_of(name) if "extra ==" not in line]
            names += [re.match("[A-Za-z0-9._-]+", line)[0] for line in requirements]
    installed = packages_distributions().items()
    hidden = [p for p, owners in installed if not {re.sub("[-_.]+", "-", o).lower() for o in owners} & needed]
    return sorted({*hidden, "salmonn_hf"})


def requirements_of(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except ModuleNotFoundError:  # of another platform
        return []


def bare_process(root: Path, *arguments, **environment) -> str:
    """The output of a process that sees what a checkpoint may ask for, and nothing else of this environment."""
    (root / "bare").mkdir(exist_ok=True)
    (root / "bare" / "sitecustomize.py").write_text(SITECUSTOMIZE.format(hidden=optional_packages()))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    settings = {"HF_HOME": str(root / "home"), "PYTHONPATH": str(root / "bare"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=root, env=inherited | settings | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By repository: a full model, one of 4 and 8 bits, one with unmerged LoRA, and one that names its base parts."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {"merged": tiny_model(), "quantised": quantized_tiny_model(), "unmerged": tiny_model()}
    models["unmerged"].add_lora(LORA)
    torch.manual_seed(1)
    WhisperForConditionalGeneration(tiny_config().audio_config).save_pretrained(root / "whisper")
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(root / "llm")
    tiny_tokenizer().save_pretrained(root / "llm")
    qformer = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    projector = {"qformer_config": qformer}
    config = config_from_base_parts(str(root / "whisper"), str(root / "llm"), projector, audio_token_id=3)
    models["adapter"] = salmonn_hf.SalmonnForConditionalGeneration.from_base_parts(config)
    models["adapter"].config.base_parts = {"audio_tower": "openai/whisper-tiny", "language_model": "tiny/llm"}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_processor(model.config).save_pretrained(root / name)
    return {f"alice/{name}": root / name for name in models}


@pytest.fixture(scope="module")
def answers(checkpoints, tmp_path_factory):
    """What a bare process makes of each, and the directory in which it saved them again."""
    root = tmp_path_factory.mktemp("bare")
    soundfile.write(root / "clip.wav", noise(1.5), 16000)
    for client in ("npm", "pip"):
        (root / "bin").mkdir(exist_ok=True)
        (root / "bin" / client).write_text(f"#!/bin/sh\ntouch {root}/{client}-was-started\nexit 1\n")
        (root / "bin" / client).chmod(0o755)
    with Hub({"hf_alice": "alice"}) as hub:
        for name, directory in checkpoints.items():
            hub.add(name, directory)
        settings = hub.environment("hf_alice") | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}"}
        output = bare_process(root, "-c", SCRIPT, root / "clip.wav", root / "saved", *checkpoints, **settings)
    return json.loads(output.splitlines()[-1]), root


@pytest.mark.parametrize("name", ["alice/merged", "alice/quantised"])
def test_without_the_package_and_optional_libraries_it_transcribes_the_same(checkpoints, answers, name):
    found, root = answers[0][name], answers[1]
    assert "error" not in found, found["error"]
    assert found.pop("module").startswith(f"transformers_modules.{name.replace('/', '.')}.")
    expected = pipeline("automatic-speech-recognition", model=str(checkpoints[name]))
    text = expected(str(root / "clip.wav"), max_new_tokens=20)["text"]
    assert text and found["pipeline"] == text and " ".join(found["model"].split()) == text


def test_the_model_room_is_what_travels(checkpoints, answers):
    """Also where the model that is saved came with its code from a hub."""
    directories = [*checkpoints.values(), answers[1] / "saved" / "alice" / "merged"]
    for directory in directories:
        files = {file.name: file.read_text() for file in directory.glob("*.py")}
        assert files == {name: (MODEL_ROOM / name).read_text() for name in MODULES}, directory


def test_every_module_is_found_from_the_models():
    """By transformers, which brings no others along."""
    found = {Path(file).name for file in get_relative_import_files(MODEL_ROOM / "modeling_salmonn.py")}
    assert found | {"modeling_salmonn.py"} == MODULES


def test_unmerged_lora_asks_for_peft(answers):
    assert (
        "This model has LoRA beside its weights, which needs PEFT: pip install peft"
        in (answers[0]["alice/unmerged"]["error"])
    )


def test_remote_code_starts_no_package_client(answers):
    """The base part that is missing has a copy in a registry."""
    error = answers[0]["alice/adapter"]["error"]
    assert "openai/whisper-tiny" in REGISTRY_COPIES
    assert "base part 'openai/whisper-tiny' was not found" in error and "install the package salmonn_hf" in error
    assert not list(answers[1].glob("*-was-started"))


def test_git_holds_no_copy_of_the_code():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git clone: what git holds cannot be listed")
    listed = subprocess.run(
        ["git", "ls-files", "model_cards"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert "model_cards/salmonn-lite-nano/model.safetensors" in listed
    assert [name for name in listed if name.endswith(".py")] == ["model_cards/make_card.py"]


@pytest.mark.slow
def test_the_nano_model_merged_and_pushed_transcribes_a_recording(tmp_path):
    clip = ROOT / "eval" / "recordings" / "librivox-austen-930.flac"
    nano = ROOT / "model_cards" / "salmonn-lite-nano"
    AutoModel.from_pretrained(nano).merge_lora().save_pretrained(tmp_path / "nano")
    AutoProcessor.from_pretrained(nano).save_pretrained(tmp_path / "nano")
    with Hub({"hf_alice": "alice"}) as hub:
        hub.add("alice/nano", tmp_path / "nano")
        arguments = ["-c", SCRIPT, clip, tmp_path / "saved", "alice/nano"]
        output = bare_process(tmp_path, *arguments, **hub.environment("hf_alice"))
    found = json.loads(output.splitlines()[-1])["alice/nano"]
    transcriber = pipeline("automatic-speech-recognition", model=str(tmp_path / "nano"))
    assert found["pipeline"] == transcriber(str(clip), max_new_tokens=20)["text"]
    assert len(found["pipeline"].split()) > 5
