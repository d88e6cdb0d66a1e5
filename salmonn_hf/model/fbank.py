"""Kaldi's log-mel filterbank, for a batch of waveforms at once."""

import functools
import math

import torch

SAMPLING_RATE = 16_000
FRAME_SAMPLES = 400  # 25 ms
SHIFT_SAMPLES = 160  # 10 ms
FFT_SAMPLES = 512
LOWEST_HERTZ = 20.0
PREEMPHASIS = torch.tensor(0.97).item()  # as float32 has it, so that what it leaves of a mean is exact
FLOOR = torch.finfo(torch.float32).eps  # of an energy, before the logarithm


def num_fbank_frames(samples: torch.Tensor | int) -> torch.Tensor | int:
    """Whole frames in `samples` samples; 0 if there are fewer than 400."""
    frames = (samples - FRAME_SAMPLES) // SHIFT_SAMPLES + 1
    return frames.clamp(min=0) if isinstance(frames, torch.Tensor) else max(frames, 0)


@functools.cache
def mel_filters(num_mel_bins: int) -> torch.Tensor:
    """Triangles of equal width on the mel scale 1127·ln(1 + f/700), from 20 Hz to 8 kHz: `(FFT bins, mel bins)`."""
    lowest, highest = (1127 * math.log1p(hertz / 700) for hertz in (LOWEST_HERTZ, SAMPLING_RATE / 2))
    edges = torch.linspace(lowest, highest, num_mel_bins + 2, dtype=torch.float64)
    hertz = torch.arange(FFT_SAMPLES // 2 + 1, dtype=torch.float64) * SAMPLING_RATE / FFT_SAMPLES
    position = ((1127 * torch.log1p(hertz / 700))[:, None] - edges) / (edges[1] - edges[0])
    return torch.minimum(position[:, :-2], -position[:, 2:]).clamp(min=0)


@functools.cache
def mel_bands(num_mel_bins: int, device: torch.device) -> list[tuple[slice, slice, torch.Tensor]]:
    """
    `mel_filters` cut into groups of 16 mel bins, each with the few FFT bins that it takes from: a product with the
    whole, which is nearly all zeros, would cost more than the Fourier transform. Every FFT bin counts twice, for the
    squares of its real and its imaginary part.
    """
    filters = mel_filters(num_mel_bins).repeat_interleave(2, 0)
    bands = []
    for first in range(0, num_mel_bins, 16):
        mel_bins = slice(first, min(first + 16, num_mel_bins))
        used = filters[:, mel_bins].any(1).nonzero()
        parts = slice(int(used.min()), int(used.max()) + 1)
        bands.append((mel_bins, parts, filters[parts, mel_bins].to(device, torch.float32).contiguous()))
    return bands


@functools.cache
def povey_window(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Kaldi's default window, a Hann window to the power of 0.85. Its ends are 0."""
    return torch.hann_window(FRAME_SAMPLES, periodic=False, dtype=torch.float64).pow(0.85).to(device, dtype)


def kaldi_fbank(waveforms: torch.Tensor, num_mel_bins: int = 128) -> torch.Tensor:
    r"""
    Log-mel energies as kaldi's `compute-fbank-feats --dither=0` has them, for waveforms at the scale of 16-bit
    integers: 25 ms frames every 10 ms, each without its mean, pre-emphasised by 0.97 and under a povey window; the
    power spectrum of 512 points; the natural logarithm of the mel energies, floored at float32's epsilon
    (kaldi, feat/feature-fbank.cc, feature-window.cc and mel-computations.cc).

    Args:
        waveforms (`torch.Tensor` of shape `(batch, samples)`): at 16 kHz, in [-1, 1], any floating dtype and device.
        num_mel_bins (`int`).

    Returns:
        float32 of shape `(batch, 1 + (samples - 400) // 160, num_mel_bins)`. A frame that lies within a clip is the
        same whatever follows the clip, and whatever is beside it in the batch.

    Raises:
        ValueError: for fewer than 400 samples.
    """
    if waveforms.shape[-1] < FRAME_SAMPLES:
        raise ValueError(f"{waveforms.shape[-1]} samples are less than one frame of {FRAME_SAMPLES} (25 ms).")
    # In float32 the rounding of a loud part would show in quiet bins, by up to 3e-3 in speech. Apple's GPUs have no
    # float64.
    dtype = torch.float32 if waveforms.device.type == "mps" else torch.float64
    with torch.no_grad(), torch.autocast(waveforms.device.type, enabled=False):
        frames = num_fbank_frames(waveforms.shape[-1])
        # One clip after the other stays in a CPU's cache; a GPU is faster with all of them at once.
        step = 1 if waveforms.device.type == "cpu" else len(waveforms)
        log_mel = waveforms.new_empty(len(waveforms), frames, num_mel_bins, dtype=torch.float32)
        padded = waveforms.new_zeros(step, frames, FFT_SAMPLES, dtype=dtype)
        for clips, log_energies in zip(waveforms.split(step), log_mel.split(step), strict=True):
            windowed_frames(clips.to(dtype) * 2**15, out=padded[..., :FRAME_SAMPLES])
            squares = torch.view_as_real(torch.fft.rfft(padded)).square_().float().flatten(0, 1).flatten(1)
            for mel_bins, parts, filters in mel_bands(num_mel_bins, waveforms.device):
                torch.mm(squares[:, parts], filters, out=log_energies.flatten(0, 1)[:, mel_bins])
            log_energies.clamp_(min=FLOOR).log_()
    return log_mel


def windowed_frames(waveforms: torch.Tensor, out: torch.Tensor):
    """The frames of `(batch, samples)` without their mean, pre-emphasised and windowed, to `(batch, frames, 400)`."""
    # The mean of a frame, from sums over its five blocks of 80 samples.
    block = math.gcd(FRAME_SAMPLES, SHIFT_SAMPLES)
    blocks = waveforms[:, : waveforms.shape[-1] // block * block].unflatten(-1, (-1, block)).sum(-1)
    means = blocks.unfold(-1, FRAME_SAMPLES // block, SHIFT_SAMPLES // block).sum(-1) / FRAME_SAMPLES
    # Pre-emphasis of x - mean is that of x, less 1 - 0.97 of the mean. The first sample of a frame, for which kaldi
    # has a rule of its own, does not matter: the window is 0 there.
    emphasised = torch.zeros_like(waveforms)
    torch.sub(waveforms[:, 1:], waveforms[:, :-1], alpha=PREEMPHASIS, out=emphasised[:, 1:])
    frames = emphasised.unfold(-1, FRAME_SAMPLES, SHIFT_SAMPLES)
    torch.sub(frames, means[..., None], alpha=1 - PREEMPHASIS, out=out)
    out *= povey_window(waveforms.device, waveforms.dtype)
