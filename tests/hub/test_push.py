"""Pushing to a hub over HTTP: what lies there is what lies here, also after uploads that were cut off."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config, tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer
from hub_server import Hub, sha256
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.hub import push
from salmonn_hf.hub.push import PushError, push_to_hub, pushed_files
from salmonn_hf.model.checkpoint import config_from_base_parts

ROOT = Path(__file__).resolve().parents[2]
CARD = "---\nlicense: apache-2.0\n---\n\n# A model\n"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A checkpoint of its own, with a card and with what training leaves beside it."""
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (directory / "README.md").write_text(CARD)
    for name in ("checkpoint-2/model.safetensors", "runs/events.out.tfevents.1", "__pycache__/audio.pyc"):
        (directory / name).parent.mkdir()
        (directory / name).write_text("training")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "train.log", "skipped.tsv", ".env"):
        (directory / name).write_text("training")
    return directory


@pytest.fixture
def hub():
    with Hub({"hf_alice": "alice", "hf_bob": "bob"}) as hub:
        yield hub


@pytest.fixture
def online(hub, monkeypatch):
    """
    Lets this process reach the hub, as alice, and no other; processes are started by `command`. Transcripts are a
    constant here: of those it is shown there that they are real.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(push, "HfApi", partial(HfApi, endpoint=hub.url))
    monkeypatch.setattr(push, "transcribe", lambda *_, **__: "text")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    return hub


def contents(directory):
    """What should be pushed: the files that `save_pretrained` and the card's author wrote."""
    names = {"README.md", "chat_template.jinja"}
    files = [file for file in directory.iterdir() if file.name in names or file.suffix in (".py", ".safetensors")]
    files += [file for file in directory.glob("*.json") if file.name != "trainer_state.json"]
    assert len(files) > 25
    return {file.name: file.read_bytes() for file in files}


# What is pushed


def test_files_of_the_checkpoint_and_nothing_else(online, checkpoint):
    assert set(pushed_files(checkpoint)) == set(contents(checkpoint))
    commit = push_to_hub(checkpoint, "alice/tiny")
    assert online.files("alice/tiny") == contents(checkpoint)
    assert [oid for oid, _ in online.commits["alice/tiny"]][1:] == [commit]  # after the one that makes the repository


def test_the_code_is_the_packages_whatever_was_there(online, checkpoint):
    saved = contents(checkpoint)
    for module in checkpoint.glob("*.py"):  # as in a clone, where git holds none
        module.unlink()
    (checkpoint / "audio.py").write_text("raise ImportError")
    push_to_hub(checkpoint, "alice/tiny")
    assert online.files("alice/tiny") == saved == contents(checkpoint)


def test_nothing_new_is_no_commit(online, checkpoint):
    commits = {push_to_hub(checkpoint, "alice/tiny"), push_to_hub(checkpoint, "alice/tiny")}
    (checkpoint / "README.md").write_text(CARD + "\nNews.\n")
    assert len(commits) == 1 and push_to_hub(checkpoint, "alice/tiny") not in commits
    assert len(online.commits["alice/tiny"]) == 3 and len(online.uploads) == 1


def test_weights_of_an_earlier_push_do_not_stay(online, checkpoint):
    """`from_pretrained` would load model.safetensors rather than the shards beside it."""
    push_to_hub(checkpoint, "alice/tiny")
    (checkpoint / "model.safetensors").unlink()
    tiny_model(seed=1).save_pretrained(checkpoint, max_shard_size="100KB")
    push_to_hub(checkpoint, "alice/tiny")
    assert "model.safetensors.index.json" in online.files("alice/tiny")
    assert online.files("alice/tiny") == contents(checkpoint)


def test_private(online, checkpoint):
    push_to_hub(checkpoint, "alice/secret", private=True)
    push_to_hub(checkpoint, "alice/tiny")
    assert online.private == {"alice/secret"}
    with pytest.raises(PushError, match="alice/tiny exists and is public"):
        push_to_hub(checkpoint, "alice/tiny", private=True)


# What is refused


