"""Audio placeholders in a prompt: embeddings take their places, and spare ones are dropped."""

import torch
from torch import nn


def check_placeholders(is_audio: torch.BoolTensor, count: int, audio_token_id: int):
    """
    Raises:
        ValueError: if there are not as many placeholders as the clips give audio embeddings, `count`.
    """
    if is_audio.sum() != count:
        raise ValueError(
            f"input_ids hold {int(is_audio.sum())} audio placeholders (token {audio_token_id}), but the clips give "
            f"{count} audio embeddings. Make the prompt with SalmonnProcessor, whose window settings must be those of "
            "the model, and pass its input_features along."
        )


def embed_prompt(
    input_ids: torch.LongTensor, is_audio: torch.BoolTensor, audio_embeds: torch.Tensor | None, embedding: nn.Module
) -> torch.Tensor:
    """Token embeddings `(batch, tokens, width)`, in the places `is_audio` `audio_embeds` `(audio tokens, width)`."""
    inputs_embeds = embedding(input_ids)
    if audio_embeds is None:
        return inputs_embeds
    # Gemma scales embeddings by √hidden where it looks them up; audio must come in at the same scale.
    audio_embeds = audio_embeds * getattr(embedding, "embed_scale", 1.0)
    return inputs_embeds.masked_scatter(is_audio[..., None], audio_embeds.to(inputs_embeds.dtype))


def drop_spare_placeholders(
    prompt: dict[str, torch.Tensor | None], num_placeholders: torch.LongTensor, num_tokens: torch.LongTensor
) -> dict[str, torch.Tensor | None]:
    """
    A batch's `input_ids`, `is_audio`, which are true on placeholders, `attention_mask` and `labels` (the last two may
    be `None`) with as many placeholders for each clip as it has audio tokens. Rows that are then shorter than the
    longest are padded on the left.

    Args:
        num_placeholders, num_tokens (`torch.LongTensor` of shape `(clips,)`): of each clip, in the order of the rows.
    """
    is_audio = prompt["is_audio"]
    starts = num_placeholders.cumsum(0) - num_placeholders
    places = torch.arange(int(num_placeholders.sum()), device=is_audio.device)
    place_in_clip = places - starts.repeat_interleave(num_placeholders)
    keep = ~is_audio.masked_scatter(is_audio, place_in_clip >= num_tokens.repeat_interleave(num_placeholders))
    if prompt["attention_mask"] is not None:
        keep &= prompt["attention_mask"].bool()
    lengths = keep.sum(-1, keepdim=True)
    width = int(lengths.max())
    positions = keep.int().argsort(dim=-1, stable=True)[:, -width:]  # those to keep come last, in their order
    rows = torch.arange(len(keep), device=keep.device)[:, None]
    shorter = {name: None if value is None else value[rows, positions] for name, value in prompt.items()}
    padding = torch.arange(width, device=keep.device) < width - lengths
    shorter["is_audio"] &= ~padding  # which has the ids of what was dropped
    shorter["attention_mask"] = (~padding).long()
    if shorter["labels"] is not None:
        shorter["labels"] = shorter["labels"].masked_fill(padding, -100)
    return shorter
