"""The window Q-Former: its windows, by hand and as the processor counts them, and which frames reach which token."""

import numpy as np
import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor

from salmonn_hf.model.windows import num_windows


@pytest.mark.parametrize(("window", "stride", "queries"), [(17, 17, 1), (8, 8, 2), (8, 4, 1), (1, 1, 3)])
def test_audio_tokens_are_in_proportion_to_the_clip(window, stride, queries):
    config = tiny_config(window_frames=window, window_stride=stride, queries_per_window=queries)
    model, processor = tiny_model(config), tiny_processor(config)
    frames = torch.tensor([1, window, window + 1, 2 * window, 123])
    if stride == window:
        assert num_windows(frames, window, stride).tolist() == [-(-int(n) // window) for n in frames]
    mask = torch.arange(123) < frames[:, None]
    expected = [processor.num_audio_tokens(int(n)) for n in frames]
    assert model.projector.window_states(torch.randn(5, 123, 16), mask)[1].tolist() == expected
    for clip_seconds in (0.1, 1.0, 3.33):
        inputs = processor(text="<|audio|>", audio=noise(clip_seconds))
        embeds = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
        assert len(embeds) == (inputs["input_ids"] == 3).sum()


@pytest.mark.parametrize(("window", "stride"), [(17, 17), (8, 8), (12, 5)])
def test_original_geometry_drops_an_incomplete_window(window, stride):
    """The frames after the last complete window change nothing; model and processor count the windows alike."""
    config = tiny_config(window_frames=window, window_stride=stride, pad_to_30_seconds=True)
    model, processor = tiny_model(config), tiny_processor(config)
    processor.feature_extractor.pad_to_30_seconds = True
    frames, mask = torch.randn(2, 160, 16), torch.ones(2, 160, dtype=torch.bool)
    windows = (160 - window) // stride + 1
    changed = frames.clone()
    changed[:, (windows - 1) * stride + window :] += 1
    with torch.no_grad():
        embeds, num_tokens = model.projector.window_states(frames, mask)
        assert num_tokens.tolist() == [2 * windows] * 2 == [processor.num_audio_tokens(160)] * 2
        assert torch.equal(model.projector.window_states(changed, mask)[0], embeds)
        inputs = processor(text="<|audio|>", audio=noise(1.0))
        embeds = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    assert len(embeds) == (inputs["input_ids"] == 3).sum() == 2 * ((1500 - window) // stride + 1)


def test_every_frame_reaches_a_window():
    """The tail of a clip is encoded, too: changing its last frame changes the last audio token, and no other."""
    model = tiny_model(tiny_config(window_frames=17, window_stride=17, queries_per_window=1))
    frames = torch.randn(1, 40, 16)
    mask = torch.ones(1, 40, dtype=torch.bool)
    changed = frames.clone()
    changed[0, -1] = -changed[0, -1]
    with torch.no_grad():
        before, after = (model.projector.window_states(f, mask)[0] for f in (frames, changed))
    assert len(before) == 3
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2], after[2], atol=1e-4)


def test_frame_mlp_takes_each_query_its_own_frames():
    """With the Q-Former's projection silenced, a frame changes the one audio token that stands for it."""
    model = tiny_model(tiny_config(frame_mlp_size=12))  # windows of 8 frames, 2 queries: 4 frames each
    with torch.no_grad():
        model.projector.proj.weight.zero_()
    frames = torch.randn(1, 20, 16)
    changed = frames.clone()
    changed[0, 13] += torch.randn(16)
    mask = torch.ones(1, 20, dtype=torch.bool)
    with torch.no_grad():
        difference = model.projector.window_states(frames, mask)[0] - model.projector.window_states(changed, mask)[0]
    assert difference.abs().amax(-1).gt(1e-3).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("frame_mlp_size", [0, 12])
def test_padding_frames_have_no_influence(frame_mlp_size):
    projector = tiny_model(tiny_config(frame_mlp_size=frame_mlp_size)).projector
    frames = torch.randn(2, 50, 16)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 21:] = False
    garbage = frames.clone()
    garbage[1, 21:] = 1e3
    with torch.no_grad():
        assert torch.equal(projector.window_states(frames, mask)[0], projector.window_states(garbage, mask)[0])


def test_position_of_audio_in_time_matters():
    """A reversed clip must not give the same logits: the window positions tell frames apart."""
    model, processor = tiny_model(), tiny_processor()
    clip = noise(1.0) * np.linspace(0, 1, 16000, dtype=np.float32)
    forwards, backwards = (model(**processor.apply_transcription_request(c)).logits for c in (clip, clip[::-1].copy()))
    assert not torch.allclose(forwards, backwards, atol=1e-3)


def test_the_projection_starts_at_the_mean_and_spread_of_the_token_embeddings():
    model = tiny_model()
    embedding = model.get_input_embeddings()
    model.projector.initialize(embedding)
    rows, norm = embedding.weight, model.projector.proj_norm
    torch.testing.assert_close(norm.bias, rows.mean(0))
    torch.testing.assert_close(norm.weight, rows.std(0).mean().expand(32))
