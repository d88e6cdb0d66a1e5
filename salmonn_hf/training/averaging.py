"""The mean of checkpoints that were trained from the same start."""

import torch

from ..model.checkpoint import without_base_parts
from ..model.modeling_salmonn import SalmonnForConditionalGeneration

REMEDY = "only checkpoints of one start can be averaged."


@torch.no_grad()
def average_checkpoints(names: list[str]) -> SalmonnForConditionalGeneration:
    """
    A model whose trained tensors are the means of several checkpoints', a "model soup" (Wortsman et al., 2022,
    https://arxiv.org/abs/2203.05482). They must have begun with the same weights, LoRA's random ones included, and
    differ in the order and augmentation of their data alone (`data_seed`); means of others have more errors than each.
    Of LoRA the two factors are averaged, which keeps its rank.

    Args:
        names (`list[str]`): directories or hub names, in any precision; the mean is taken in float32 and has the
            first one's.

    Raises:
        ValueError: if they are fewer than two, are quantised, stand on other base parts, or have tensors that differ
            in name or shape, naming what differs.
    """
    if len(names) < 2:
        raise ValueError(f"A mean is taken of two checkpoints or more, not of {names}.")
    models = [SalmonnForConditionalGeneration.from_pretrained(name, dtype="auto") for name in names]
    mean = models[0]
    tensors = [without_base_parts(model.state_dict(), model.config) for model in models]
    for name, model, others in zip(names, models, tensors, strict=True):
        if model.config.quantized_parts:
            raise ValueError(f"{name} is quantised; take the mean of what it was made from, and quantise that.")
        parts, first_parts = model.config.base_parts, mean.config.base_parts
        if parts != first_parts:
            raise ValueError(f"{name} stands on {parts}, but {names[0]} on {first_parts}; {REMEDY}")
        shapes = ({(key, value.shape) for key, value in each.items()} for each in (tensors[0], others))
        if differing := sorted({key for key, _ in set.symmetric_difference(*shapes)}):
            which = f"{differing[0]} and {len(differing) - 1} other tensors"
            raise ValueError(f"{name} and {names[0]} differ in {which}; {REMEDY}")
    for key, tensor in tensors[0].items():
        if tensor.is_floating_point():
            tensor.copy_(sum(others[key].float() for others in tensors) / len(tensors))
    return mean
