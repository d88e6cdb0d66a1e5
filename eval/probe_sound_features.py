"""
How well do the features of an encoder tell sounds apart? Whisper's layers beside a small BEATs of our own.

    python eval/probe_sound_features.py --train sounds-train.parquet --test sounds-test.parquet \\
        --audio speech.parquet music.parquet --output runs/probe

Files have the columns `audio` and `label`; of `--audio`, which only adds clips to pre-train on, `audio` alone. BEATs
is trained here on the clips of `--train` and `--audio`, twice: by the first iteration of its paper (arXiv:2212.09058,
section 3.2: the tokens of masked patches by a random projection), and distilled from Whisper (the mean of
`--whisper_layers`, at each 160 ms). A probe is given the mean over time of a clip's features, standardised: softmax
regression, and the label of the training clip with the highest cosine. Writes `result.json` and `table.md`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import WhisperConfig, WhisperModel

from salmonn_hf import BeatsConfig, BeatsModel, SalmonnFeatureExtractor, load_audio
from salmonn_hf.base_parts.resolver import resolve_base_part
from salmonn_hf.data.clip_parquet import parquet_rows
from salmonn_hf.files import write_atomically
from salmonn_hf.model.audio import SAMPLING_RATE
from salmonn_hf.model.modeling_beats import BeatsPatchEmbedding
from salmonn_hf.model.modeling_salmonn import SalmonnWhisperEncoder

SMALL_BEATS = BeatsConfig(
    embed_dim=256, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
)
STEP = 2560  # samples of the 160 ms that BEATs has 8 patches of, and Whisper 8 frames


class MaskedPatchEmbedding(BeatsPatchEmbedding):
    """In training, three quarters of the patches are replaced by a learned embedding; `masked` tells which."""

    def __init__(self, config: BeatsConfig):
        super().__init__(config)
        self.mask_embedding = nn.Parameter(0.02 * torch.randn(config.hidden_size))

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        patches = super().forward(fbank)
        if not self.training:
            return patches
        self.masked = torch.rand(patches.shape[:2]) < 0.75
        return torch.where(self.masked[..., None], self.mask_embedding, patches)


class RandomTokenizer(nn.Module):
    """The nearest of 1,024 random unit vectors to a random projection of each patch."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.register_buffer("projection", torch.randn(config.patch_size**2, 16))
        self.register_buffer("codebook", functional.normalize(torch.randn(1024, 16), dim=-1))

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, mel bins)` to `(batch, patches)`, in the order of [`BeatsModel`]."""
        patches = functional.unfold(fbank[:, None], self.patch_size, stride=self.patch_size).transpose(1, 2)
        patches = patches - patches.mean((1, 2), keepdim=True)
        return (functional.normalize(patches @ self.projection, dim=-1) @ self.codebook.T).argmax(-1)


def crops(clips: list[np.ndarray], batch_size: int, steps: int) -> torch.Tensor:
    """Batches of waveforms: 2.5 s from anywhere in random clips; shorter clips come again and again."""
    rng, samples = np.random.default_rng(0), 16 * STEP - STEP // 2
    for _ in range(steps):
        batch = []
        for index in rng.integers(len(clips), size=batch_size):
            clip = np.resize(clips[index], max(len(clips[index]), samples))
            start = rng.integers(len(clip) - samples + 1)
            batch.append(clip[start : start + samples])
        yield torch.from_numpy(np.stack(batch))


class MaskedPrediction(nn.Module):
    """BEATs that tells the tokens of the patches that it is not shown."""

    def __init__(self):
        super().__init__()
        self.beats = BeatsModel(SMALL_BEATS)
        self.beats.patch_embedding = MaskedPatchEmbedding(SMALL_BEATS)
        self.tokenizer, self.head = RandomTokenizer(SMALL_BEATS), nn.Linear(SMALL_BEATS.hidden_size, 1024)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        """`(batch, samples)` to the loss."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.beats(waveforms).last_hidden_state
            masked = self.beats.patch_embedding.masked
            tokens = self.tokenizer(self.beats.fbank(waveforms))
            return functional.cross_entropy(self.head(hidden[masked]).float(), tokens[masked])


class Distillation(nn.Module):
    """BEATs that tells what `whisper` makes of each 160 ms."""

    def __init__(self, whisper: "Whisper"):
        super().__init__()
        self.beats, self.whisper = BeatsModel(SMALL_BEATS), whisper
        self.head = nn.Linear(SMALL_BEATS.hidden_size, whisper.encoder.config.d_model)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        """`(batch, samples)` to the loss."""
        target = self.whisper.at_each_step(waveforms)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.beats(waveforms).last_hidden_state
            predicted = self.head(hidden.unflatten(1, (-1, 8)).mean(2)).float()
            return functional.mse_loss(predicted, target[:, : predicted.shape[1]])


def train_beats(task: nn.Module, clips: list[np.ndarray], arguments: argparse.Namespace) -> BeatsModel:
    parameters = list(task.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=arguments.steps, pct_start=0.1)
    task.train()
    for step, waveforms in enumerate(crops(clips, arguments.batch_size, arguments.steps)):
        loss = task(waveforms)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return task.beats.eval()


class Whisper:
    """All layers of Whisper's encoder over a clip's own length; what BEATs is distilled from is frozen."""

    def __init__(self, name: str, layers: list[int], clips: list[np.ndarray]):
        path = resolve_base_part(name)
        weights = WhisperModel.from_pretrained(path, dtype=torch.bfloat16).encoder.state_dict()
        config = WhisperConfig.from_pretrained(path)
        self.encoder = SalmonnWhisperEncoder(config).to(torch.bfloat16).eval()
        self.encoder.load_state_dict(weights)
        self.extractor, self.layers = SalmonnFeatureExtractor(config.num_mel_bins, tail_seconds=0.0), layers
        sample = torch.cat([self.frames(clip)[layers].mean(0) for clip in clips[:: max(len(clips) // 100, 1)]])
        self.mean, self.std = sample.mean(0), sample.std(0)

    @torch.inference_mode()
    def hidden_states(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        """Of waveforms of one length: float32 `(layers + 1, batch, frames, width)`, the embedding first."""
        features = self.extractor(waveforms, return_tensors="pt")
        encoded = self.encoder(
            features["input_features"].bfloat16(), features["input_features_mask"], output_hidden_states=True
        )
        return torch.stack(encoded.hidden_states).float()

    def frames(self, waveform: np.ndarray) -> torch.Tensor:
        return self.hidden_states([waveform])[:, 0]

    def at_each_step(self, waveforms: torch.Tensor) -> torch.Tensor:
        """`(batch, samples)` to standardised features, `(batch, steps of 160 ms, width)`."""
        states = self.hidden_states(list(waveforms.numpy()))[self.layers].mean(0)
        steps = states.shape[1] // 8
        return ((states[:, : 8 * steps].unflatten(1, (steps, 8)).mean(2) - self.mean) / self.std).clone()


@torch.inference_mode()
def beats_features(beats: BeatsModel, clip: np.ndarray) -> torch.Tensor:
    """The mean over time of all layers, one after the other; a clip too short for a patch comes several times."""
    clip = np.resize(clip, max(len(clip), STEP + 400))
    states = beats(torch.from_numpy(clip)[None], output_hidden_states=True).hidden_states
    return torch.cat([state[0].mean(0) for state in states])


def probe(train: torch.Tensor, test: torch.Tensor, y: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Accuracies of softmax regression and of the nearest training clip."""
    mean, std = train.mean(0), train.std(0) + 1e-5
    train, test = (train - mean) / std, (test - mean) / std
    torch.manual_seed(0)
    linear = nn.Linear(train.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(150):
        loss = functional.cross_entropy(linear(functional.dropout(train, 0.3)), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nearest = (functional.normalize(test, dim=-1) @ functional.normalize(train, dim=-1).T).argmax(-1)
    return {
        "regression": (linear(test).argmax(-1) == truth).float().mean().item(),
        "nearest": (y[nearest] == truth).float().mean().item(),
    }


def read_clips(files: list[str], *columns: str) -> tuple[list[np.ndarray], ...]:
    """Waveforms of 30 s at most, and what the columns hold, each as one list."""
    # One by one: files of different columns make no one dataset.
    tables = [parquet_rows([file], *columns) for file in files]
    waveforms = [load_audio(row["audio"])[: 30 * SAMPLING_RATE] for table in tables for row in table]
    return waveforms, *([value for table in tables for value in table[column]] for column in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, nargs="+", help="Parquet files")
    parser.add_argument("--test", required=True, nargs="+")
    parser.add_argument("--audio", nargs="*", default=[], help="more to pre-train BEATs on")
    parser.add_argument("--whisper", default="openai/whisper-base.en")
    parser.add_argument("--whisper_layers", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1500, help="of pre-training, default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()

    (train, names), (test, test_names) = read_clips(arguments.train, "label"), read_clips(arguments.test, "label")
    labels = {label: number for number, label in enumerate(sorted(set(names)))}
    y = torch.tensor([labels[name] for name in names])
    # A label that no training clip has is never told.
    truth = torch.tensor([labels.get(name, -1) for name in test_names])

    whisper = Whisper(arguments.whisper, arguments.whisper_layers, train)
    means = [torch.stack([whisper.frames(clip).mean(1) for clip in clips]) for clips in (train, test)]
    features = {f"Whisper, layer {layer}": [part[:, layer] for part in means] for layer in range(means[0].shape[1])}
    chosen = ", ".join(map(str, arguments.whisper_layers))
    features[f"Whisper, mean of layers {chosen}"] = [part[:, arguments.whisper_layers].mean(1) for part in means]
    audio = train + read_clips(arguments.audio)[0]
    hours = sum(map(len, audio)) / SAMPLING_RATE / 3600
    torch.manual_seed(0)
    for name, beats in (
        ("BEATs, not trained", BeatsModel(SMALL_BEATS).eval()),
        (f"BEATs, masked patches, {hours:.1f} h", train_beats(MaskedPrediction(), audio, arguments)),
        (f"BEATs, distilled from Whisper, {hours:.1f} h", train_beats(Distillation(whisper), audio, arguments)),
    ):
        features[name] = [torch.stack([beats_features(beats, clip) for clip in clips]) for clips in (train, test)]

    result = {name: probe(*parts, y, truth) for name, parts in features.items()}
    lines = ["| features | softmax regression | nearest clip |", "|---|---|---|"]
    lines += [f"| {name} | {row['regression']:.1%} | {row['nearest']:.1%} |" for name, row in result.items()]
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    write_atomically(
        arguments.output / "result.json", json.dumps({"settings": settings, "accuracy": result}, indent=2) + "\n"
    )
    write_atomically(arguments.output / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
