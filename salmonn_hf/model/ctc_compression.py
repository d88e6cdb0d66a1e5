"""Windows without a word, merged: most of what a language model would read of a clip are pauses, which say little.

As in Gaido et al., "CTC-based Compression for Direct Speech Translation" (EACL 2021), but windows that carry a word
stay as they are, each at its own place. What was measured is in docs/nano.md.
"""

import torch


def merge_wordless(
    embeds: torch.Tensor, wordless: torch.BoolTensor, num_tokens: torch.LongTensor, limit: int
) -> tuple[torch.Tensor, torch.BoolTensor]:
    r"""
    Up to `limit` wordless windows in a row, of one clip, become their mean.

    Args:
        embeds (`torch.Tensor` of shape `(windows of all clips, width)`).
        wordless (`torch.BoolTensor` of shape `(windows of all clips,)`).
        num_tokens (`torch.LongTensor` of shape `(clips,)`): windows of each clip.

    Returns:
        `embeds` with each window at its group's mean, and which windows are the first of a group, the ones to keep.
    """
    places = torch.arange(len(embeds), device=embeds.device)
    clip_starts = torch.zeros_like(wordless)
    clip_starts[num_tokens.cumsum(0)[:-1]] = True
    before = torch.cat([wordless.new_zeros(1), wordless[:-1]])
    starts_run = clip_starts | ~wordless | ~before
    run_start = torch.where(starts_run, places, 0).cummax(0).values
    kept = (places - run_start) % limit == 0
    group = kept.cumsum(0) - 1
    size = torch.bincount(group)[:, None].to(embeds.dtype)
    means = embeds.new_zeros(len(size), embeds.shape[-1]).index_add(0, group, embeds) / size
    return means[group], kept


def leave_out(prompt: dict[str, torch.Tensor], is_audio: torch.BoolTensor, kept: torch.BoolTensor) -> dict:
    """
    `input_ids`, `inputs_embeds`, `attention_mask` and `labels` (the last two, `None` or not) of a batch without the
    audio tokens that are not `kept`. Rows that keep less than the longest are padded on the left.

    Args:
        is_audio (`torch.BoolTensor` of shape `(batch, tokens)`).
        kept (`torch.BoolTensor` of shape `(audio tokens of the batch,)`): in the order of the rows.
    """
    keep = ~is_audio.masked_scatter(is_audio, ~kept)
    if prompt["attention_mask"] is not None:
        keep &= prompt["attention_mask"].bool()
    lengths = keep.sum(-1, keepdim=True)
    width = int(lengths.max())
    positions = keep.int().argsort(dim=-1, stable=True)[:, -width:]  # those to keep come last, in their order
    rows = torch.arange(len(keep), device=keep.device)[:, None]
    shorter = {name: None if value is None else value[rows, positions] for name, value in prompt.items()}
    padding = torch.arange(width, device=keep.device) < width - lengths
    shorter["attention_mask"] = (~padding).long()
    if shorter["labels"] is not None:
        shorter["labels"] = shorter["labels"].masked_fill(padding, -100)
    return shorter
