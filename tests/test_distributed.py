"""Several processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_training import ROOT, history, parts, run, stage1_recipe, stage2_recipe  # noqa: F401

from salmonn_hf.training import last_checkpoint


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_accumulation(parts, tmp_path, monkeypatch):  # noqa: F811
    first = stage1_recipe(parts, tmp_path / "first", qformer_dropout=0.0, joined_clips=0)
    run("run_stage1.py", first, tmp_path, monkeypatch)
    settings = {"lora_dropout": 0.0, "ctc_loss_weight": 0.3, "joined_clips": 0, "eval_strategy": "no", "max_steps": 6}
    settings |= {"per_device_train_batch_size": 2, "masked_frames": 0.2}
    alone = stage2_recipe(parts, tmp_path / "alone", tmp_path / "first", gradient_accumulation_steps=2, **settings)
    run("run_stage2.py", alone, tmp_path, monkeypatch)

    recipe = tmp_path / "two.yaml"
    together = stage2_recipe(parts, tmp_path / "together", tmp_path / "first", **settings)
    recipe.write_text(yaml.safe_dump(together))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "training" / "run_stage2.py")
    result = subprocess.run([*command, script, str(recipe)], env=environment, capture_output=True, text=True)
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
