"""The filterbank against kaldi-native-fbank, against the reference's stored values, and its speed."""

import math
import time
from pathlib import Path

import pytest
import torch
from conftest import golden_path
from safetensors.torch import load_file

from salmonn_hf import load_audio
from salmonn_hf.model.fbank import kaldi_fbank, mel_filters, num_fbank_frames

STORED_MEAN, STORED_STD = 15.41663, 2 * 6.55582  # how the stored values are normalised
# In float32 and at the scale of 16-bit integers; the logarithm of a bin without energy.
SILENCE = math.log(2.0**-23)


def hertz_to_mel(hertz):
    return 1127 * math.log1p(hertz / 700)


def native_fbank(waveform, num_mel_bins=128, skip=0):
    """
    kaldi-native-fbank of one clip, from mel bin `skip` on. It refuses filters between two FFT bins, of which 128 mel
    bins have one (number 3); the bins above it are those of a bank that begins at their lower edge.
    """
    knf = pytest.importorskip("kaldi_native_fbank")
    lowest, highest = hertz_to_mel(20.0), hertz_to_mel(8000.0)
    lowest += skip * (highest - lowest) / (num_mel_bins + 1)
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = 16000
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = num_mel_bins - skip
    options.mel_opts.low_freq = 700 * math.expm1(lowest / 1127)
    options.mel_opts.high_freq = 0.0  # Nyquist
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(16000, (waveform * 2**15).numpy())
    fbank.input_finished()
    return torch.stack([torch.as_tensor(fbank.get_frame(i)) for i in range(fbank.num_frames_ready)])


def signals():
    """Clips of 2 s and less, float32 in [-1, 1]."""
    samples = 32000
    seconds = torch.arange(samples) / 16000
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    harmonics = sum(torch.sin(2 * math.pi * 120 * k * seconds + k) / k for k in range(1, 30))
    syllables = 0.5 + 0.5 * torch.sin(2 * math.pi * 4 * seconds)
    return {
        "noise": 0.1 * noise,
        # Without noise, the bins far from the tone hold nothing but the rounding of the Fourier transform.
        "chirp": 0.5 * torch.sin(2 * math.pi * (100 * seconds + 1800 * seconds**2)) + 1e-2 * noise,
        "near silence": (noise * 0.7).round() / 2**15,
        "offset": 0.5 + 0.01 * noise,
        "digital silence": torch.zeros(samples),
        "silence in noise": 0.1 * noise * (seconds < 1),
        "speech-like": 0.1 * harmonics * syllables + 1e-3 * noise,
        "very quiet": 1e-7 * noise,
        "clipped": (3 * noise).clamp(-1, 1),
        "impulses": 0.9 * (torch.arange(samples) % 1600 == 0).float(),
        "short": 0.1 * noise[:401],
    }


def recordings():
    """Real speech: four seconds of each recording that ships with the project."""
    files = sorted((Path(__file__).resolve().parents[2] / "eval" / "recordings").glob("*.flac"))
    return {file.stem: torch.from_numpy(load_audio(file))[: 4 * 16000] for file in files}


SIGNALS = signals() | recordings()
# Natural logarithm. Where a bin's energy is far below its frame's, kaldi's own float32 Fourier transform is off by so
# much, measured against float64.
KALDIS_ROUNDING = {"chirp": 3e-3, "jfk-inaugural": 4e-3, "librivox-austen-880": 2e-3}


