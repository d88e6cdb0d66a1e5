"""A CTC head over the language model's own token embeddings."""

import torch
from torch import nn

from .configuration_projector import ProjectorConfig
from .quantized_layers import embedding_rows


class SalmonnCTCHead(nn.Module):
    """
    CTC (Graves et al., 2006) over the language model's own, frozen, token embeddings: an audio embedding scores a
    token by the cosine between the two, and so comes to lie where its word lies.
    """

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.register_buffer("token_ids", torch.zeros(config.ctc_vocab_size, dtype=torch.int64))
        self.blank = nn.Parameter(torch.zeros(config.output_size))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.cached_directions = None

    def train(self, mode: bool = True):
        """As `nn.Module.train`; the cache of `best` is dropped."""
        self.cached_directions = None
        return super().train(mode)

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.zeros_(self.token_ids)
        nn.init.normal_(self.blank)
        nn.init.constant_(self.log_scale, 3.0)  # cosines times e³ = 20

    def forward(
        self, audio_embeds: torch.Tensor, token_embedding: nn.Module, classes: torch.LongTensor | None = None
    ) -> torch.Tensor:
        r"""
        Args:
            audio_embeds (`torch.Tensor` of shape `(..., hidden size)`).
            token_embedding (`nn.Module`): the language model's.
            classes (`torch.LongTensor` of shape `(classes,)`, *optional*): indices into `token_ids`; default: all.

        Returns:
            float32 log-probabilities of shape `(..., 1 + classes)`: the blank, then the tokens.
        """
        center, rows = token_directions(token_embedding, self.token_ids)
        rows = rows if classes is None else rows[classes]
        blank = nn.functional.normalize(self.blank.float()[None], dim=-1)
        directions = nn.functional.normalize(audio_embeds.float() - center, dim=-1)
        directions = directions.flatten(0, -2)  # as a plain product: of more axes torch would copy the rows for each
        cosines = torch.cat([nn.functional.linear(directions, w) for w in (blank, rows)], dim=-1)
        log_probs = (cosines * self.log_scale.exp()).float().log_softmax(-1)
        return log_probs.unflatten(0, audio_embeds.shape[:-1])

    def best(self, audio_embeds: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """Index of the output nearest to each audio embedding, 0: the blank. The tokens' directions are cached."""
        if self.cached_directions is None or self.cached_directions[1].device != audio_embeds.device:
            center, rows = token_directions(embedding, self.token_ids)
            blank = nn.functional.normalize(self.blank.float()[None], dim=-1)
            self.cached_directions = center, torch.cat([blank, rows]).to(audio_embeds.dtype)
        center, rows = self.cached_directions
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
