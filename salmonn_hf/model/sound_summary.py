"""
What a whole clip sounds like: one of some hundred kinds of sound, and its name, told by all of a clip's frames.

Words come one after another, window by window; what makes a sound is told better by all of its frames together. The
language model reads its name as it reads speech, as embeddings of its own tokens. What was measured: docs/nano.md.
"""

from collections.abc import Callable

import torch
from torch import nn

from .configuration_salmonn import SalmonnConfig
from .ctc_head import token_directions
from .quantized_layers import embedding_rows

FIT_STEPS, FIT_CLIPS, FIT_LEARNING_RATE = 800, 128, 4e-3  # of `fit_sound_summary`: seconds on two CPU cores
LABEL_SMOOTHING = 0.1
CLUSTER_ROUNDS = 30


class SalmonnSoundSummary(nn.Module):
    """
    Mean and standard deviation over time of the sound frames, through an MLP, to the likeliest of `sound_kinds` kinds
    of sound, each of which has a name: a caption, in the language model's tokens. Beside a [`SalmonnSpeechDecoder`],
    a clip's first windows carry the name, a token each, wherever they carry no word. The first kind is that of clips
    in which nothing is heard but speech, and has no name.
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
        # Padded with -1.
        self.register_buffer("names", torch.full((config.sound_kinds, config.sound_name_size), -1, dtype=torch.int32))
        self.marker = nn.Parameter(torch.zeros(config.text_config.hidden_size))  # a name is not what somebody says

    def forward(
        self,
        sound_frames: torch.Tensor,
        sound_frames_mask: torch.BoolTensor,
        num_tokens: torch.LongTensor,
        embedding: nn.Module,
    ) -> torch.Tensor:
        r"""
        Args:
            sound_frames (`torch.Tensor` of shape `(clips, frames, width)`): as the encoder gave them.
            sound_frames_mask (`torch.BoolTensor` of shape `(clips, frames)`).
            num_tokens (`torch.LongTensor` of shape `(clips,)`): audio tokens of each clip.
            embedding (`nn.Module`): the language model's token embeddings.

        Returns:
            `(audio tokens of all clips, hidden size)`: on the first audio tokens of each clip the name of its kind;
            each is the mean of several tokens where a name has more of them than the clip; zeros on the others.
        """
        kind = self.logits(frame_statistics(sound_frames, sound_frames_mask)).argmax(-1)
        names = self.names[kind].long()
        named = names >= 0
        length = named.sum(-1, keepdim=True)
        place = torch.arange(names.shape[1], device=kind.device)
        place = place * torch.minimum(length, num_tokens[:, None]) // length.clamp(min=1)
        token = ((num_tokens.cumsum(0) - num_tokens)[:, None] + place)[named]
        count = torch.bincount(token, minlength=int(num_tokens.sum()))[:, None]
        rows = embedding_rows(embedding, names[named])
        sums = rows.new_zeros(len(count), rows.shape[-1]).index_add(0, token, rows)
        return torch.where(count > 0, sums / count.clamp(min=1) + self.marker, 0).to(rows.dtype)

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


def fit_sound_summary(
    model,
    statistics: torch.Tensor,
    captions: list[list[list[int]]],
    most_typical: Callable[[list[list[int]]], int],
    seed: int = 0,
) -> float:
    """
    Give the summary of `model` its kinds, their names, and the MLP that tells them: clips whose captions say the same
    are of a kind, by clusters of `caption_directions`, and its name is the most typical of its captions. The MLP is
    trained on what can be computed once, so this takes seconds. Returns its last loss, in nats per clip.

    Args:
        statistics (`torch.Tensor` of shape `(clips, 2 * width)`): see `frame_statistics`.
        captions (`list[list[list[int]]]`): of each clip the token ids of all its captions; none where nothing is heard
            but speech.
        most_typical (`Callable`): which of some captions is a kind's name, as its place among them.
    """
    summary, generator = model.sound_summary.float(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        normed = nn.functional.layer_norm(statistics, statistics.shape[-1:])
        deviation = normed.std(0) + 1e-6
        summary.norm.weight.copy_(1 / deviation)
        summary.norm.bias.copy_(-normed.mean(0) / deviation)
        described = torch.tensor([bool(clip) for clip in captions])
        directions = caption_directions(model.get_input_embeddings(), [clip for clip in captions if clip])
        kinds = torch.zeros(len(captions), dtype=torch.long)
        kinds[described] = 1 + cluster(directions, len(summary.names) - 1, generator)[0]
        summary.names.fill_(-1)
        for kind in range(1, len(summary.names)):
            said = [caption for clip in (kinds == kind).nonzero()[:, 0] for caption in captions[clip]]
            if said:  # else a cluster that all clips have left
                name = said[most_typical(said)][: summary.names.shape[1]]
                summary.names[kind, : len(name)] = torch.tensor(name)
        # Half as strong as what tells tokens apart: it is seen from the first step on, and the token still is.
        tokens = embedding_rows(model.get_input_embeddings(), summary.names[summary.names >= 0].long()).float()
        summary.marker.normal_(std=0.5 * float(tokens.std(0).mean()), generator=generator)

    mlp = summary.mlp.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(mlp.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FIT_LEARNING_RATE, FIT_STEPS, pct_start=0.05)
    for _ in range(FIT_STEPS):
        clips = torch.randint(len(captions), (FIT_CLIPS,), generator=generator)
        logits = summary.logits(statistics[clips])
        loss = nn.functional.cross_entropy(logits, kinds[clips], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    mlp.requires_grad_(False)  # it stays as it is from here on
    return loss.item()