@pytest.mark.parametrize("name", SIGNALS)
def test_fbank_is_that_of_float64(name):
    waveform = SIGNALS[name]
    torch.testing.assert_close(
        kaldi_fbank(waveform[None])[0], one_clip_fbank(waveform.double()), atol=5e-5, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("name", SIGNALS)
def test_fbank_is_kaldis(name):
    waveform = SIGNALS[name]
    ours = kaldi_fbank(waveform[None])[0]
    assert ours.shape == (num_fbank_frames(len(waveform)), 128) and ours.dtype == torch.float32
    tolerance = KALDIS_ROUNDING.get(name, 1e-3)
    torch.testing.assert_close(ours[:, 4:], native_fbank(waveform, skip=4), atol=tolerance, rtol=0)
    # The low bins as well, of a bank that has none empty.
    torch.testing.assert_close(kaldi_fbank(waveform[None], 80)[0], native_fbank(waveform, 80), atol=tolerance, rtol=0)


def test_floor():
    fbank = kaldi_fbank(torch.zeros(1, 800))
    torch.testing.assert_close(fbank, torch.full_like(fbank, SILENCE))
    # The filter that lies between two FFT bins stays at the floor whatever is heard.
    empty = (mel_filters(128).sum(0) == 0).nonzero().flatten()
    assert empty.tolist() == [3]
    loud = kaldi_fbank(signals()["clipped"][None])
    assert (loud[..., 3] == fbank[0, 0, 3]).all() and (loud[..., [2, 4]] > 0).all()


def test_fbank_is_the_stored_one():
    stored = load_file(golden_path("beats_golden.safetensors"))
    for clip, key, step in [(0, "fbank.0", 1), (1, "fbank.1", 1), (2, "fbank.2", 1), (3, "fbank_every4.3", 4)]:
        fbank = kaldi_fbank(stored[f"wav_pcm16.{clip}"][None] / 32768)[0, ::step]
        error = ((fbank - STORED_MEAN) / STORED_STD - stored[key]).abs()
        assert error.max() <= 3e-3 and error.mean() <= 5e-5


def test_a_clip_is_the_same_in_any_batch():
    clips = list(signals().values())
    batch = kaldi_fbank(torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=0.3))
    for clip, row in zip(clips, batch, strict=True):
        alone = kaldi_fbank(clip[None])[0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=0)


def test_precision_and_gradient():
    waveform = signals()["speech-like"][None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kaldi_fbank(waveform), kaldi_fbank(waveform.double()))
    assert not kaldi_fbank(waveform.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("samples, frames", [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (160000, 998)])
def test_num_frames(samples, frames):
    assert num_fbank_frames(samples) == frames
    assert num_fbank_frames(torch.tensor([samples])).tolist() == [frames]
    if frames:
        assert kaldi_fbank(torch.zeros(1, samples)).shape[1] == frames


def test_too_short():
    with pytest.raises(ValueError, match="399 samples"):
        kaldi_fbank(torch.zeros(1, 399))


def one_clip_fbank(waveform):
    """One clip as a plain port of kaldi goes about it, step by step over its frames, in the waveform's precision."""
    frames = (waveform * 2**15).unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.nn.functional.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]
    frames = frames * torch.hann_window(400, periodic=False, dtype=waveform.dtype).pow(0.85)
    power = torch.fft.rfft(torch.nn.functional.pad(frames, (0, 112))).abs().pow(2)
    edges = torch.linspace(hertz_to_mel(20.0), hertz_to_mel(8000.0), 130, dtype=waveform.dtype)
    mel = 1127 * torch.log(1 + torch.arange(257, dtype=waveform.dtype) * 31.25 / 700)[:, None]
    rising, falling = (mel - edges[:-2]) / edges.diff()[0], (edges[2:] - mel) / edges.diff()[0]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return torch.maximum(power @ filters, torch.tensor(torch.finfo(torch.float32).eps)).log()


def seconds_of_cpu(function, repetitions=5):
    def once():
        start = time.process_time()
        function()
        return time.process_time() - start

    return min(once() for _ in range(repetitions))


@pytest.mark.slow
def test_speed(capsys):
    """32 clips of 10 s: CPU time, which other processes do not change, against loops over the clips."""
    clips = 0.1 * torch.randn(32, 160000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one_clip_fbank(clips[0]), kaldi_fbank(clips[:1])[0], atol=1e-2, rtol=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batched = seconds_of_cpu(lambda: kaldi_fbank(clips))
        torch_loop = seconds_of_cpu(lambda: [one_clip_fbank(clip) for clip in clips])
        kaldi_loop = seconds_of_cpu(lambda: [native_fbank(clip, skip=4) for clip in clips], repetitions=1)
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print(f"\nbatched {batched:.3f} s, torch loop {torch_loop:.3f} s, kaldi-native-fbank loop {kaldi_loop:.3f} s")
    assert torch_loop > batched and kaldi_loop > 5 * batched
