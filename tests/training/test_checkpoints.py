"""Checkpoints are complete, or they are not there."""

# ruff: noqa: F811 (fixtures of another file)

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training import parts, run, stage1_recipe  # noqa: F401

from salmonn_hf.training.checkpoints import last_checkpoint, save_checkpoint
from salmonn_hf.training.trainer import SalmonnTrainer


def test_a_full_disk_leaves_the_last_checkpoint(parts, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    recipe = stage1_recipe(parts, tmp_path / "one", eval_strategy="no", save_total_limit=1, feature_cache="")
    save, limits = SalmonnTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(trainer, *args):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(trainer, *args)

    monkeypatch.setattr(SalmonnTrainer, "_save_checkpoint", fill_disk)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="Cannot write checkpoint-4 to .*on from checkpoint-2, which is complete"):
            run("run_stage1.py", recipe, tmp_path, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_a_half_written_checkpoint_is_never_chosen(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "absent") is None


def test_every_node_that_saves_has_its_checkpoint(tmp_path):
    """With `save_on_each_node` there is a process that saves on nodes that are not the first."""
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, push_to_hub=False, save_total_limit=None)
    state = SimpleNamespace(global_step=3, best_global_step=3, best_model_checkpoint=None, save_to_json=None)
    state.save_to_json = lambda path: Path(path).write_text(json.dumps({"global_step": 3}))
    trainer = SimpleNamespace(args=args, state=state, accelerator=SimpleNamespace(wait_for_everyone=lambda: None))
    trainer.is_world_process_zero = lambda: False

    def save():
        directory = Path(trainer.args.output_dir, "checkpoint-3")
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_text("weights")
        assert last_checkpoint(tmp_path) is None

    save_checkpoint(trainer, save)
    assert last_checkpoint(tmp_path) == state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists() and not (tmp_path / ".partial").exists()
    arguments = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert trainer.args is args and arguments.output_dir == str(tmp_path)
