"""kill -9 at any moment: the same command goes on and ends with the weights of a run that was never broken."""

import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import ROOT, parts, stage1_recipe, stage2_recipe  # noqa: F401

# Processes that have the imports behind them, and never ran anything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["datasets", "salmonn_hf.data.arguments", "salmonn_hf.training.stage"])


def train(recipe, kill_at=None, script="run_stage1.py"):
    """Killed in the given training step, or at the given call of `torch.save`, half of which is written."""
    torch.set_num_threads(1)
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # seconds behind each pass over a stream
    what, number = kill_at or (None, 0)
    calls = iter(range(1, 10**6))
    if what == "step":
        from salmonn_hf.training.trainer import SalmonnTrainer

        step = SalmonnTrainer.training_step

        def training_step(*args):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        SalmonnTrainer.training_step = training_step
    if what == "save":
        save = torch.save

        def half(value, file, **kwargs):
            save(value, file, **kwargs)
            if next(calls) == number:
                os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half
    sys.argv = [script, recipe]
    runpy.run_path(str(ROOT / "training" / script), run_name="__main__")


def start(*arguments):
    process = CONTEXT.Process(target=train, args=arguments)
    process.start()
    return process


def write_recipe(parts, output):  # noqa: F811
    """Three epochs with everything that is drawn: order, weights, prompts' kin, augmentation, masks, dropout."""
    recipe = stage1_recipe(
        parts,
        output,
        sources=[
            {"path": str(parts / "train.parquet"), "weight": 0.75},
            {"path": str(parts / "eval.parquet"), "weight": 0.5, "speed": 0.9},
        ],
        snr_db=[5.0, 20.0],
        gain_db=[-6.0, 3.0],
        time_masks=1,
        masked_frames=0.2,
        max_steps=9,
        save_steps=2,
        save_total_limit=2,
        eval_strategy="no",
        feature_cache=str(output) + "-cache",
    )
    recipe = {key: value for key, value in recipe.items() if key not in ("train_files", "joined_clips")}
    path = Path(f"{output}.yaml")
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture(scope="module")
def unbroken(parts, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("unbroken") / "run"
    warm = CONTEXT.Process(target=os.getpid)  # starts the server, which imports
    warm.start()
    warm.join()
    began = time.monotonic()
    process = start(write_recipe(parts, output))
    process.join()
    assert process.exitcode == 0
    return load_file(output / "checkpoint-9" / "model.safetensors"), time.monotonic() - began


def assert_ends_as(unbroken, output):
    for name in ("checkpoint-9/model.safetensors", "model.safetensors"):
        weights = load_file(output / name)
        assert set(weights) == set(unbroken[0])
        for key, value in unbroken[0].items():
            assert torch.equal(value.to(weights[key].dtype), weights[key]), key


def test_a_run_killed_in_a_step_and_in_a_checkpoint_ends_as_an_unbroken_one(parts, unbroken, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    recipe = write_recipe(parts, output)
    for kill_at, last in ((("step", 6), 4), (("save", 4), 4), (None, 9)):
        process = start(recipe, kill_at)
        process.join()
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
        names = [path.name for path in output.glob("checkpoint-*")]
        assert f"checkpoint-{last}" in names and len(names) <= 2
        assert max(int(name.split("-")[1]) for name in names) == last
    assert_ends_as(unbroken, output)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_streamed_run_killed_in_any_pass_ends_as_an_unbroken_one(parts, tmp_path, workers):  # noqa: F811
    first = tmp_path / "first.yaml"
    first.write_text(yaml.safe_dump(stage1_recipe(parts, tmp_path / "first", max_steps=1, eval_strategy="no")))
    process = start(str(first))
    process.join()
    assert process.exitcode == 0

    def stage2(name, *kill_at):
        recipe = stage2_recipe(
            parts,
            tmp_path / name,
            tmp_path / "first",
            sources=[
                {"path": str(parts / "train.parquet"), "task": "asr", "streaming": True},
                {"path": str(parts / "eval.parquet"), "task": "asr", "weight": 0.5, "streaming": True},
            ],
            shuffle_buffer=5,
            masked_frames=0.2,
            gain_db=[-6.0, 3.0],
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,  # so a step takes 6 of the 16 clips of a pass
            dataloader_num_workers=workers,
            max_steps=9,
            save_steps=2,
            eval_strategy="no",
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if k not in ("train_files", "joined_clips")}))
        process = start(str(path), *kill_at, "run_stage2.py")
        process.join()
        assert process.exitcode == (0 if kill_at == (None,) else -signal.SIGKILL)
        return max((int(path.name.split("-")[1]) for path in (tmp_path / name).glob("checkpoint-*")), default=0)

    assert stage2("unbroken", None) == 9
    weights = load_file(tmp_path / "unbroken" / "checkpoint-9" / "model.safetensors"), None
    assert stage2("run", ("step", 7)) == 2  # in the first pass
    assert stage2("run", ("step", 7)) == 4  # in the second
    assert stage2("run", ("step", 6)) == 6  # in the third
    for _ in range(2):  # of a run that has ended the command changes nothing
        assert stage2("run", None) == 9
        assert_ends_as(weights, tmp_path / "run")


@pytest.mark.slow
def test_twenty_kills_at_random_moments(parts, unbroken, tmp_path):  # noqa: F811
    rng, kills, runs, last = random.Random(0), 0, 1, 0
    output = tmp_path / "run1"
    recipe = write_recipe(parts, output)
    while kills < 20:
        process = start(recipe)
        process.join(timeout=rng.uniform(0.1, 0.9) * unbroken[1])
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        steps = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]
        assert max(steps, default=0) >= last  # none is lost
        last = max(steps, default=0)
        if process.exitcode == 0:
            assert_ends_as(unbroken, output)
            runs += 1
            output = tmp_path / f"run{runs}"
            recipe, last = write_recipe(parts, output), 0
    process = start(recipe)
    process.join()
    assert process.exitcode == 0
    assert_ends_as(unbroken, output)
