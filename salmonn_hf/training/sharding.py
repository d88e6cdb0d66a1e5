"""FSDP2 and DeepSpeed ZeRO-3 for SALMONN: what is sharded, and what each process keeps in full."""

import os
from contextlib import contextmanager

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

SCALAR = "projector.ctc_head.log_scale"


def shard_on_cpus(accelerator: Accelerator, plugin_args: dict | None = None):
    """Where FSDP is asked for on CPUs, switch it on: accelerate would train with DDP there and say nothing."""
    state = accelerator.state
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args or {})
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def choose_what_is_sharded(accelerator: Accelerator, model):
    """
    Shard the language model's layers one by one, and the rest of what is trained together.

    Encoders and token embeddings, which are frozen, are not: each process encodes other clips, and not those that
    the cache holds, so they cannot wait for one another there; and the CTC head reads rows of the embeddings.
    Parameters are gathered in their own precision, as autocast wants them.

    Raises:
        ValueError: if the plugin is of FSDP 1, or would load weights on the first process alone; if an encoder is
            trained.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 cannot shard frozen and trained parameters together; set fsdp_version: 2.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves the encoders, which are not sharded, without weights on all "
            "processes but the first; set it to false."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = list(model.language_model._no_split_modules)
    plugin.ignored_modules = [module.to(accelerator.device) for module in prepare_for_sharding(model)]
    plugin.mixed_precision_policy = None


def prepare_for_sharding(model) -> list[nn.Module]:
    """Bring what is trained, in place, into a shape that can be sharded; the parts that each process keeps in full."""
    parts = [getattr(model, name) for name in ("audio_tower", "sound_tower") if hasattr(model, name)]
    parts += [getattr(model.projector, name) for name in model.projector.config.base_parts]
    parts.append(model.get_input_embeddings())
    if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        raise ValueError(
            "LoRA in the speech encoder cannot be trained with FSDP or DeepSpeed, which leave the encoders to each "
            "process; leave audio_lora_r out, set freeze_encoder_lora, or train with DDP."
        )
    if model.projector.has_ctc_head:
        scale = model.get_parameter(SCALAR)
        scale.data = scale.data[None]  # a scalar cannot be sharded
    return parts


class NameAsUnsharded(TrainerCallback):
    """Gives a sharded model's class, which torch made, its model's name and module: saving copies the code of both."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        unsharded = type(model).__mro__[2]
        type(model).__name__, type(model).__module__ = unsharded.__name__, unsharded.__module__


def gather_as_unsharded(accelerator: Accelerator, model):
    """
    Have `accelerator.get_state_dict`, by which `Trainer` saves, give the tensors of the model before it was sharded.
    DeepSpeed itself gathers what it has shared out alone, and in the precision of its forward pass.
    """
    gather = accelerator.get_state_dict

    def get_state_dict(wrapped, unwrap=True):
        by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        state_dict = gathered_state_dict(model) if by_deepspeed else gather(wrapped, unwrap)
        return {key: value.reshape(()) if key == SCALAR else value for key, value in state_dict.items()}

    accelerator.get_state_dict = get_state_dict


@contextmanager
def unsharded_parameters(accelerator: Accelerator, model):
    """
    Every process has all of a sharded model's parameters, for calls of its parts outside `forward` and for generation,
    which would otherwise gather each layer anew for each token.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not parts:
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    layers = [part for part in parts if type(part).__mro__[2].__name__ in plugin.transformer_cls_names_to_wrap]
    for layer in layers:  # which else give their parameters back after each forward
        layer.set_reshard_after_forward(False, recurse=False)
    for part in parts:
        part.unshard()
    yield
    for layer in layers:
        layer.set_reshard_after_forward(plugin.reshard_after_forward, recurse=False)
    for part in parts:
        part.reshard()


def hide_unsharded_parts(accelerator: Accelerator, model):
    """
    DeepSpeed shares out, and asks after, every module of a model. What is not sharded, and an LM head tied to the
    embeddings, are from here on attributes of their places that are no modules of these.
    """
    unsharded = prepare_for_sharding(model)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        unsharded.append(model.get_output_embeddings())
    model.hidden = [
        (parent, name, part)
        for parent in model.modules()
        for name, part in parent.named_children()
        if any(part is other for other in unsharded)
    ]
    for parent, name, part in model.hidden:
        delattr(parent, name)
        parent.__dict__[name] = part.to(accelerator.device)


def gathered_state_dict(model) -> dict:
    """The full state dict, on every process, of a model whose parameters DeepSpeed has shared out."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for parent, name, part in model.hidden:
            setattr(parent, name, part)
        state_dict = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        for parent, name, part in model.hidden:
            delattr(parent, name)
            parent.__dict__[name] = part
    return state_dict
