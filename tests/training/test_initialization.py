"""What a new model starts from."""

import torch
from conftest import tiny_model

from salmonn_hf.training.initialization import standardise_frames


def test_standardised_frames_have_mean_0_and_variance_1():
    model = tiny_model()
    frames = [torch.randn(50, 16) * torch.linspace(0.1, 10, 16) + torch.arange(16) for _ in range(20)]

    class Clips(list):
        cache = None

    model.projector.sound_norm = torch.nn.LayerNorm(16)
    examples = [{"clip": {"audio_frames": clip, "sound_frames": 3 * clip.roll(5, 1)}} for clip in frames]
    standardise_frames(model, Clips(examples))
    sound = model.projector.sound_norm(torch.cat([example["clip"]["sound_frames"] for example in examples]))
    torch.testing.assert_close(sound.std(0), torch.ones(16), atol=1e-3, rtol=0)
    normed = model.projector.audio_norm(torch.cat(frames))
    torch.testing.assert_close(normed.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.std(0), torch.ones(16), atol=1e-3, rtol=0)
