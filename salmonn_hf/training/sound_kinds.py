"""The kinds of sound that a sound summary tells apart: found in training captions, and fitted before training."""

import torch
from torch import nn

from ..data.text_choice import most_typical
from ..model.ctc_head import token_directions
from ..model.quantized_layers import embedding_rows
from ..model.sound_summary import SalmonnSoundSummary

FIT_STEPS, FIT_CLIPS, FIT_LEARNING_RATE = 800, 128, 4e-3  # seconds on two CPU cores
LABEL_SMOOTHING = 0.1
CLUSTER_ROUNDS = 30


def add_sound_summary(model, sound_layers: list[int], sound_summary_size: int = 128, sound_kinds: int = 400):
    """
    Build a [`SalmonnSoundSummary`] into the projector of a model of speech alone, which then knows sounds once
    `fit_sound_summary` has named them. For `sound_layers` see [`SalmonnConfig`], for the sizes the projector's config.

    Raises:
        ValueError: if the speech encoder has no such layers, the projector knows no summary, or its size is 0.
    """
    config, projector = model.config, model.projector
    if not hasattr(projector.config, "sound_summary_size"):
        raise ValueError(
            f"A {type(projector).__name__} has no sound summary; train it with sound frames from the start."
        )
    config.sound_layers = sound_layers
    config.check_sound_layers()
    projector.config.sound_hidden_size = config.sound_hidden_size
    projector.config.sound_summary_size, projector.config.sound_kinds = sound_summary_size, sound_kinds
    projector.config.fit_to(config.audio_config, config.sound_hidden_size, config.text_config)
    projector.sound_summary = SalmonnSoundSummary(projector.config)


def caption_directions(embedding: nn.Module, captions: list[list[list[int]]]) -> torch.Tensor:
    """The mean direction of each clip's caption tokens, by inverse document frequency: `(clips, width)`, unit."""
    tokens = torch.tensor([token for clip in captions for caption in clip for token in caption])
    used, inverse = tokens.unique(return_inverse=True)
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
    Give the summary of `model` its kinds, which are clusters of `caption_directions`, their names, each the most
    typical of its captions, and the MLP that tells them apart. Returns its last loss, in nats per clip.

    Args:
        statistics (`torch.Tensor` of shape `(clips, 2 * width)`): see `frame_statistics`.
        captions (`list[list[list[int]]]`): of each clip the token ids of all its captions; none of mere speech.
    """
    summary, generator = model.projector.sound_summary.float(), torch.Generator().manual_seed(seed)
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
