"""GPTQ (Frantar et al., ICLR 2023, https://arxiv.org/abs/2210.17323) on what a SALMONN really sees.

gptqmodel solves each Linear. Its own loop over a model knows prompts of text alone, so the loop is here: prompts with
audio embeddings and answers run through the model, layer by layer, each layer behind those already quantised.
"""

import torch
from torch import nn
from tqdm import tqdm

from .quantization import linears, quantized_linear, replace_module


class LayerReached(Exception):
    """Ends a forward pass whose first layer's inputs are known."""


def layer_inputs(model: nn.Module, layer: nn.Module, batches: list[dict]) -> list[tuple[tuple, dict]]:
    """The positional and keyword arguments that `layer` gets when `model` runs on each batch."""
    inputs = []

    def keep(_, args, kwargs):
        inputs.append((args, {key: value for key, value in kwargs.items() if key != "past_key_values"}))
        raise LayerReached

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except LayerReached:
            pass
    handle.remove()
    return inputs


def solve(linear: nn.Linear, inputs: list[torch.Tensor], bits: int, group_size: int):
    """`linear` quantised so that its outputs for `inputs`, each `(..., in_features)`, change least."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    solver = GPTQ(
        linear, QuantizeConfig(bits=bits, group_size=group_size, sym=True, desc_act=False, offload_to_disk=False)
    )
    solver.quantizer.configure(perchannel=True)
    for batch in inputs:
        solver.add_batch(batch, None)
    scales = solver.hf_quantize(group_size=group_size, act_group_aware=False)[0]  # leaves the solution in the weight
    return quantized_linear(linear, bits, group_size, scales)


@torch.no_grad()
def quantize_layers(model: nn.Module, layers: nn.ModuleList, batches: list[dict], bits: int = 4, group_size: int = 64):
    r"""
    Quantise the Linears of consecutive layers by GPTQ, in place.

    Args:
        model: what contains `layers`, in float32.
        layers: e.g. `model.language_model.model.layers`.
        batches: inputs of `model`. Padding should be little: it counts as input like everything else.

    Raises:
        ImportError: without gptqmodel, which the extra `quant` installs.
    """
    inputs = layer_inputs(model, layers[0], batches)
    for layer in tqdm(layers, unit="layer"):
        seen = {name: [] for name in linears(layer)}
        handles = [
            linear.register_forward_pre_hook(lambda _, args, kept=seen[name]: kept.append(args[0]))
            for name, linear in linears(layer).items()
        ]
        for args, kwargs in inputs:
            layer(*args, **kwargs)
        for handle in handles:
            handle.remove()
        for name, linear in linears(layer).items():
            replace_module(layer, name, solve(linear, seen[name], bits, group_size))
        inputs = [((layer(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in inputs]
