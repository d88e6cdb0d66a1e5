"""
Scales of a quantised language model, tuned until it foretells what the unquantised one foretells.

As in PEQA (Kim et al., "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
Quantization", NeurIPS 2023) the small integers stay, and the checkpoint its size; the targets are not transcripts but
the unquantised model's next-token distributions.
"""

from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from ..model.quantized_layers import QuantizedMatrix


def tune_scales(model: nn.Module, teacher: nn.Module, batches: Sequence[dict], learning_rate: float = 2e-3) -> float:
    r"""
    Tune the scales of `model.language_model`, token embeddings included, in place, by a step of Adam for each batch.

    Args:
        model: a [`SalmonnForConditionalGeneration`] in float32, its language model quantised.
        teacher: the same before it was quantised.
        batches: inputs of both: left-padded prompts with their clips, and transcripts as answers.
        learning_rate (`float`): of the scales' relative changes; falls to 0 in a straight line.

    Returns:
        Kullback-Leibler divergence from `teacher` over the last tenth of the batches, in nats per token.
    """
    model.requires_grad_(False)
    matrices = [module for module in model.language_model.modules() if isinstance(module, QuantizedMatrix)]
    # Copies: what gptqmodel solved are tensors of inference mode, which autograd refuses.
    first = [matrix.scales.float().clone() for matrix in matrices]
    changes = [torch.zeros_like(scales, requires_grad=True) for scales in first]
    optimizer = torch.optim.Adam(changes, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    losses = []
    with torch.enable_grad(), tqdm(batches, unit="batch") as progress:
        for batch in progress:
            for matrix, scales, change in zip(matrices, first, changes, strict=True):
                matrix.scales = scales * (1 + change)
            loss = divergence(model, teacher, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(nats=f"{losses[-1]:.4f}")
    for matrix, scales, change in zip(matrices, first, changes, strict=True):
        matrix.scales = (scales * (1 + change)).detach()
    recent = losses[-max(1, len(losses) // 10) :]
    return sum(recent) / len(recent)


def divergence(model: nn.Module, teacher: nn.Module, batch: dict) -> torch.Tensor:
    """
    Kullback-Leibler divergence of `model` from `teacher` in nats, mean over the tokens behind each row's last clip.
    """
    is_audio = batch["input_ids"] == model.config.audio_token_id
    behind = is_audio.flip(-1).int().cummax(-1).values.flip(-1) == 0  # left-padded rows end together
    kept = int(behind.sum(-1).max())
    with torch.no_grad():
        of_teacher = log_probs(teacher, batch, kept)
    each = nn.functional.kl_div(log_probs(model, batch, kept), of_teacher, log_target=True, reduction="none").sum(-1)
    return each[behind[:, -kept:-1]].mean()


def log_probs(model: nn.Module, batch: dict, kept: int) -> torch.Tensor:
    """Of the last `kept` tokens, what follows all but the last: float32 `(batch, kept - 1, vocabulary)`."""
    return model(**batch, use_cache=False, logits_to_keep=kept).logits[:, :-1].float().log_softmax(-1)
