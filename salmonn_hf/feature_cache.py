"""Encoder features computed once and kept on disk: the frozen encoder runs once per clip, not once per epoch."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from .audio import load_audio

# What the features depend on; how the extractor was loaded must not change their name.
FEATURE_SETTINGS = (
    "feature_size",
    "sampling_rate",
    "n_fft",
    "hop_length",
    "dither",
    "tail_seconds",
    "pad_to_30_seconds",
)


def cache_key(clips, encoder_name: str, feature_extractor) -> str:
    """A name for the features of these clips by this encoder: other audio or settings, another name."""
    settings = {name: getattr(feature_extractor, name) for name in FEATURE_SETTINGS}
    digest = hashlib.sha256(json.dumps([encoder_name, settings], sort_keys=True).encode())
    for clip in clips:
        digest.update(hashlib.sha256(clip["bytes"] or Path(clip["path"]).read_bytes()).digest())
    return digest.hexdigest()[:24]


class FeatureCache:
    """
    The frames of a list of clips in one flat memory-mapped file: `cache[i]` is a bfloat16 tensor of shape (frames,
    width) on the CPU.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self.offsets = np.load(directory / "offsets.npy")
        width = json.loads((directory / "meta.json").read_text())["width"]
        # bfloat16 has no numpy type: its bits are kept as int16.
        self.frames = np.memmap(directory / "frames.bin", dtype=np.int16, mode="r").reshape(-1, width)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        frames = np.array(self.frames[self.offsets[index] : self.offsets[index + 1]])
        return torch.from_numpy(frames).view(torch.bfloat16)

    @property
    def lengths(self) -> np.ndarray:
        """Encoder frames of each clip."""
        return np.diff(self.offsets)


@torch.inference_mode()
def build_feature_cache(
    clips, model, feature_extractor, root: str | Path, batch_seconds: float = 120.0
) -> FeatureCache:
    """
    The cache of `clips` under `root`, computed now if it is not there yet.

    Args:
        clips: a `datasets` audio column read with `Audio(decode=False)`: items of `{"bytes", "path"}`.
        model ([`SalmonnModel`]): its encoder, in the precision that it has.
        batch_seconds: padded audio that is encoded at a time.

    Raises:
        AudioError: for a clip that cannot be read, naming it. Nothing is left half-written.
    """
    from tqdm import tqdm

    encoder_name = (
        f"{(model.config.base_parts or {}).get('audio_tower', model.name_or_path)} {model.audio_tower.dtype}"
    )
    target = Path(root) / cache_key(clips, encoder_name, feature_extractor)
    if target.exists():
        return FeatureCache(target)
    Path(root).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root, prefix=".partial-"))
    try:
        offsets = [0]
        with (
            open(work / "frames.bin", "wb") as file,
            tqdm(total=len(clips), desc="encoding clips", unit="clip") as bar,
        ):
            for batch in audio_batches(clips, batch_seconds):
                features = feature_extractor(batch, return_tensors="pt", device=str(model.device)).to(model.device)
                encoded = model.encode_audio(**features)
                for frames, mask in zip(encoded["audio_frames"], encoded["audio_frames_mask"], strict=True):
                    frames = frames[: int(mask.sum())].to("cpu", torch.bfloat16).contiguous()
                    file.write(frames.view(torch.int16).numpy().tobytes())
                    offsets.append(offsets[-1] + len(frames))
                bar.update(len(batch))
        np.save(work / "offsets.npy", np.array(offsets))
        (work / "meta.json").write_text(json.dumps({"width": frames.shape[1], "encoder": encoder_name}))
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return FeatureCache(target)


def audio_batches(clips, batch_seconds: float):
    """Decoded clips in order, in batches of at most `batch_seconds` once padded to their longest."""
    batch = []
    for clip in clips:
        waveform = load_audio(clip)
        longest = max([len(waveform)] + [len(other) for other in batch])
        if batch and longest * (len(batch) + 1) > batch_seconds * 16000:
            yield batch
            batch = []
        batch.append(waveform)
    if batch:
        yield batch
