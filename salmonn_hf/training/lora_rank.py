"""LoRA of a checkpoint, cut to a smaller rank."""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


@torch.no_grad()
def cut_lora_rank(model: nn.Module, rank: int):
    """
    Cut LoRA in the language model of a [`SalmonnModel`], in place, to `rank`, so that a checkpoint keeps to a size: of
    each layer's product B A the largest singular values are kept, which is its best approximation of that rank (Eckart
    and Young, 1936). What multiplies it, alpha over rank, stays.

    Raises:
        ValueError: if `rank` is more than the adapter's, or less than 1.
    """
    lora = model.config.lora
    if not 1 <= rank <= lora["r"]:
        raise ValueError(f"The checkpoint's LoRA has rank {lora['r']}; it can be cut to 1 at least, not to {rank}.")
    for layer in model.language_model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                down, up = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
                # Both factors are thin: the product's singular values are those of a matrix of rank by rank.
                (up_basis, up_rest), (down_basis, down_rest) = torch.linalg.qr(up), torch.linalg.qr(down.T)
                left, values, right = torch.linalg.svd(up_rest @ down_rest.T)
                root = values[:rank].sqrt()
                cut = {"lora_A": root[:, None] * (right[:rank] @ down_basis.T)}
                cut["lora_B"] = (up_basis @ left[:, :rank]) * root
                for part, weight in cut.items():
                    linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
                    linear.weight = nn.Parameter(weight.to(layer.lora_A[name].weight.dtype))
                    getattr(layer, part)[name] = linear
                layer.lora_alpha[name] *= rank / layer.r[name]
                layer.r[name] = rank
    model.config.lora = lora | {"r": rank, "lora_alpha": lora["lora_alpha"] * rank / lora["r"]}
    model.describe_lora()
