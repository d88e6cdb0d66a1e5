"""What aligns audio embeddings with the language model's tokens: CTC for speech, a bag of words for sounds."""

import torch
from torch import nn

from .configuration_salmonn import SalmonnConfig
from .quantized_layers import embedding_rows

CAPTION_SCALE = 50.0  # times cosines: with 20, a caption of ten words cannot be told apart from its neighbours


class SalmonnCTCHead(nn.Module):
    """
    CTC (Graves et al., 2006) over the language model's own, frozen, token embeddings: an audio embedding scores a
    token by the cosine between the two. Trained with it, audio embeddings come to lie where the words that they carry
    lie.
    """

    def __init__(self, config: SalmonnConfig):
        super().__init__()
        self.register_buffer("token_ids", torch.zeros(config.ctc_vocab_size, dtype=torch.int64))
        self.blank = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.kept = None

    def train(self, mode: bool = True):
        """As `nn.Module.train`; what `best` kept of the weights is dropped."""
        self.kept = None
        return super().train(mode)

    def directions(self, embedding: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """See `token_directions`; of the head's tokens."""
        return token_directions(embedding, self.token_ids)

    def forward(self, audio_embeds: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        r"""
        Args:
            audio_embeds (`torch.Tensor` of shape `(..., hidden size)`).
            embedding (`nn.Module`): the language model's input embeddings.

        Returns:
            float32 log-probabilities of shape `(..., 1 + ctc_vocab_size)`: the blank, then `token_ids`.
        """
        center, rows = self.directions(embedding)
        blank = nn.functional.normalize(self.blank.float()[None], dim=-1)
        directions = nn.functional.normalize(audio_embeds.float() - center, dim=-1)
        # As a plain matrix product: with more axes torch would copy the rows for each of them.
        directions = directions.flatten(0, -2)
        cosines = torch.cat([nn.functional.linear(directions, w) for w in (blank, rows)], dim=-1)
        log_probs = (cosines * self.log_scale.exp()).float().log_softmax(-1)
        return log_probs.unflatten(0, audio_embeds.shape[:-1])

    def best(self, audio_embeds: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """
        Index of the output nearest to each audio embedding, 0 for the blank. The tokens' directions are kept, in the
        precision of the embeddings.
        """
        if self.kept is None or self.kept[1].device != audio_embeds.device:
            center, rows = self.directions(embedding)
            blank = nn.functional.normalize(self.blank.float()[None], dim=-1)
            self.kept = center, torch.cat([blank, rows]).to(audio_embeds.dtype)
        center, rows = self.kept
        return nn.functional.linear((audio_embeds.float() - center).to(rows.dtype), rows).argmax(-1)


def token_directions(
    embedding: nn.Module, token_ids: torch.LongTensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens' mean embedding `(hidden size,)`, and their unit directions from it `(tokens, hidden size)`; float32."""
    if token_ids is None:
        token_ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    rows = embedding_rows(embedding, token_ids).float()
    center = rows.mean(0)  # token embeddings share a large common part, which tells none of them apart
    return center, nn.functional.normalize(rows - center, dim=-1)


def ctc_loss(
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    r"""
    Args:
        log_probs (`torch.Tensor` of shape `(audio tokens, clips, 1 + ctc_vocab_size)`).
        lengths (`torch.LongTensor` of shape `(clips,)`): audio tokens of each clip.
        labels (`torch.LongTensor` of shape `(clips, tokens)`): indices into `token_ids`, padded with -100. A clip
            with no label at all (no speech) takes no part.

    Returns:
        Scalar, nats, summed over all labels.
    """
    label_lengths = (labels != -100).sum(-1)
    losses = nn.functional.ctc_loss(
        log_probs,
        labels.clamp(min=0) + 1,
        lengths,
        label_lengths,
        reduction="none",
        zero_infinity=True,  # a transcript longer than its audio has tokens has no path
    )
    return losses[label_lengths > 0].sum()


def caption_loss(clips: torch.Tensor, labels: torch.LongTensor, embedding: nn.Module) -> torch.Tensor:
    r"""
    What CTC is for speech, for clips that no transcript spells out: one vector of a clip is to lie where the tokens of
    its caption lie. Each of them is predicted from the cosines of that vector with the language model's token
    embeddings, as a bag of words, their order being of no account.

    Args:
        clips (`torch.Tensor` of shape `(clips, hidden size)`): from the mean of all token embeddings.
        labels (`torch.LongTensor` of shape `(clips, tokens)`): token ids, padded with -100.
        embedding (`nn.Module`): the language model's input embeddings.

    Returns:
        Scalar, nats, summed over all labels.
    """
    with torch.no_grad():
        _, rows = token_directions(embedding)
    directions = nn.functional.normalize(clips.float(), dim=-1)
    log_probs = (CAPTION_SCALE * nn.functional.linear(directions, rows)).float().log_softmax(-1)
    return -(log_probs.gather(1, labels.clamp(min=0)) * (labels != -100)).sum()
