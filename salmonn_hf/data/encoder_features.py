"""Encoder features: the frames that the encoders compute for clips, padded to batches."""

import torch

from ..model.clip_tensors import FRAMES, pad_clips
from ..model.whisper_decoder_projector import TEXT_FRAMES
from .feature_cache import FeatureCache


def num_frames(clip: dict) -> int:
    """Frames of the speech encoder (20 ms each) that a clip has, or will have."""
    if "text_ids" in clip:
        return TEXT_FRAMES * (len(clip["text_ids"]) + 1)
    if "audio_frames" in clip:
        return len(clip["audio_frames"])
    return (clip["input_features"].shape[-1] + 1) // 2


@torch.no_grad()
def encode_clips(model, clips: list[dict], cache: FeatureCache | None = None) -> list[dict[str, torch.Tensor]]:
    """
    The frames of each clip, without padding: `{"audio_frames": (frames, width)}`, with a sound encoder also
    `"sound_frames"`, and what else the model's `encode_audio` gives.

    Clips that have them already are passed on. On a CPU the others are encoded one at a time, for their frames to be
    the same to the last bit in any batch, which costs nothing. Elsewhere they are one batch, and so they are where the
    projector transcribes them token by token.

    Args:
        model ([`SalmonnModel`]): its encoders, in the precision that they have.
        clips: as `ClipDataset` gives them: what this function gave, from its cache; `text_ids` `(tokens,)`; or
            `input_features` `(mel bins, mel frames)` (and `input_values` `(samples,)`), with `key` if the result is to
            go to `cache`.
    """
    device = model.audio_tower.device
    # LoRA in training is in float32, beside frozen weights in bfloat16.
    mixed = len({parameter.dtype for parameter in model.audio_tower.parameters()}) > 1
    encoded = [
        model.projector.text_frames(clip["text_ids"].to(device))
        if "text_ids" in clip
        else {name: clip[name].to(device) for name in FRAMES if name in clip}
        for clip in clips
    ]
    missing = [index for index, clip in enumerate(encoded) if not clip]
    if not missing:
        return encoded
    in_batch = device.type != "cpu" or model.projector.transcribing_parameters
    for group in [missing] if in_batch else [[index] for index in missing]:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            outputs = model.encode_audio(**pad_features([clips[index] for index in group], device))
        for row, index in enumerate(group):
            lengths = {name: int(outputs[f"{name}_mask"][row].sum()) for name in FRAMES if name in outputs}
            encoded[index] = {name: outputs[name][row, :length] for name, length in lengths.items()}
            if cache is not None and "key" in clips[index]:
                cache.put(clips[index]["key"], encoded[index])
    return encoded


def pad_features(clips: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """Features of clips as `SalmonnModel.encode_audio` takes them: right-padded, with their masks."""
    names = [name for name in ("input_features", "input_values") if name in clips[0]]
    # Time is the last axis of both.
    batch = pad_clips([{name: clip[name].to(device).movedim(-1, 0) for name in names} for clip in clips])
    return {name: value.long() if name.endswith("_mask") else value.movedim(1, -1) for name, value in batch.items()}


def trains_encoder(model) -> bool:
    """Whether the speech encoder is trained, by LoRA: its frames then cannot be cached."""
    return any(parameter.requires_grad for parameter in model.audio_tower.parameters())
