"""Several processes train as one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import tiny_model
from safetensors.torch import load_file
from test_training import ROOT, history, parts, run, stage1_recipe, stage2_recipe, write_parquet  # noqa: F401
from transformers import AutoModel

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.training.arguments import SalmonnTrainingArguments
from salmonn_hf.training.checkpoints import last_checkpoint
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.sharding import choose_what_is_sharded, hide_unsharded_parts

CONFIGS = ROOT / "training" / "accelerate_configs"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# Runs a training script, and writes how each process holds the parameters when it starts its first step.
PROBE = """
import json, runpy, sys
from pathlib import Path
from torch.distributed.tensor import DTensor
from salmonn_hf.training.trainer import SalmonnTrainer

step = SalmonnTrainer.training_step

def training_step(trainer, *args, **kwargs):
    held = Path(trainer.args.output_dir, f"held-{trainer.args.process_index}.json")
    if not held.exists():
        sizes = {}
        for name, parameter in trainer.model.named_parameters():
            is_sharded = isinstance(parameter, DTensor)
            local = parameter.to_local() if is_sharded else parameter
            sizes[name] = [is_sharded, local.numel(), parameter.numel()]
            if hasattr(parameter, "ds_tensor"):  # DeepSpeed's
                sizes[name] = [parameter.numel() == 0, parameter.ds_tensor.numel(), parameter.ds_numel]
        held.write_text(json.dumps(sizes))
    return step(trainer, *args, **kwargs)

SalmonnTrainer.training_step = training_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def accelerate_launch(config, *command):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    result = subprocess.run([*launch, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu", "NO", 1),
        ("single_gpu", "NO", 1),
        ("multi_gpu", "MULTI_GPU", 2),
        ("fsdp2", "FSDP", 2),
        ("zero3", "DEEPSPEED", 2),
    ],
)
def test_accelerate_reads_the_configs(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == processes
    assert config.use_cpu == (name == "cpu")
    assert {path.stem for path in CONFIGS.iterdir()} == {"cpu", "single_gpu", "multi_gpu", "fsdp2", "zero3"}


def test_fsdp_settings_that_cannot_work_are_refused():
    refused = {
        "fsdp_version: 2": {"fsdp_version": 1},
        "set it to false": {"fsdp_version": 2, "cpu_ram_efficient_loading": True},
    }
    for message, settings in refused.items():
        plugin = FullyShardedDataParallelPlugin(**settings)
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device="cpu")
        with pytest.raises(ValueError, match=message):
            choose_what_is_sharded(accelerator, tiny_model())


def test_lora_in_an_encoder_that_is_not_sharded_is_refused():
    """Each process would train an adapter of its own."""
    model = tiny_model()
    model.add_lora({"r": 2, "target_modules": ["q_proj"]}, "audio_tower")
    freeze_base_parts(model)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device="cpu")
    for shard in (choose_what_is_sharded, hide_unsharded_parts):
        with pytest.raises(ValueError, match="LoRA in the speech encoder cannot be trained with FSDP or DeepSpeed"):
            shard(accelerator, model)


def test_models_are_loaded_whole_under_deepspeed(tmp_path):
    """Under zero.Init, which transformers would load them in, they cannot be put together from base parts."""
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self):
            return True

    config = Config()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        SalmonnTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        assert not deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.mark.slow