def edit_config(directory, **settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: shutil.rmtree(d), "no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "weights are missing"),
        (lambda d: cut_off(d / "model.safetensors"), "model.safetensors is not a complete safetensors file"),
        (lambda d: (d / "processor_config.json").unlink(), "no processor_config.json"),
        (lambda d: edit_config(d, model_type="beats"), "type 'beats', not 'salmonn'"),
        (lambda d: edit_config(d, text_config={"_name_or_path": "/data/llm"}), "text_config._name_or_path is '/data"),
        (lambda d: edit_config(d, base_parts={"sound_tower": str(d)}), "base_parts.sound_tower is '.*`hf upload"),
        (lambda d: edit_config(d, base_parts={"sound_tower": "~/beats"}), "base_parts.sound_tower is '~/beats'"),
        (lambda d: edit_config(d, base_parts={"sound_tower": "tests"}), "base_parts.sound_tower is 'tests'"),
    ],
)  # fmt: skip
def test_what_nobody_could_load_is_refused_before_anything_is_made(online, checkpoint, monkeypatch, harm, message):
    monkeypatch.chdir(ROOT)
    harm(checkpoint)
    with pytest.raises(PushError, match=message):
        push_to_hub(checkpoint, "alice/tiny")
    assert not online.commits


def test_what_cannot_transcribe_is_refused_before_anything_is_made(online, checkpoint, monkeypatch):
    def fails(*_, **__):
        raise PushError("cannot transcribe")

    monkeypatch.setattr(push, "transcribe", fails)
    with pytest.raises(PushError, match="cannot transcribe"):
        push_to_hub(checkpoint, "alice/tiny")
    with pytest.raises(PushError, match="gone.wav.*does not exist"):
        push_to_hub(checkpoint, "alice/tiny", audio="gone.wav")
    assert not online.commits


def test_who_may_not_push_is_told_why(online, checkpoint, monkeypatch, tmp_path, capsys):
    push_to_hub(checkpoint, "bob/tiny", token="hf_bob")
    for repo_id in ("bob/tiny", "bob/other"):
        with pytest.raises(PushError, match=f"{repo_id}, as alice: .*403.*somebody else's"):
            push_to_hub(checkpoint, repo_id)
    with pytest.raises(PushError, match="a/b/c was not pushed"):
        push_to_hub(checkpoint, "a/b/c")
    with pytest.raises(PushError, match="not pushed.*The token is not valid.*hf auth login"):
        push_to_hub(checkpoint, "alice/tiny", token="hf_stranger")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN")
    assert push.main([str(checkpoint), "alice/tiny"]) == 1
    assert "Not logged in: run `hf auth login`" in capsys.readouterr().err
    assert set(online.commits) == {"bob/tiny"} and len(online.commits["bob/tiny"]) == 2


