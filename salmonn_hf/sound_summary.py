"""
What a whole clip sounds like: kinds of sound that the language model learns to name, told by all of a clip's frames.

Words come one after another, window by window; what makes a sound is told better by all of its frames together. What
was measured is in docs/nano.md.
"""

import torch
from torch import nn

from .configuration_salmonn import SalmonnConfig
from .ctc_head import token_directions

FIT_STEPS, FIT_CLIPS, FIT_LEARNING_RATE = 800, 128, 4e-3  # of `fit_sound_summary`: seconds on two CPU cores
LABEL_SMOOTHING = 0.1
CLUSTER_ROUNDS = 30


class SalmonnSoundSummary(nn.Module):
    """
    Mean and standard deviation over time of the sound frames, through an MLP, to the probabilities of `sound_kinds`
    kinds of sound, each of which has a vector in the language model's space. Beside a [`SalmonnSpeechDecoder`], whose
    windows carry these wherever they carry no word: of a clip's windows a kind has as large a share as it is likely,
    the likeliest first. A mean of several kinds would be like none of them, as the language model never sees it of the
    clips that it is trained on, which are told apart too well.
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
            nn.Linear(config.sound_summary_size, config.sound_kinds),
        )
        self.kinds = nn.Parameter(torch.zeros(config.sound_kinds, config.text_config.hidden_size))
        self.merged_windows = config.merged_windows

    def forward(
        self, sound_frames: torch.Tensor, sound_frames_mask: torch.BoolTensor, num_tokens: torch.LongTensor
    ) -> torch.Tensor:
        r"""
        Args:
            sound_frames (`torch.Tensor` of shape `(clips, frames, width)`): as the encoder gave them.
            sound_frames_mask (`torch.BoolTensor` of shape `(clips, frames)`).
            num_tokens (`torch.LongTensor` of shape `(clips,)`): audio tokens of each clip.

        Returns:
            A kind's vector for each audio token, `(audio tokens of all clips, hidden size)`. No gradient goes through
            the choice.
        """
        with torch.no_grad():
            likely = self.logits(frame_statistics(sound_frames, sound_frames_mask)).float().softmax(-1)
            shares, order = likely.sort(-1, descending=True)
            clip_of_token = torch.arange(len(num_tokens), device=likely.device).repeat_interleave(num_tokens)
            first_token = (num_tokens.cumsum(0) - num_tokens)[clip_of_token]
            place = torch.arange(len(clip_of_token), device=likely.device) - first_token
            # Windows that may be merged are of one kind: that which their middle falls to.
            start, of_clip = place - place % self.merged_windows, num_tokens[clip_of_token]
            middle = (start + (start + self.merged_windows).minimum(of_clip)) / 2
            passed = shares.cumsum(-1)[clip_of_token] <= (middle / of_clip)[:, None]
            rank = passed.sum(-1).clamp(max=len(self.kinds) - 1)  # the shares' sum is 1 but for rounding
        return self.kinds[order[clip_of_token, rank]]

    def logits(self, statistics: torch.Tensor) -> torch.Tensor:
        """What `frame_statistics` gives, `(clips, 2 * width)`, to `(clips, sound_kinds)`."""
        return self.mlp(self.norm(statistics.to(self.norm.weight.dtype)))


def frame_statistics(frames: torch.Tensor, mask: torch.BoolTensor) -> torch.Tensor:
    """Mean and standard deviation over time of frames `(clips, frames, width)`: float32 `(clips, 2 * width)`."""
    frames, mask = frames.float(), mask[..., None]
    count = mask.sum(1)
    mean = (frames * mask).sum(1) / count
    variance = ((frames - mean[:, None]).square() * mask).sum(1) / count
    return torch.cat([mean, variance.sqrt()], dim=-1)


def caption_directions(embedding: nn.Module, captions: list[list[list[int]]]) -> torch.Tensor:
    """
    Where the captions of each clip lie: the mean direction of their tokens, those that many clips have counting less
    (inverse document frequency), `(clips, hidden size)`, of unit length.
    """
    used, inverse = torch.tensor([t for clip in captions for caption in clip for t in caption]).unique(
        return_inverse=True
    )
    clip_of_token = torch.repeat_interleave(torch.tensor([sum(map(len, clip)) for clip in captions]))
    places = torch.stack([clip_of_token, inverse])
    size = (len(captions), len(used))
    counts = torch.sparse_coo_tensor(places, torch.ones(len(inverse)), size, check_invariants=True).coalesce()
    clips_with = torch.zeros(len(used)).index_add_(0, counts.indices()[1], torch.ones(counts.indices().shape[1]))
    _, rows = token_directions(embedding)
    weighted = rows[used] * torch.log((1 + len(captions)) / clips_with)[:, None]
    return nn.functional.normalize(torch.sparse.mm(counts, weighted), dim=-1)


def cluster(directions: torch.Tensor, number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Spherical k-means, started as k-means++: the cluster of each direction, and `(number, width)` unit centres."""
    chosen, nearest = [], torch.full((len(directions),), -1.0)
    for _ in range(number):
        far = (1 - nearest).clamp(min=1e-6).square()
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
        nearest = torch.maximum(nearest, directions @ directions[chosen[-1]])
    centres = directions[chosen]
    for _ in range(CLUSTER_ROUNDS):
        clusters = (directions @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, clusters, directions)
        centres = torch.where(sums.any(-1, keepdim=True), nn.functional.normalize(sums, dim=-1), centres)
    return clusters, centres


def fit_sound_summary(model, statistics: torch.Tensor, captions: list[list[list[int]]], seed: int = 0) -> float:
    """
    Give the summary of `model` its kinds and the MLP that tells them: clips whose captions say the same are of a kind,
    by clusters of `caption_directions`, and the vector of a kind is the direction of its captions, of unit length. The
    MLP is trained on what can be computed once, so this takes seconds. Returns its last loss, in nats per clip.

    Args:
        statistics (`torch.Tensor` of shape `(clips, 2 * width)`): see `frame_statistics`.
        captions (`list[list[list[int]]]`): of each clip the token ids of all its captions.
    """
    summary, generator = model.sound_summary.float(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        normed = nn.functional.layer_norm(statistics, statistics.shape[-1:])
        deviation = normed.std(0) + 1e-6
        summary.norm.weight.copy_(1 / deviation)
        summary.norm.bias.copy_(-normed.mean(0) / deviation)
        directions = caption_directions(model.get_input_embeddings(), captions)
        clusters, centres = cluster(directions, len(summary.kinds), generator)
        summary.kinds.copy_(centres)

    mlp = summary.mlp.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(mlp.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FIT_LEARNING_RATE, FIT_STEPS, pct_start=0.05)
    for _ in range(FIT_STEPS):
        clips = torch.randint(len(captions), (FIT_CLIPS,), generator=generator)
        logits = summary.logits(statistics[clips])
        loss = nn.functional.cross_entropy(logits, clusters[clips], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    mlp.requires_grad_(False)  # it stays as it is from here on
    return loss.item()
