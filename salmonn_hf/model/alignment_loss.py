"""Losses that align audio embeddings with the language model's tokens: CTC for speech, a bag of words for sounds."""

import torch
from torch import nn

CAPTION_SCALE = 50.0  # times cosines: with 20, a caption of ten words cannot be told apart from its neighbours


def ctc_loss(log_probs: torch.Tensor, lengths: torch.LongTensor, labels: torch.LongTensor) -> torch.Tensor:
    r"""
    Connectionist temporal classification (Graves et al., ICML 2006).

    Args:
        log_probs (`torch.Tensor` of shape `(states, clips, 1 + classes)`): the blank first.
        lengths (`torch.LongTensor` of shape `(clips,)`): states of each clip.
        labels (`torch.LongTensor` of shape `(clips, tokens)`): indices of classes, padded with -100. A clip with no
            label at all (no speech) takes no part.

    Returns:
        Scalar, nats, summed over all labels.
    """
    label_lengths = (labels != -100).sum(-1)
    targets = labels.clamp(min=0) + 1
    # A transcript longer than its audio has states has no path.
    settings = {"reduction": "none", "zero_infinity": True}
    losses = nn.functional.ctc_loss(log_probs, targets, lengths, label_lengths, **settings)
    return losses[label_lengths > 0].sum()


def caption_loss(clips: torch.Tensor, labels: torch.LongTensor, token_directions: torch.Tensor) -> torch.Tensor:
    r"""
    What CTC is for speech, for clips without a transcript: the tokens of a clip's caption, as a bag of words, are each
    predicted from the cosines of one vector of the clip with the language model's token embeddings.

    Args:
        clips (`torch.Tensor` of shape `(clips, hidden size)`): less the mean of all token embeddings.
        labels (`torch.LongTensor` of shape `(clips, tokens)`): token ids, padded with -100.
        token_directions (`torch.Tensor` of shape `(vocabulary, hidden size)`): see [`ctc_head.token_directions`].

    Returns:
        Scalar, nats, summed over all labels.
    """
    directions = nn.functional.normalize(clips.float(), dim=-1)
    log_probs = (CAPTION_SCALE * nn.functional.linear(directions, token_directions.detach())).float().log_softmax(-1)
    return -(log_probs.gather(1, labels.clamp(min=0)) * (labels != -100)).sum()


def collapse_ctc_path(path: torch.LongTensor, token_ids: torch.Tensor) -> list[int]:
    """The token ids of a CTC path `(states,)`, 0 for the blank: repeats merged, blanks dropped."""
    path = path.unique_consecutive()
    return token_ids[path[path > 0] - 1].tolist()