def test_no_network(online, checkpoint, monkeypatch):
    monkeypatch.setattr(push, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(PushError, match="ConnectError.*the same command goes on"):
        push_to_hub(checkpoint, "alice/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(checkpoint, "alice/tiny")


# What goes wrong on the way


def test_an_upload_that_is_cut_off_is_begun_again(online, checkpoint):
    online.put_faults = ["cut"]
    push_to_hub(checkpoint, "alice/tiny")
    assert online.uploads == 2 * [sha256((checkpoint / "model.safetensors").read_bytes())]
    assert online.files("alice/tiny") == contents(checkpoint) and len(online.commits["alice/tiny"]) == 2


def test_after_an_upload_that_failed_the_same_command_uploads_the_rest(online, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    tiny_model().save_pretrained(checkpoint, max_shard_size="100KB")
    shards = {sha256(file.read_bytes()) for file in checkpoint.glob("*.safetensors")}
    online.put_faults = [None, 403]
    with pytest.raises(PushError, match="as alice: the push broke off. .*Error while uploading 'model-000"):
        push_to_hub(checkpoint, "alice/tiny")
    assert online.files("alice/tiny") == {}
    arrived = set(online.objects)
    assert arrived and arrived < shards
    online.uploads.clear()
    push_to_hub(checkpoint, "alice/tiny")
    assert set(online.uploads) == shards - arrived
    assert online.files("alice/tiny") == contents(checkpoint) and len(online.commits["alice/tiny"]) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_what_comes_back_other_than_it_went_is_named(online, checkpoint, name):
    online.corrupted = name
    with pytest.raises(PushError, match=f"alice/tiny holds a bad state: at commit [0-9a-f]+, {name} came back"):
        push_to_hub(checkpoint, "alice/tiny")


def test_another_transcript_is_a_bad_state(online, checkpoint, monkeypatch):
    monkeypatch.setattr(push, "transcribe", lambda model, *_, **__: model)
    with pytest.raises(PushError, match="bad state: .* makes 'alice/tiny', .*model.* '.*model'"):
        push_to_hub(checkpoint, "alice/tiny")


# The command, and processes that load what it pushed


@pytest.fixture
def command(hub, tmp_path):
    """Runs a command against the hub with an empty home of its own."""

    def run(*arguments, start=subprocess.run, **environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        settings |= hub.environment("hf_alice") | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return start([sys.executable, *map(str, arguments)], cwd=tmp_path, env=inherited | settings, **pipes)

    return run


LOAD = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModel

model = AutoModel.from_pretrained("alice/tiny", trust_remote_code=True)
saved = load_file(sys.argv[1])
loaded = model.state_dict()
assert saved.keys() <= loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
print(type(model).__module__)
"""


@pytest.mark.slow
def test_command_pushes_and_another_process_loads(hub, command, checkpoint, tmp_path):
    (tmp_path / "alice" / "tiny").mkdir(parents=True)  # where the command runs: not what is to be verified
    result = command("-m", "salmonn_hf.push", checkpoint, "alice/tiny", "--private")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "home" / "hub").exists()  # verified from another cache than this
    ((_, _), (commit, files)) = hub.commits["alice/tiny"]
    assert result.stdout.strip() == commit and hub.files("alice/tiny") == contents(checkpoint)
    assert f"/alice/tiny/tree/{commit} holds the files of" in result.stderr
    shutil.rmtree(tmp_path / "alice")
    loaded = command("-c", LOAD, checkpoint / "model.safetensors")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("transformers_modules.alice.tiny.")


@pytest.mark.slow
def test_killed_halfway_the_same_command_goes_on(hub, command, checkpoint):
    pushing = []
    hub.put_faults = [lambda: pushing[0].kill()]
    pushing.append(command("-m", "salmonn_hf.push", checkpoint, "alice/tiny", start=subprocess.Popen))
    pushing[0].communicate()
    assert pushing[0].returncode == -9
    assert hub.files("alice/tiny") == {} and not hub.objects
    result = command("-m", "salmonn_hf.push", checkpoint, "alice/tiny")
    assert result.returncode == 0, result.stderr
    assert hub.files("alice/tiny") == contents(checkpoint) and len(hub.commits["alice/tiny"]) == 2


@pytest.mark.slow
def test_a_hub_that_fails_for_long_leaves_no_commit(hub, command, checkpoint):
    hub.put_faults = 6 * [500]  # huggingface_hub tries six times
    result = command("-m", "salmonn_hf.push", checkpoint, "alice/tiny")
    assert result.returncode == 1 and len(hub.uploads) == 6
    assert "Error while uploading 'model.safetensors'" in result.stderr and "same command goes on" in result.stderr
    assert hub.files("alice/tiny") == {}
    result = command("-m", "salmonn_hf.push", checkpoint, "alice/tiny")
    assert result.returncode == 0, result.stderr
    assert hub.files("alice/tiny") == contents(checkpoint) and len(hub.commits["alice/tiny"]) == 2


@pytest.mark.slow
def test_a_flipped_bit_fails_the_command(hub, command, checkpoint):
    hub.corrupted = "model.safetensors"
    result = command("-m", "salmonn_hf.push", checkpoint, "alice/tiny")
    assert result.returncode == 1 and not result.stdout
    assert "holds a bad state: at commit" in result.stderr and "model.safetensors came back" in result.stderr


@pytest.mark.slow
def test_what_cannot_transcribe_fails_the_command_before_anything_is_made(hub, command, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    result = command("-m", "salmonn_hf.push", checkpoint, "alice/tiny")
    assert result.returncode == 1 and "cannot transcribe" in result.stderr and "okenizer" in result.stderr
    assert not hub.commits


@pytest.fixture
def base_parts(tmp_path):
    """Tiny base parts under hub names, in the package's own cache."""
    torch.manual_seed(1)
    own = tmp_path / "own"
    WhisperForConditionalGeneration(tiny_config().audio_config).save_pretrained(own / "tiny--whisper")
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(own / "tiny--llm")
    for name in ("whisper", "llm"):
        tiny_tokenizer().save_pretrained(own / f"tiny--{name}")
    return own


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hub cache", "converted copies"])
def test_base_parts_are_those_that_are_here(hub, command, base_parts, tmp_path, monkeypatch, source):
    """Nothing else has them: this hub has none. What is pushed is the adapter alone."""
    monkeypatch.setenv("SALMONN_CACHE", str(base_parts))
    qformer = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    projector = {"qformer_config": qformer, "window_frames": 8, "window_stride": 8, "queries_per_window": 2}
    config = config_from_base_parts("tiny/whisper", "tiny/llm", projector, audio_token_id=3)
    SalmonnForConditionalGeneration.from_base_parts(config).save_pretrained(tmp_path / "adapter")
    tiny_processor(config).save_pretrained(tmp_path / "adapter")
    if source == "hub cache":
        for name in ("whisper", "llm"):
            cached = tmp_path / "home" / "hub" / f"models--tiny--{name}"
            shutil.copytree(base_parts / f"tiny--{name}", cached / "snapshots" / ("0" * 40))
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text("0" * 40)
    copies = {"SALMONN_CACHE": str(base_parts if source == "converted copies" else tmp_path / "nothing")}
    result = command("-m", "salmonn_hf.push", tmp_path / "adapter", "alice/adapter", **copies)
    assert result.returncode == 0, result.stderr
    assert set(hub.files("alice/adapter")) == {file.name for file in (tmp_path / "adapter").iterdir()}


# The scripts


@pytest.mark.slow
def test_training_pushes_what_it_ends_with(hub, command, base_parts, tmp_path):
    from test_training import stage1_recipe, write_parquet

    for name, seed in (("train", 0), ("eval", 100)):
        write_parquet(tmp_path / f"{name}.parquet", 8, seed)
    recipe = stage1_recipe(tmp_path, tmp_path / "run") | {"audio_tower": "tiny/whisper", "language_model": "tiny/llm"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pushing = ["--push_to_hub", "true", "--hub_model_id", "alice/trained", "--hub_private_repo", "true"]
    script = ROOT / "training" / "run_stage1.py"
    result = command(script, tmp_path / "recipe.yaml", *pushing, SALMONN_CACHE=str(base_parts))
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run").glob("checkpoint-*"))
    pushed = hub.files("alice/trained")
    assert len(hub.commits["alice/trained"]) == 2 and hub.private == {"alice/trained"}
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_salmonn.py"} <= set(pushed)
    assert not [name for name in pushed if "/" in name or name in ("training_args.bin", "skipped.tsv")]
    assert all(data == (tmp_path / "run" / name).read_bytes() for name, data in pushed.items())


@pytest.mark.slow
def test_quantisation_pushes_its_result(hub, command, checkpoint, tmp_path):
    script, bits = ROOT / "training" / "quantize.py", ["--language_model_bits", "8", "--method", "nearest"]
    paths = ["--model_name_or_path", checkpoint, "--output_dir", tmp_path / "small"]
    result = command(script, *paths, *bits, "--hub_model_id", "alice/small")
    assert result.returncode == 0, result.stderr
    bits = hub.files("alice/small")["README.md"].decode().split("Bits per weight: ")[1].split(".")[0]
    assert "language_model 8" in bits and "projector 8" in bits
    assert set(hub.files("alice/small")) == {file.name for file in (tmp_path / "small").iterdir()}
