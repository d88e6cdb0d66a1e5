"""
Windows without a word, merged: most of a clip's audio tokens would otherwise stand for pauses. As in Gaido et al.,
"CTC-based Compression for Direct Speech Translation" (EACL 2021), but windows that carry a word stay as they are.
"""

import torch


def merge_wordless(
    embeds: torch.Tensor, wordless: torch.BoolTensor, num_windows: torch.LongTensor, limit: int
) -> tuple[torch.Tensor, torch.BoolTensor]:
    r"""
    Up to `limit` wordless windows in a row, of one clip, become their mean.

    Args:
        embeds (`torch.Tensor` of shape `(windows of all clips, width)`).
        wordless (`torch.BoolTensor` of shape `(windows of all clips,)`).
        num_windows (`torch.LongTensor` of shape `(clips,)`): windows of each clip.

    Returns:
        `embeds` with each window at its group's mean, and which windows are the first of their group.
    """
    places = torch.arange(embeds.shape[0], device=embeds.device)
    clip_starts = torch.zeros_like(wordless)
    clip_starts[num_windows.cumsum(0)[:-1]] = True
    before = torch.cat([wordless.new_zeros(1), wordless[:-1]])
    starts_run = clip_starts | ~wordless | ~before
    starts = torch.where(starts_run, places, 0)
    torch._check(starts.shape[0] > 0)  # a hint for torch.export
    run_start = starts.cummax(0).values
    is_first = (places - run_start) % limit == 0
    group = is_first.cumsum(0) - 1
    # Room for as many groups as windows, so that no shape depends on what the windows hold.
    size = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))
    sums = torch.zeros_like(embeds).index_add(0, group, embeds)
    return sums[group] / size[group][:, None].to(embeds.dtype), is_first
