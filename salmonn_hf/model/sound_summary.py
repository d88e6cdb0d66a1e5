"""
A clip's sound as one of some hundred kinds, classified from all of the clip's frames together, and named: the language
model gets the name as it gets speech, as embeddings of its own tokens.
"""

import torch
from torch import nn

from .configuration_whisper_projector import WhisperProjectorConfig
from .quantized_layers import embedding_rows
from .windows import dropout_mlp


class SalmonnSoundSummary(nn.Module):
    """
    Mean and standard deviation over time of the sound frames, through an MLP, to the likeliest of `sound_kinds` kinds
    of sound, each of which has a name: a caption, in the language model's tokens. A clip's first windows carry the
    name, a token each, wherever they carry no word. The first kind is that of clips with nothing but speech, and has
    no name.
    """

    def __init__(self, config: WhisperProjectorConfig):
        super().__init__()
        width = 2 * config.sound_hidden_size
        self.norm = nn.LayerNorm(width)
        self.mlp = dropout_mlp(width, config.sound_summary_size, config.sound_kinds, config.dropout)
        # Padded with -1.
        self.register_buffer("names", torch.full((config.sound_kinds, config.sound_name_size), -1, dtype=torch.int32))
        self.marker = nn.Parameter(torch.zeros(config.output_size))  # a name is not what somebody says

    def forward(self, sound_frames, sound_frames_mask, num_states, token_embedding: nn.Module) -> torch.Tensor:
        r"""
        Args:
            sound_frames (`torch.Tensor` of shape `(clips, frames, width)`): as the encoder gave them.
            sound_frames_mask (`torch.BoolTensor` of shape `(clips, frames)`).
            num_states (`torch.LongTensor` of shape `(clips,)`): states of each clip.
            token_embedding (`nn.Module`): the language model's.

        Returns:
            `(states of all clips, hidden size)`: on the first states of each clip the name of its kind; each is the
            mean of several tokens where a name has more of them than the clip has states; zeros on the others.
        """
        kind = self.logits(frame_statistics(sound_frames, sound_frames_mask)).argmax(-1)
        kind = kind * sound_frames_mask.any(-1)  # text alone, without any frame, has no name either
        names = self.names[kind].long()
        named = names >= 0
        length = named.sum(-1, keepdim=True)
        place = torch.arange(names.shape[1], device=kind.device)
        place = place * torch.minimum(length, num_states[:, None]) // length.clamp(min=1)
        token = ((num_states.cumsum(0) - num_states)[:, None] + place)[named]
        rows, num_rows = embedding_rows(token_embedding, names[named]), num_states.sum().item()
        count = token.new_zeros(num_rows, 1).index_add(0, token, torch.ones_like(token)[:, None])
        sums = rows.new_zeros(num_rows, rows.shape[-1]).index_add(0, token, rows)
        return torch.where(count > 0, sums / count.clamp(min=1) + self.marker, 0).to(rows.dtype)

    def logits(self, statistics: torch.Tensor) -> torch.Tensor:
        """What `frame_statistics` gives, `(clips, 2 * width)`, to `(clips, sound_kinds)`."""
        return self.mlp(self.norm(statistics.to(self.norm.weight.dtype)))


def frame_statistics(frames: torch.Tensor, mask: torch.BoolTensor) -> torch.Tensor:
    """Mean and standard deviation over time of frames `(clips, frames, width)`: float32 `(clips, 2 * width)`."""
    frames, mask = frames.float(), mask[..., None]
    count = mask.sum(1).clamp(min=1)
    mean = (frames * mask).sum(1) / count
    variance = ((frames - mean[:, None]).square() * mask).sum(1) / count
    return torch.cat([mean, variance.sqrt()], dim=-1)