def test_two_processes_under_deepspeed_zero_3_train_as_one(parts, tmp_path, monkeypatch):  # noqa: F811
    """All but what stays whole is in halves, the losses and checkpoints are those of one process, and it resumes."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    first = stage1_recipe(parts, tmp_path / "first", dropout=0.0, joined_clips=0)
    run("run_stage1.py", first, tmp_path, monkeypatch)
    settings = {"lora_dropout": 0.0, "ctc_loss_weight": 0.3, "joined_clips": 0, "per_device_train_batch_size": 2}
    settings |= {"max_steps": 10, "save_steps": 5, "eval_steps": 5, "masked_frames": 0.2, "feature_cache": ""}
    settings["per_device_eval_batch_size"] = 3  # of four clips: the second process has a batch of one
    alone = stage2_recipe(parts, tmp_path / "alone", tmp_path / "first", gradient_accumulation_steps=2, **settings)
    run("run_stage2.py", alone, tmp_path, monkeypatch)

    zero3 = yaml.safe_load((CONFIGS / "zero3.yaml").read_text()) | {"use_cpu": True}
    # A DeepSpeed file of one's own says these instead; here it keeps tiny weights from staying whole.
    del zero3["mixed_precision"]
    sharding = {"stage": 3, "stage3_param_persistence_threshold": 0}
    auto = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": sharding} | dict.fromkeys(auto, "auto")))
    zero3["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "zero3.json"), "zero3_init_flag": False}
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(zero3))
    recipe, probe = tmp_path / "two.yaml", tmp_path / "probe.py"
    recipe.write_text(yaml.safe_dump(stage2_recipe(parts, tmp_path / "two", tmp_path / "first", **settings)))
    probe.write_text(PROBE)
    command = ("--main_process_port", 0, probe, ROOT / "training" / "run_stage2.py", recipe)
    assert accelerate_launch(tmp_path / "zero3.yaml", *command).count("world size 2") == 2

    held = [json.loads((tmp_path / "two" / f"held-{index}.json").read_text()) for index in (0, 1)]
    assert any(name.startswith("language_model.model.layers.") for name in held[0])
    for name, (is_sharded, here, size) in held[0].items():
        assert is_sharded and size <= here + held[1][name][1] <= size + 1, name
    losses = [[entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in ("alone", "two")]
    assert len(losses[0]) == 10
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-3)
    for place in ("checkpoint-10", "."):
        one, two = (load_file(tmp_path / name / place / "model.safetensors") for name in ("alone", "two"))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key].to(tensor.dtype), tensor, atol=1e-2, rtol=0, msg=f"{place} {key}")
    loaded = AutoModel.from_pretrained(tmp_path / "two")
    assert isinstance(loaded, SalmonnForConditionalGeneration)

    shutil.rmtree(tmp_path / "two" / "checkpoint-10")
    accelerate_launch(tmp_path / "zero3.yaml", *command)
    again = load_file(tmp_path / "two" / "model.safetensors")
    for key, tensor in two.items():
        torch.testing.assert_close(again[key], tensor, atol=0, rtol=0)


@pytest.mark.slow
def test_accelerate_launches_one_process_on_a_cpu(parts, tmp_path):  # noqa: F811
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(stage1_recipe(parts, tmp_path / "one", max_steps=2)))
    log = accelerate_launch("cpu.yaml", ROOT / "training" / "run_stage1.py", recipe)
    assert log.count("world size 1") == 1
    SalmonnForConditionalGeneration.from_pretrained(tmp_path / "one")


@pytest.mark.slow
def test_two_processes_that_share_the_model_out_train_as_one(parts, tmp_path, monkeypatch):  # noqa: F811
    """FSDP2 by gloo: the layers are in halves, the losses and checkpoints those of one process, and it resumes."""
    first = stage1_recipe(parts, tmp_path / "first", dropout=0.0, joined_clips=0)
    run("run_stage1.py", first, tmp_path, monkeypatch)
    settings = {"lora_dropout": 0.0, "ctc_loss_weight": 0.3, "joined_clips": 0, "per_device_train_batch_size": 2}
    settings |= {"max_steps": 10, "save_steps": 5, "eval_steps": 5, "masked_frames": 0.2}
    settings["per_device_eval_batch_size"] = 1  # of four clips: of two processes each has two
    alone = stage2_recipe(parts, tmp_path / "alone", tmp_path / "first", gradient_accumulation_steps=2, **settings)
    run("run_stage2.py", alone, tmp_path, monkeypatch)

    recipe, probe = tmp_path / "two.yaml", tmp_path / "probe.py"
    recipe.write_text(yaml.safe_dump(stage2_recipe(parts, tmp_path / "two", tmp_path / "first", **settings)))
    probe.write_text(PROBE)
    command = ("--main_process_port", 0, probe, ROOT / "training" / "run_stage2.py", recipe)
    assert accelerate_launch("fsdp2.yaml", *command).count("world size 2") == 2

    held = [json.loads((tmp_path / "two" / f"held-{index}.json").read_text()) for index in (0, 1)]
    whole = ("audio_tower.", "language_model.model.embed_tokens.")
    for name, (is_sharded, here, size) in held[0].items():
        assert is_sharded != name.startswith(whole), name
        assert here + held[1][name][1] == (size if is_sharded else 2 * size), name
        if name.startswith("language_model.model.layers.") and not name.startswith(whole):
            assert here == size / 2, name

    losses = [[entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in ("alone", "two")]
    assert len(losses[0]) == 10
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3)
    evaluations = [
        [(entry["step"], entry["eval_wer"]) for entry in history(tmp_path / name) if "eval_wer" in entry]
        for name in ("alone", "two")
    ]
    assert [step for step, _ in evaluations[0]] == [5, 10] and evaluations[0] == evaluations[1]

    # What is saved is what one process saves.
    start = load_file(tmp_path / "first" / "model.safetensors")
    for directory, tolerance in (("checkpoint-10", 1e-4), (".", 1e-3)):  # bfloat16 at the end
        saved = [tmp_path / name / directory for name in ("alone", "two")]
        assert (saved[0] / "config.json").read_text() == (saved[1] / "config.json").read_text()
        code = [{path.name for path in output.glob("*.py")} for output in saved]
        assert code[0] == code[1] and "modeling_salmonn.py" in code[0]
        tensors = [load_file(output / "model.safetensors") for output in saved]
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][key], tensor, atol=tolerance, rtol=tolerance)
        loaded = AutoModel.from_pretrained(saved[1], dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[key], tensor.to(loaded[key].dtype)) for key, tensor in tensors[1].items())
    key = "projector.proj.weight"
    assert (start[key] - loaded[key]).abs().max() > 1e-3  # of which the tolerances see the difference

    shutil.move(tmp_path / "two", tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    accelerate_launch("fsdp2.yaml", *command)
    assert [entry["step"] for entry in history(tmp_path / "two") if "loss" in entry] == list(range(1, 11))
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "two")]
    assert all(torch.equal(tensors[1][key], tensor) for key, tensor in tensors[0].items())


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_accumulation(parts, tmp_path, monkeypatch):  # noqa: F811
    first = stage1_recipe(parts, tmp_path / "first", dropout=0.0, joined_clips=0)
    run("run_stage1.py", first, tmp_path, monkeypatch)
    settings = {"lora_dropout": 0.0, "ctc_loss_weight": 0.3, "joined_clips": 0, "eval_strategy": "no", "max_steps": 6}
    settings |= {"per_device_train_batch_size": 2, "masked_frames": 0.2}
    alone = stage2_recipe(parts, tmp_path / "alone", tmp_path / "first", gradient_accumulation_steps=2, **settings)
    run("run_stage2.py", alone, tmp_path, monkeypatch)

    recipe = tmp_path / "two.yaml"
    together = stage2_recipe(parts, tmp_path / "together", tmp_path / "first", **settings)
    recipe.write_text(yaml.safe_dump(together))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    script = str(ROOT / "training" / "run_stage2.py")
    result = subprocess.run([*command, script, str(recipe)], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]

    checkpoint = Path(last_checkpoint(tmp_path / "together"))
    assert sorted(path.name for path in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert "world size 2" in result.stderr
    losses = [
        [entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in ("alone", "together")
    ]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 6


# Runs a training script, and writes which clips each process answers in each evaluation, and what it makes of all.
EVALUATION_PROBE = """
import json, runpy, sys
from pathlib import Path
from salmonn_hf.training import evaluation
from salmonn_hf.training.trainer import SalmonnTrainer

