"""Windows of encoder frames: how many a clip has, and the MLP over the frames of one."""

import torch
from torch import nn

from .configuration_salmonn import SalmonnConfig


def num_windows(
    num_frames: int | torch.Tensor, window_frames: int, window_stride: int, keep_tail: bool = True
) -> int | torch.Tensor:
    """
    Windows that cover `num_frames` encoder frames, at least one: ceil(frames / window) where windows do not overlap;
    without the tail the whole ones alone, floor(frames / window).
    """
    steps = (num_frames - window_frames) * (num_frames > window_frames)  # never negative, for numbers as for tensors
    return (steps + (window_stride - 1 if keep_tail else 0)) // window_stride + 1


def frame_mlp(config: SalmonnConfig, num_frames: int, output_size: int) -> nn.Sequential:
    """MLP with dropout from `num_frames` stacked frames of the joined encoders to `output_size` features."""
    dropout = config.qformer_config.hidden_dropout_prob
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(num_frames * config.qformer_config.encoder_hidden_size, config.frame_mlp_size),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(config.frame_mlp_size, output_size),
    )
