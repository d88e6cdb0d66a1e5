"""
GPTQ (Frantar et al., ICLR 2023, https://arxiv.org/abs/2210.17323) on prompts with audio and answers. gptqmodel solves
each Linear; its own loop over a model knows prompts of text alone, so the loop over the layers is here.
"""

from contextlib import suppress

import torch
from torch import nn
from tqdm import tqdm

from ..model.quantized_layers import linears, quantize_vocabulary, quantized_module, replace_module


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
        with suppress(LayerReached):
            model(**batch, use_cache=False)
    handle.remove()
    return inputs


def weighted_quantizer(config, importance: torch.Tensor):
    """
    gptqmodel's quantizer with other scales: of a group of columns those of least squared error, each column's counted
    by its `importance` `(columns,)`. A few of a language model's features are a hundred times as large as the rest;
    what was measured is in docs/quantisation.md.
    """
    from gptqmodel.quantization.quantizer import Quantizer

    class WeightedQuantizer(Quantizer):
        def find_params(self, x, weight=False):
            super().find_params(x, weight)
            if x.shape[1] == config.group_size:  # first it is asked for those of the whole matrix, which have no use
                first = x.storage_offset()  # x is a slice of the matrix's columns
                self.scale = weighted_scales(x, importance[first : first + config.group_size])[:, None]

    quantizer = WeightedQuantizer(config)
    quantizer.configure(perchannel=True)
    return quantizer


def squares_of_columns(inputs: torch.Tensor) -> torch.Tensor:
    """How much each column of a matrix counts that is multiplied with `inputs` `(..., columns)`: `(columns,)`."""
    return inputs.flatten(0, -2).float().square().sum(0)


def weighted_scales(groups: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """For rows `(rows, columns)` in 4 bits, the scales `(rows,)` of least squared error, weighted by `(columns,)`."""
    extremes = groups.abs().amax(-1).clamp(min=1e-8)
    scales, least = extremes / 7, torch.full_like(extremes, torch.inf)
    for share in torch.arange(0.6, 1.1, 0.025).tolist():
        tried = share * extremes / 7
        rounded = (groups / tried[:, None]).round().clamp(-8, 7) * tried[:, None]
        error = ((rounded - groups).square() * importance).sum(-1)
        scales, least = torch.where(error < least, tried, scales), torch.minimum(error, least)
    return scales


def solve(linear: nn.Linear, inputs: list[torch.Tensor], bits: int, group_size: int):
    """`linear` quantised so that its outputs for `inputs`, each `(..., in_features)`, change least."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(bits=bits, group_size=group_size, sym=True, desc_act=False, offload_to_disk=False)
    solver = GPTQ(linear, config)
    importance = sum(squares_of_columns(batch) for batch in inputs)
    solver.quantizer = weighted_quantizer(config, importance)
    for batch in inputs:
        solver.add_batch(batch, None)
    # The most important columns first, each with the scale of its place in the matrix; it leaves the solution there.
    scales = solver.hf_quantize(group_size=group_size, actorder=True, static_groups=True, act_group_aware=False)[0]
    return quantized_module(linear, bits, group_size, scales)


@torch.no_grad()
def quantize_layers(model: nn.Module, layers: nn.ModuleList, batches: list[dict], bits: int = 4, group_size: int = 64):
    r"""
    Quantise the Linears of consecutive layers by GPTQ, in place, each layer behind those already quantised.

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


@torch.no_grad()
def quantize_tied_vocabulary(model: nn.Module, batches: list[dict], group_size: int = 64):
    """
    Round token embeddings of a `SalmonnModel` that are the head as well to 4 bits, in place, by the `weighted_scales`
    of what the head gets when the model runs on `batches`.
    """
    language_model, squares = model.language_model, []
    handle = language_model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: squares.append(squares_of_columns(args[0]))
    )
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    matrix = language_model.get_input_embeddings().weight
    groups = zip(matrix.split(group_size, dim=1), sum(squares).split(group_size), strict=True)
    scales = torch.stack([weighted_scales(columns, importance) for columns, importance in groups], dim=1)
    quantize_vocabulary(language_model, 4, group_size, scales)
