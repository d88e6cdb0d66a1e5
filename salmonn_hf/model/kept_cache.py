"""
A cache that is kept for the next turn of a conversation: what it holds is neither encoded nor embedded again. Where
windows were merged it has fewer positions than the prompt as it was given, which the cache itself then remembers.
"""

import torch

ATTRIBUTE = "salmonn_prompt"  # of such a cache: the ids as they were given, as the cache has them, and their mask


def cached_length(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def keep_prompt(cache, given: torch.LongTensor, cut: torch.LongTensor, mask: torch.Tensor | None):
    """Note on a cache that the prompt `given` `(batch, tokens)` is in it as `cut`, which is shorter."""
    if cache is not None:
        setattr(cache, ATTRIBUTE, (given, cut, torch.ones_like(cut) if mask is None else mask))


def kept_prompt(cache, like: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor, torch.Tensor]:
    """The three that `keep_prompt` noted, in as many rows as `like` if it repeats them; else each with no token."""
    kept = getattr(cache, ATTRIBUTE, None) or (like[:, :0],) * 3
    return tuple(rows.repeat_interleave(max(len(like) // len(rows), 1), dim=0) for rows in kept)


def check_rows(cache, prompts: int, sequences: int):
    """
    Raises:
        ValueError: if the cache has not a row for each sequence, of which there are `sequences` per prompt.
    """
    keys = (getattr(layer, "keys", None) for layer in cache.layers)
    rows = next((len(states) for states in keys if states is not None and states.numel()), None)
    if rows not in (None, prompts * sequences):
        raise ValueError(
            f"past_key_values have {rows} rows, but there are {prompts} prompts, with num_beams or "
            f"num_return_sequences {sequences}. Repeat them with past_key_values.batch_repeat_interleave, "
            "or give as many prompts."
        )


def mask_as_cut(cache, attention_mask: torch.Tensor | None, new_tokens: int) -> torch.Tensor | None:
    """Of a conversation as it was given, a mask `(batch, tokens)` for what the cache has of it and what is new."""
    of_tokens = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2  # not ready-made, by layer type
    if not of_tokens or not hasattr(cache, ATTRIBUTE):
        return attention_mask
    given, _, mask = kept_prompt(cache, attention_mask)
    if len(mask) != len(attention_mask):
        raise ValueError(
            f"past_key_values were made of {len(mask)} prompts, but attention_mask has {len(attention_mask)} rows."
        )
    spare = given.shape[1] - mask.shape[1]
    if attention_mask.shape[1] != cached_length(cache) + new_tokens + spare:
        return attention_mask
    return torch.cat([mask.to(attention_mask), attention_mask[:, given.shape[1] :]], dim=1)


def split_at_cache(cache, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None):
    """
    A conversation's tokens, and mask, in those that the cache holds and those behind.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): the whole conversation, as it was given and
            answered; or, with an `attention_mask` that is longer, what is new alone.

    Returns:
        `(ids, mask)` of both; the first's ids are `None` where what is new alone was given.

    Raises:
        ValueError: if the conversation does not begin with the prompt that the cache was made of, or has nothing new.
    """
    length, width = cached_length(cache), input_ids.shape[1]
    given, cut, cut_mask = kept_prompt(cache, input_ids)
    if attention_mask is not None and attention_mask.shape[1] != width:
        mask = mask_as_cut(cache, attention_mask, width)
        return (None, mask[:, :-width]), (input_ids, mask[:, -width:])
    if not torch.equal(input_ids[:, : given.shape[1]], given.to(input_ids)):
        raise ValueError("past_key_values are of another prompt than the one that input_ids begin with.")
    new = input_ids[:, given.shape[1] :]
    new_mask = torch.ones_like(new) if attention_mask is None else attention_mask[:, given.shape[1] :]
    ids = torch.cat([cut.to(new), new], dim=1)
    mask = torch.cat([cut_mask.to(new_mask), new_mask], dim=1)
    if ids.shape[1] <= length:
        raise ValueError(
            "past_key_values hold all input_ids already. Crop them by one to answer these once more; what is new "
            "alone needs the attention_mask of the whole conversation."
        )
    return (ids[:, :length], mask[:, :length]), (ids[:, length:], mask[:, length:])


def clips_behind_cache(
    clips: dict[str, torch.Tensor | None], counts: torch.LongTensor, is_audio: torch.BoolTensor, new_width: int
) -> dict[str, torch.Tensor | None]:
    """
    Of the features of a whole conversation's clips, those of clips that the cache does not hold; where there are no
    others than these, all.

    Args:
        counts (`torch.LongTensor` of shape `(clips,)`): placeholders of each clip.
        is_audio (`torch.BoolTensor` of shape `(batch, tokens)`): placeholders in the tokens as they were given.
        new_width (`int`): how many of the tokens are new.
    """
    is_new = torch.arange(is_audio.shape[1], device=is_audio.device) >= is_audio.shape[1] - new_width
    is_new = is_new.expand_as(is_audio)[is_audio]
    if int(counts.sum()) != len(is_new):
        return clips
    clip = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    new = clip.to(is_new.device)[is_new].unique()
    if len(new) == len(counts):
        return clips
    return {n: None if v is None or not len(new) else v[new.to(v.device)] for n, v in clips.items()}