answered, evaluations = [], []
answer, evaluate = evaluation.answer_segments, SalmonnTrainer.evaluate

def answer_segments(model, collator, dataset, segments, *args, **kwargs):
    answered.extend(segment.clip for segment in segments)
    return answer(model, collator, dataset, segments, *args, **kwargs)

def evaluate_and_write(trainer, *args, **kwargs):
    answered.clear()
    metrics = evaluate(trainer, *args, **kwargs)
    texts = [answer.text for answer in trainer.answers(trainer.eval_dataset)]
    evaluations.append({"answered": answered[: len(answered) // 2], "metrics": metrics, "texts": texts})
    file = Path(trainer.args.output_dir, f"evaluations-{trainer.args.process_index}.json")
    file.write_text(json.dumps(evaluations))
    return metrics

evaluation.answer_segments, SalmonnTrainer.evaluate = answer_segments, evaluate_and_write
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_share_the_clips_to_evaluate(parts, tmp_path, monkeypatch):  # noqa: F811
    """Each clip is answered once, by one of them, and both have the metrics that one process has."""
    run("run_stage1.py", stage1_recipe(parts, tmp_path / "first"), tmp_path, monkeypatch)
    write_parquet(tmp_path / "eval.parquet", 7, seed=300)
    probe, recipe = tmp_path / "probe.py", tmp_path / "recipe.yaml"
    probe.write_text(EVALUATION_PROBE)
    evaluations = {}
    for processes in (1, 2):
        output = tmp_path / f"by-{processes}"
        settings = {"learning_rate": 0.0, "max_steps": 1, "save_steps": 1, "eval_steps": 1}
        settings |= {"eval_file": str(tmp_path / "eval.parquet"), "per_device_eval_batch_size": 3}
        recipe.write_text(yaml.safe_dump(stage2_recipe(parts, output, tmp_path / "first", **settings)))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", "29519", str(probe), str(ROOT / "training" / "run_stage2.py"), str(recipe)]
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        files = [output / f"evaluations-{index}.json" for index in range(processes)]
        evaluations[processes] = [json.loads(file.read_text()) for file in files]
    ((during, behind),) = evaluations[1]
    assert sorted(during["answered"]) == list(range(7)) and any(during["texts"])
    for first, second in zip(*evaluations[2], strict=True):
        assert len(first["answered"]) == 4 and len(second["answered"]) == 3  # batches of 3, 3 and 1
        assert sorted(first["answered"] + second["answered"]) == list(range(7))
    for alone, *together in zip((during, behind), *evaluations[2], strict=True):
        for shared in together:
            assert shared["texts"] == alone["texts"]
            assert shared["metrics"]["eval_wer"] == alone["metrics"]["eval_wer"]


@pytest.mark.slow
def test_the_alignment_loss_is_a_mean_however_its_targets_are_counted(parts, tmp_path, monkeypatch):  # noqa: F811
    """Over the targets of all processes, or, as `average_tokens_across_devices` says, over those of each."""
    losses = {}
    for average in (True, False):
        recipe = stage1_recipe(parts, tmp_path / str(average), learning_rate=0.0, dropout=0.0, max_steps=2)
        recipe |= {"joined_clips": 0, "eval_strategy": "no", "average_tokens_across_devices": average}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29521"]
        command += [str(ROOT / "training" / "run_stage1.py"), str(path)]
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        losses[average] = [entry["loss"] for entry in history(tmp_path / str(average)) if "loss" in entry]
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.2)
    assert losses[True] != losses[False]
