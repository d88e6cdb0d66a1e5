"""Kinds of sound: found in captions, named, told apart once fitted, and added to a model of speech alone."""

import pytest
import torch
from conftest import tiny_model
from test_sound_summary import sound_model
from test_whisper_projector import whisper_model

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.model.sound_summary import frame_statistics
from salmonn_hf.training.sound_kinds import (
    add_sound_summary,
    caption_directions,
    cluster,
    fit_sound_summary,
    most_typical,
)


def test_the_most_typical_caption_shares_most_with_the_others():
    captions = ["a dog barks", "a dog barks twice", "the dog barks", "a bell"]
    # mean F1 with the others: (6/7 + 2/3 + 2/5) / 3 of the first is the largest
    assert most_typical([caption.split() for caption in captions]) == 0
    assert most_typical([[1, 2], [3], [3, 4]]) == 1 and most_typical([[7, 7]]) == 0


def test_captions_that_say_the_same_are_a_cluster():
    embedding = sound_model().get_input_embeddings()
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
    monkeypatch.setattr("salmonn_hf.training.sound_kinds.FIT_STEPS", 150)
    model, generator = sound_model(), torch.Generator().manual_seed(0)
    torch.nn.init.zeros_(model.projector.sound_summary.marker)  # as in a new summary
    sounds = torch.randn(3, 2 * model.config.sound_hidden_size, generator=generator)

    def clips(count):
        return (sounds + 0.3 * torch.randn(count, *sounds.shape, generator=generator)).flatten(0, 1)

    # All clips of a kind are called the same; the last are speech alone.
    captions = [[[5, 6], [5, 8], [5, 6, 9, 10, 11]], [[20, 21]], []]
    fit_sound_summary(model, clips(40), captions * 40)
    names = model.projector.sound_summary.names
    with torch.no_grad():
        best = model.eval().projector.sound_summary.logits(clips(20)).argmax(-1)
    expected = torch.tensor([[5, 6, -1, -1], [20, 21, -1, -1], [-1] * 4]).repeat(20, 1)
    assert (names[best] == expected).all(-1).float().mean() > 0.9
    assert (names[0] == -1).all() and (best == 0).sum() > 0.9 * 20
    assert model.projector.sound_summary.marker.any()


def test_a_model_of_speech_alone_learns_sounds(monkeypatch, tmp_path):
    """First nothing changes; once fitted, clips of different sounds differ; saved and loaded it is the same."""
    monkeypatch.setattr("salmonn_hf.training.sound_kinds.FIT_STEPS", 150)
    model, generator = whisper_model(), torch.Generator().manual_seed(0)
    features, mask = torch.randn(2, 80, 300, generator=generator), torch.ones(2, 300)
    before = model.get_audio_features(features, mask).pooler_output
    add_sound_summary(model, [1], 8, 3)
    torch.testing.assert_close(model.eval().get_audio_features(features, mask).pooler_output, before)

    frames = model.encode_audio(features, mask)
    statistics = frame_statistics(frames["sound_frames"], frames["sound_frames_mask"]).detach()
    clips = statistics.repeat(20, 1) + 0.01 * torch.randn(40, statistics.shape[1], generator=generator)
    fit_sound_summary(model, clips, [[[5, 6]], [[20, 21, 22]]] * 20)
    model.projector.ctc_head.blank.bias.data.fill_(1e3)  # no window carries a word
    summary, embedding = model.projector.eval().sound_summary, model.get_input_embeddings()
    after = model.get_audio_features(features, mask).pooler_output.view(2, -1, 32)
    for embeds, name in zip(after, ([5, 6], [20, 21, 22]), strict=True):
        torch.testing.assert_close(embeds[: len(name)], embedding.weight[name] + summary.marker)

    model.save_pretrained(tmp_path)
    loaded = SalmonnForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.sound_layers == [1] and loaded.config.projector_config.sound_kinds == 3
    torch.testing.assert_close(loaded.get_audio_features(features, mask).pooler_output.view(2, -1, 32), after)


def test_a_summary_that_cannot_be_added():
    with pytest.raises(ValueError, match="layers, from 1 to 2"):
        add_sound_summary(whisper_model(), [3], 8, 5)
    with pytest.raises(ValueError, match="sounds need a summary"):
        add_sound_summary(whisper_model(), [1], 0, 5)
    with pytest.raises(ValueError, match="WindowQFormerProjector has no sound summary"):
        add_sound_summary(tiny_model(), [1], 8, 5)
