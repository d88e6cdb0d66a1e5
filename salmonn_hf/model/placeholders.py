"""Audio placeholders in a prompt: embeddings take their places, and spare ones are dropped."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import torch_compilable_check


def check_placeholders(is_audio: torch.BoolTensor, count: int, audio_token_id: int):
    """
    Raises:
        ValueError: if there are not as many placeholders as the clips give audio embeddings, `count`.
    """
    # Also where torch.export traces it, which takes no branch that depends on data.
    torch_compilable_check(
        is_audio.sum() == count,
        lambda: (
            f"input_ids hold {int(is_audio.sum())} audio placeholders (token {audio_token_id}), but the clips give "
            f"{count} audio embeddings. Make the prompt with SalmonnProcessor, whose window settings must be those of "
            "the model, and pass its input_features along."
        ),
    )


def embed_prompt(
    input_ids: torch.LongTensor | None,
    is_audio: torch.BoolTensor,
    audio_embeds: torch.Tensor | None,
    embedding: nn.Module,
    inputs_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Token embeddings, or `inputs_embeds` in place of them, `(batch, tokens, width)`; in the places `is_audio`
    `audio_embeds` `(audio tokens, width)`.
    """
    inputs_embeds = embedding(input_ids) if inputs_embeds is None else inputs_embeds
    if audio_embeds is None:
        return inputs_embeds
    # Gemma scales embeddings by √hidden where it looks them up; audio must come in at the same scale.
    audio_embeds = audio_embeds * getattr(embedding, "embed_scale", 1.0)
    return inputs_embeds.masked_scatter(is_audio[..., None], audio_embeds.to(inputs_embeds.dtype))


def expand_request(
    request: list[int] | None, num_placeholders: torch.LongTensor, audio_token_id: int, pad_token_id: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    `input_ids` and `attention_mask`, left-padded, that ask the same of each clip: the tokens `request`, whose one
    audio token stands for all `num_placeholders` `(clips,)` of a clip.

    Raises:
        ValueError: without a request.
    """
    if request is None or request.count(audio_token_id) != 1:
        raise ValueError(
            "generate got audio without input_ids, and generation_config.transcription_ids, which are to ask for its "
            "transcript, are not there or hold no single audio token. Save the processor beside the model "
            "(processor.save_pretrained of the same directory), or set them to processor.transcription_ids()."
        )
    place, device = request.index(audio_token_id), num_placeholders.device
    before, after = (torch.tensor(part, device=device).long() for part in (request[:place], request[place + 1 :]))
    audio = [torch.full((count,), audio_token_id, device=device) for count in num_placeholders.tolist()]
    rows = [torch.cat([before, placeholders, after]) for placeholders in audio]
    left = {"batch_first": True, "padding_side": "left"}
    return pad_sequence(rows, padding_value=pad_token_id, **left), pad_sequence(
        [row >= 0 for row in rows], **left
    ).long()


def drop_spare_placeholders(
    prompt: dict[str, torch.Tensor | None], num_placeholders: torch.LongTensor, num_tokens: torch.LongTensor
) -> dict[str, torch.Tensor | None]:
    """
    A batch's `input_ids`, `inputs_embeds`, `is_audio`, which are true on placeholders, `attention_mask`,
    `position_ids` and `labels` (all but `is_audio` may be `None`) with as many placeholders for each clip as it has
    audio tokens. Positions close up over those that are dropped. Rows that are then shorter than the longest are
    padded on the left.

    Args:
        num_placeholders, num_tokens (`torch.LongTensor` of shape `(clips,)`): of each clip, in the order of the rows.

    Raises:
        ValueError: for `position_ids` that are not of shape `(batch, tokens)`.
    """
    is_audio = prompt["is_audio"]
    starts = num_placeholders.cumsum(0) - num_placeholders
    places = torch.arange(int(num_placeholders.sum()), device=is_audio.device)
    place_in_clip = places - starts.repeat_interleave(num_placeholders)
    spare = is_audio.masked_scatter(is_audio, place_in_clip >= num_tokens.repeat_interleave(num_placeholders))
    keep = ~spare
    if prompt["attention_mask"] is not None:
        keep &= prompt["attention_mask"].bool()
    if (position_ids := prompt.get("position_ids")) is not None:
        if position_ids.shape[-1] != keep.shape[1] or position_ids.ndim != 2:
            raise ValueError(f"position_ids of shape {tuple(position_ids.shape)} must be {tuple(keep.shape)}.")
        prompt = prompt | {"position_ids": (position_ids - spare.cumsum(-1)).clamp(min=0)}
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
