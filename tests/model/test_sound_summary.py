"""What a whole clip sounds like: names of kinds by hand, in batches, and in the model."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_whisper_projector import frames_of, whisper_model

from salmonn_hf.model.sound_summary import frame_statistics

NAMES = [[], [5, 6, 7], [9], [11, 12, 13, 14], []]


SOUNDS = {"sound_layers": [1, 2], "sound_summary_size": 8, "sound_kinds": 5, "sound_name_size": 4}


def sound_model(seed=0, **changes):
    model = whisper_model(seed, **SOUNDS | changes)
    summary = model.projector.sound_summary
    for kind, name in enumerate(NAMES):
        summary.names[kind, : len(name)] = torch.tensor(name, dtype=torch.int32)
    torch.nn.init.normal_(summary.marker)
    return model


def let_kinds_be(monkeypatch, model, kinds):
    """Let the clips of `model` be of these kinds, whatever they sound like."""
    chosen = torch.nn.functional.one_hot(torch.tensor(kinds), len(NAMES)).float()
    monkeypatch.setattr(model.projector.sound_summary, "logits", lambda statistics: chosen)


def test_statistics_are_of_a_clips_own_frames():
    frames, mask = torch.randn(3, 20, 5), torch.arange(20) < torch.tensor([20, 1, 7])[:, None]
    frames[~mask] = 1e4
    for clip, own, statistics in zip(frames, mask, frame_statistics(frames, mask), strict=True):
        own = clip[own].double().numpy()
        expected = np.concatenate([own.mean(0), own.std(0)])
        torch.testing.assert_close(statistics.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_a_clips_first_windows_carry_the_name_of_its_kind(monkeypatch):
    """A token each; in clips that have fewer windows than the name has tokens, the mean of several."""
    model = sound_model()
    let_kinds_be(monkeypatch, model, [1, 0, 3, 3, 2])
    embedding, marker = model.get_input_embeddings(), model.projector.sound_summary.marker
    frames, lengths = torch.zeros(5, 1, 16), torch.tensor([5, 2, 3, 1, 1])
    carried = model.projector.sound_summary(frames, frames[..., 0] == 0, lengths, embedding).split(lengths.tolist())
    expected = [[[5], [6], [7], None, None], [None, None], [[11, 12], [13], [14]], [[11, 12, 13, 14]], [[9]]]
    for clip, tokens in zip(carried, expected, strict=True):
        for window, name in zip(clip, tokens, strict=True):
            mean = torch.zeros_like(marker) if name is None else embedding.weight[name].mean(0) + marker
            torch.testing.assert_close(window, mean)


def embeds_of(model, frames, mask, sounds=None):
    """Embeddings before any is merged, and which are audio tokens."""
    states, num_states = model.projector.window_states(frames, mask)
    sound = (None, None) if sounds is None else (sounds, mask)
    return model.projector.embed(states, num_states, model.get_input_embeddings(), *sound)


def test_every_clip_carries_its_own_name():
    """Of its own sound frames, whatever else is in the batch; the states, which words come from, do without."""
    model, lengths = sound_model(), [41, 3, 17]
    frames, mask = frames_of(model, lengths)
    sounds, embedding = torch.randn_like(frames), model.get_input_embeddings()
    output = model.projector(frames, mask, embedding, sounds, mask)
    without = model.projector(frames, mask, embedding)
    assert torch.equal(output.states, without.states)
    assert not torch.allclose(output.embeds, without.embeds, atol=1e-3)
    summaries, summary = [], model.projector.sound_summary
    summary.register_forward_hook(lambda module, args, output: summaries.append(output))
    model.projector(frames, mask, embedding, sounds, mask)
    for clip, length, own in zip(sounds, lengths, summaries[0].split(output.num_states.tolist()), strict=True):
        alone = summary(clip[None, :length], mask.new_ones(1, length), torch.tensor([len(own)]), embedding)
        torch.testing.assert_close(own, alone)


def test_the_embeddings_reach_the_marker(monkeypatch):
    model = sound_model()
    let_kinds_be(monkeypatch, model, [1])
    frames, mask = frames_of(model, [20])
    embeds_of(model, frames, mask, torch.randn_like(frames))[0].sum().backward()
    summary = model.projector.sound_summary
    assert summary.marker.grad.any() and all(p.grad is None for p in summary.mlp.parameters())


def test_a_name_stands_where_no_word_does():
    """It takes the place of what windows without a word carry else; windows with a part of it are not merged."""
    model = sound_model()
    projector, embedding = model.projector, model.get_input_embeddings()
    states, _ = projector.window_states(*frames_of(model, [41]))
    name = torch.randn(model.config.text_config.hidden_size)
    in_name = torch.arange(len(states)) < 3
    head, tokens = projector.ctc_head, projector.speech_tokens
    embeds, wordless = head.embed(states, None, tokens, embedding)
    changed, changed_wordless = head.embed(states, in_name[:, None] * name, tokens, embedding)
    difference = head(states, tokens)[:, :1].exp() * (name - head.proj(states))
    torch.testing.assert_close(changed - embeds, in_name[:, None] * difference, atol=1e-5, rtol=1e-4)
    assert torch.equal(changed_wordless, wordless & ~in_name)


def test_clips_without_a_name_are_those_of_a_model_of_words_alone(monkeypatch):
    model = sound_model(merged_windows=3)
    frames, mask = frames_of(model, [41, 20])
    let_kinds_be(monkeypatch, model, [0, 0])
    for one, other in zip(
        embeds_of(model, frames, mask, torch.randn_like(frames)), embeds_of(model, frames, mask), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_fresh_summary_has_no_names():
    """Where base parts alone come from files, the memory of the rest is not zeroed."""
    projector = sound_model().projector
    assert projector.sound_summary.marker.any()
    projector._init_weights(projector.sound_summary)
    assert (projector.sound_summary.names == -1).all() and not projector.sound_summary.marker.any()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sound_summary_size": 8}, "sound_summary_size is 8 and sound frames have 0 features"),
        ({"sound_layers": [1]}, "sound_summary_size is 0 and sound frames have 16 features"),
    ],
)
def test_a_summary_that_does_not_fit(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(num_layers=1, **changes)
