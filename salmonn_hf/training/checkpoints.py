"""Checkpoints of a run, each complete or not there at all, and the final model."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from ..hub.push import push_to_hub
from ..model.adapters import name_adapter_base


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in a directory: one of which the last file, the trainer's state, can be read."""
    found = []
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError, KeyError):
            found.append((json.loads(state.read_text())["global_step"], str(state.parent)))
    return max(found, default=(0, None))[1]


def save_checkpoint(trainer, save: Callable[[], None]):
    """
    Let `save` write a checkpoint of `trainer` beside its place, and move it there when it is complete.

    Raises:
        OSError: if it cannot be written; the message names the checkpoint that the run goes on from.
    """
    args, state = trainer.args, trainer.state
    output_dir, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    staging = output_dir / ".partial"
    trainer.args = staged = copy.copy(args)
    # Nothing is pushed or removed before the checkpoint is in its place.
    staged.output_dir, staged.push_to_hub, staged.save_total_limit = str(staging), False, None
    try:
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        save()
        trainer.accelerator.wait_for_everyone()
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(output_dir / name)
        if args.should_save:
            torch.save(args, staging / name / "training_args.bin")
            state.save_to_json(str(staging / name / "trainer_state.json"))
            if (output_dir / name).exists():
                shutil.rmtree(output_dir / name)
            os.replace(staging / name, output_dir / name)
            name_adapter_base(output_dir / name, os.path.abspath(output_dir / name))
            staging.rmdir()
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        last = last_checkpoint(output_dir)
        raise OSError(
            f"Cannot write {name} to {output_dir} ({error}). Free space there or make it writable; the same "
            f"command then goes on from {Path(last).name + ', which is complete' if last else 'the start'}."
        ) from error
    finally:
        trainer.args = args
    if args.push_to_hub:
        if args.should_save:
            name_adapter_base(output_dir / name, trainer.hub_model_id)
        trainer._push_from_checkpoint(str(output_dir / name))
    if args.should_save:
        rotate_checkpoints(str(output_dir), args.save_total_limit, best_model_checkpoint=state.best_model_checkpoint)
    trainer.accelerator.wait_for_everyone()


def save_model(trainer, processor):
    """The final model in its output directory, in bfloat16, with its processor; pushed to the hub if asked for."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    state_dict, on_float32 = None, model.audio_tower.dtype == torch.float32
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # each process has a part, in its first precision
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        state_dict = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state_dict.items()}
    else:
        for parameter in model.parameters():  # not model.to: it rounds the frequencies of the position embeddings, too
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.use_cache = True  # Trainer switches it off for itself
    if trainer.is_world_process_zero():
        output_dir, partial = Path(args.output_dir), Path(args.output_dir, ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=state_dict)
        if state_dict is not None:  # it noted the precision of the model itself
            model.config.dtype = "bfloat16"
            model.config.save_pretrained(partial)
        processor.save_pretrained(partial)
        for file in sorted(partial.iterdir()):
            os.replace(file, output_dir / file.name)
        partial.rmdir()
        name_adapter_base(output_dir, os.path.abspath(output_dir))
        if args.push_to_hub:
            push_to_hub(output_dir, trainer.hub_model_id, private=args.hub_private_repo, token=args.hub_token)
    if state_dict is None and on_float32:  # as are the features on which it is evaluated next
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
