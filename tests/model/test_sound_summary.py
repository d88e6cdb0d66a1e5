"""What a whole clip sounds like: names of kinds by hand, in batches, in the model, and fitted to captions."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_clip_dataset import dataset, table
from test_speech_decoder import decoder_config, decoder_model, frames_of

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.data.clip_dataset import StreamedClips
from salmonn_hf.model.sound_summary import (
    caption_directions,
    cluster,
    fit_sound_summary,
    frame_statistics,
    most_typical,
)
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.initialization import start_sound_summary

NAMES = [[], [5, 6, 7], [9], [11, 12, 13, 14], []]


def hearing_model(seed=0, **changes):
    sounds = {"sound_layers": [1, 2], "sound_summary_size": 8, "sound_kinds": 5, "sound_name_size": 4}
    model = tiny_model(decoder_config(**sounds | changes), seed).eval()
    for kind, name in enumerate(NAMES):
        model.sound_summary.names[kind, : len(name)] = torch.tensor(name, dtype=torch.int32)
    torch.nn.init.normal_(model.sound_summary.marker)
    return model


def heard_as(monkeypatch, model, kinds):
    """Let the clips of `model` be of these kinds, whatever is heard."""
    chosen = torch.nn.functional.one_hot(torch.tensor(kinds), len(NAMES)).float()
    monkeypatch.setattr(model.sound_summary, "logits", lambda statistics: chosen)


def test_statistics_are_of_a_clips_own_frames():
    frames, mask = torch.randn(3, 20, 5), torch.arange(20) < torch.tensor([20, 1, 7])[:, None]
    frames[~mask] = 1e4
    for clip, own, statistics in zip(frames, mask, frame_statistics(frames, mask), strict=True):
        own = clip[own].double().numpy()
        expected = np.concatenate([own.mean(0), own.std(0)])
        torch.testing.assert_close(statistics.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_a_clips_first_windows_carry_the_name_of_its_kind(monkeypatch):
    """A token each; in clips that have fewer windows than the name has tokens, the mean of several."""
    model = hearing_model()
    heard_as(monkeypatch, model, [1, 0, 3, 3, 2])
    embedding, marker = model.get_input_embeddings(), model.sound_summary.marker
    frames, lengths = torch.zeros(5, 1, 16), torch.tensor([5, 2, 3, 1, 1])
    carried = model.sound_summary(frames, frames[..., 0] == 0, lengths, embedding).split(lengths.tolist())
    expected = [[[5], [6], [7], None, None], [None, None], [[11, 12], [13], [14]], [[11, 12, 13, 14]], [[9]]]
    for clip, tokens in zip(carried, expected, strict=True):
        for window, name in zip(clip, tokens, strict=True):
            mean = torch.zeros_like(marker) if name is None else embedding.weight[name].mean(0) + marker
            torch.testing.assert_close(window, mean)


def test_every_window_carries_its_own_clips_name():
    model, lengths = hearing_model(), [41, 3, 17]
    frames, mask = frames_of(model, lengths)
    sounds, width = torch.randn_like(frames), model.config.audio_config.d_model
    states, counts = model.connect_audio(frames, mask, sounds, mask)
    words, _ = model.connect_audio(frames, mask)
    torch.testing.assert_close(states[:, :width], words)
    embedding = model.get_input_embeddings()
    for clip, length, own in zip(sounds, lengths, states.split(counts.tolist()), strict=True):
        of_clip = clip[None, :length], mask.new_ones(1, length), torch.tensor([len(own)])
        torch.testing.assert_close(own[:, width:], model.sound_summary(*of_clip, embedding))


def test_the_language_models_loss_reaches_the_marker_alone(monkeypatch):
    model = hearing_model()
    freeze_base_parts(model)
    heard_as(monkeypatch, model, [1])
    frames, mask = frames_of(model, [20])
    states, counts = model.connect_audio(frames, mask, torch.randn_like(frames), mask)
    model.embed_audio(states, counts)[0].sum().backward()
    summary = model.sound_summary
    assert summary.marker.grad.any() and not any(p.requires_grad for p in summary.mlp.parameters())


def test_a_name_stands_where_no_word_does():
    """It takes the place of what windows without a word carry else, and the CTC head does not see it."""
    model = hearing_model()
    states, _ = model.connect_audio(*frames_of(model, [41]))
    name = torch.randn(model.config.text_config.hidden_size)
    named = torch.arange(len(states)) < 3
    both, embedding = torch.cat([states, named[:, None] * name], -1), model.get_input_embeddings()
    log_probs = model.ctc_head(both, model.speech_tokens)
    torch.testing.assert_close(log_probs, model.ctc_head(states, model.speech_tokens))
    embeds, wordless = model.ctc_head.embed(states, model.speech_tokens, embedding)
    changed, changed_wordless = model.ctc_head.embed(both, model.speech_tokens, embedding)
    difference = log_probs[:, :1].exp() * (name - model.ctc_head.proj(states))
    torch.testing.assert_close(changed - embeds, named[:, None] * difference, atol=1e-5, rtol=1e-4)
    assert torch.equal(changed_wordless, wordless & ~named)  # windows with a name are not merged


def test_clips_without_a_name_are_heard_as_by_a_model_of_words_alone(monkeypatch):
    model = hearing_model()
    frames, mask = frames_of(model, [41, 20])
    heard_as(monkeypatch, model, [0, 0])
    with_sounds = model.embed_audio(*model.connect_audio(frames, mask, torch.randn_like(frames), mask))
    alone = model.embed_audio(*model.connect_audio(frames, mask))
    for one, other in zip(with_sounds, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_the_most_typical_caption_shares_most_with_the_others():
    captions = ["a dog barks", "a dog barks twice", "the dog barks", "a bell"]
    # mean F1 with the others: (6/7 + 2/3 + 2/5) / 3 of the first is the largest
    assert most_typical([caption.split() for caption in captions]) == 0
    assert most_typical([[1, 2], [3], [3, 4]]) == 1 and most_typical([[7, 7]]) == 0


def test_captions_that_say_the_same_are_a_cluster():
    embedding = hearing_model().get_input_embeddings()
    captions = [[[5, 6, 7], [5, 8, 7]], [[20, 21, 7]], [[30, 6, 7]]]  # 7 is in all of them, and tells nothing
    directions = caption_directions(embedding, captions * 6)
    rows = embedding.weight - embedding.weight.mean(0)
    rows, rare = torch.nn.functional.normalize(rows, dim=-1), torch.tensor(19 / 6).log()
    by_hand = (
        rare * (2 * rows[5] + rows[8])
        + torch.tensor(19 / 12).log() * rows[6]
        + 2 * torch.tensor(19 / 18).log() * rows[7]
    )
    torch.testing.assert_close(directions[0], by_hand / by_hand.norm(), atol=1e-5, rtol=1e-4)
    clusters, centres = cluster(directions, 3, torch.Generator().manual_seed(0))
    assert clusters.tolist() == clusters[:3].tolist() * 6 and len(set(clusters.tolist())) == 3
    torch.testing.assert_close(centres[clusters], directions)
    more, centres = cluster(directions, 5, torch.Generator().manual_seed(0))  # more than there is to tell apart
    assert len(set(more.tolist())) <= 5 and torch.isfinite(centres).all()


def test_fitted_it_tells_new_clips_apart(monkeypatch):
    monkeypatch.setattr("salmonn_hf.model.sound_summary.FIT_STEPS", 150)
    model, generator = hearing_model(), torch.Generator().manual_seed(0)
    heard = torch.randn(3, 2 * model.config.sound_width, generator=generator)

    def clips(count):
        return (heard + 0.3 * torch.randn(count, *heard.shape, generator=generator)).flatten(0, 1)

    # All clips of a kind are called the same; of the last, nothing is heard but speech.
    captions = [[[5, 6], [5, 8], [5, 6, 9, 10, 11]], [[20, 21]], []]
    fit_sound_summary(model, clips(40), captions * 40)
    names = model.sound_summary.names
    with torch.no_grad():
        best = model.eval().sound_summary.logits(clips(20)).argmax(-1)
    expected = torch.tensor([[5, 6, -1, -1], [20, 21, -1, -1], [-1] * 4]).repeat(20, 1)
    assert (names[best] == expected).all(-1).float().mean() > 0.9
    assert (names[0] == -1).all() and (best == 0).sum() > 0.9 * 20
    assert model.sound_summary.marker.any()


def test_a_model_that_hears_words_alone_learns_to_hear_sounds(tmp_path):
    model = decoder_model()
    model.add_sound_summary([1], 8, 5)
    features, mask = torch.randn(2, 80, 300), torch.ones(2, 300)
    before = model.eval().get_audio_features(features, mask).pooler_output
    model.save_pretrained(tmp_path)
    loaded = SalmonnForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.sound_layers == [1] and loaded.config.sound_kinds == 5
    torch.testing.assert_close(loaded.get_audio_features(features, mask).pooler_output, before)


def test_without_captions_at_hand_training_says_what_it_needs():
    for data in (dataset(table(2)), StreamedClips(dataset(), [])):
        with pytest.raises(ValueError, match="a caption task without streaming"):
            start_sound_summary(hearing_model(), data, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sound_summary_size": 8}, "sound_summary_size is 8, sound frames have 0 features"),
        ({"sound_layers": [1]}, "sound_summary_size is 0, sound frames have 16 features"),
        ({"sound_layers": [1], "sound_summary_size": 8, "speech_decoder_layers": 0}, "speech_decoder_layers is 0"),
    ],
)
def test_a_summary_that_does_not_fit(changes, named):
    with pytest.raises(ValueError, match=named):
        decoder_config(**changes)
