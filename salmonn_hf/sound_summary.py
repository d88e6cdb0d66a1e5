"""
What a whole clip sounds like: one vector in the language model's space, from all of a clip's sound frames.

Words come one after another, window by window; what makes a sound is told better by all of its frames together. What
was measured is in docs/nano.md.
"""

import torch
from torch import nn

from .configuration_salmonn import SalmonnConfig
from .ctc_head import CAPTION_SCALE, token_directions
from .quantization import embedding_rows

FIT_STEPS, FIT_CLIPS, FIT_LEARNING_RATE = 1600, 128, 4e-3  # of `fit_sound_summary`: 20 s on two CPU cores
SAMPLED_TOKENS = 2000  # of those that are in no caption, in a step's softmax


class SalmonnSoundSummary(nn.Module):
    """
    Mean and standard deviation over time of the sound frames, through an MLP, to a direction from the mean of the
    language model's token embeddings; `log_scale` is how far it goes. Beside a [`SalmonnSpeechDecoder`], whose windows
    carry it wherever they carry no word.
    """

    def __init__(self, config: SalmonnConfig):
        super().__init__()
        dropout, width = config.qformer_config.hidden_dropout_prob, 2 * config.sound_width
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(width, config.sound_summary_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(config.sound_summary_size, config.text_config.hidden_size),
        )
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, sound_frames: torch.Tensor, sound_frames_mask: torch.BoolTensor) -> torch.Tensor:
        """Frames `(clips, frames, width)`, as the encoder gave them, and their mask to `(clips, hidden size)`."""
        return self.from_statistics(frame_statistics(sound_frames, sound_frames_mask))

    def from_statistics(self, statistics: torch.Tensor) -> torch.Tensor:
        """What `frame_statistics` gives, `(clips, 2 * width)`, to `(clips, hidden size)`."""
        states = self.mlp(self.norm(statistics.to(self.norm.weight.dtype)))
        return self.log_scale.exp() * nn.functional.normalize(states, dim=-1)


def frame_statistics(frames: torch.Tensor, mask: torch.BoolTensor) -> torch.Tensor:
    """Mean and standard deviation over time of frames `(clips, frames, width)`: float32 `(clips, 2 * width)`."""
    frames, mask = frames.float(), mask[..., None]
    count = mask.sum(1)
    mean = (frames * mask).sum(1) / count
    variance = ((frames - mean[:, None]).square() * mask).sum(1) / count
    return torch.cat([mean, variance.sqrt()], dim=-1)


def fit_sound_summary(model, statistics: torch.Tensor, captions: list[list[list[int]]], seed: int = 0):
    """
    Start the summary of `model` where its clips' captions lie: each of their tokens is predicted from the cosines of
    the summary with the language model's token embeddings, as in [`caption_loss`]. The MLP alone is trained, on what
    can be computed once, so this takes seconds.

    Args:
        statistics (`torch.Tensor` of shape `(clips, 2 * width)`): see `frame_statistics`.
        captions (`list[list[list[int]]]`): of each clip the token ids of all its captions.
    """
    summary, generator = model.sound_summary, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        normed = nn.functional.layer_norm(statistics, statistics.shape[-1:])
        deviation = normed.std(0) + 1e-6
        summary.norm.weight.copy_(1 / deviation)
        summary.norm.bias.copy_(-normed.mean(0) / deviation)
        embedding = model.get_input_embeddings()
        center, rows = token_directions(embedding)
        distances = (embedding_rows(embedding, torch.arange(len(rows))).float() - center).norm(dim=-1)
        summary.log_scale.copy_(distances.mean().log())  # as far as a token lies

    used = torch.tensor(sorted({token for clip in captions for caption in clip for token in caption}))
    others = torch.randperm(len(rows), generator=generator)[:SAMPLED_TOKENS]
    rows = torch.cat([rows[used], rows[others[~torch.isin(others, used)]]])
    bags = torch.zeros(len(captions), len(rows))
    for bag, clip in zip(bags, captions, strict=True):
        tokens = torch.tensor([token for caption in clip for token in caption])
        bag.index_add_(0, torch.searchsorted(used, tokens), torch.ones(len(tokens)))
    bags /= bags.sum(-1, keepdim=True)

    mlp = summary.mlp.float().train()
    optimizer = torch.optim.AdamW(mlp.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FIT_LEARNING_RATE, FIT_STEPS, pct_start=0.05)
    for _ in range(FIT_STEPS):
        clips = torch.randint(len(bags), (FIT_CLIPS,), generator=generator)
        directions = nn.functional.normalize(summary.from_statistics(statistics[clips]), dim=-1)
        log_probs = (CAPTION_SCALE * directions @ rows.T).log_softmax(-1)
        loss = -(bags[clips] * log_probs).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()
