"""Windows of encoder frames: how many a clip has, and an MLP over the frames of one."""

import torch
from torch import nn


def num_windows(
    num_frames: int | torch.Tensor, window_frames: int, window_stride: int, keep_tail: bool = True
) -> int | torch.Tensor:
    """
    Windows that cover `num_frames` encoder frames, at least one: ceil(frames / window) where windows do not overlap;
    without the tail the complete ones alone, floor(frames / window).
    """
    steps = (num_frames - window_frames) * (num_frames > window_frames)  # never negative, for numbers as for tensors
    return (steps + (window_stride - 1 if keep_tail else 0)) // window_stride + 1


def dropout_mlp(input_size: int, hidden_size: int, output_size: int, dropout: float) -> nn.Sequential:
    """MLP with dropout, over the stacked frames of a window or what they have in common."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(input_size, hidden_size),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_size, output_size),
    )
