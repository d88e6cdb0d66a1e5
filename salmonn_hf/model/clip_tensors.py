"""The tensors of clips: their names, from features to what the encoders give, their masks, how a batch is padded."""

import torch
from torch.nn.utils.rnn import pad_sequence

FEATURES = ("input_features", "input_values")  # of clips; each has a mask
FRAMES = ("audio_frames", "sound_frames", "transcript_ids", "transcript_states")  # and what `encode_audio` gives


def with_masks(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of these tensors and of their masks."""
    return tuple(f"{name}{suffix}" for name in names for suffix in ("", "_mask"))


def pad_clips(clips: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Frames of clips as `SalmonnForConditionalGeneration.forward` takes them: right-padded, with their masks."""
    batch = {}
    for name in clips[0]:
        frames = [clip[name] for clip in clips]
        batch[name] = pad_sequence(frames, batch_first=True)
        ones = [torch.ones(len(clip), dtype=torch.bool, device=clip.device) for clip in frames]
        batch[f"{name}_mask"] = pad_sequence(ones, batch_first=True)
    return batch
