"""What a whole clip sounds like: kinds of sound by hand, in batches, in the model, and fitted to captions."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_clip_dataset import dataset, table
from test_speech_decoder import decoder_config, decoder_model, frames_of

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.clip_dataset import StreamedClips
from salmonn_hf.sound_summary import caption_directions, cluster, fit_sound_summary, frame_statistics
from salmonn_hf.training import freeze_base_parts, start_sound_summary


def hearing_model(seed=0):
    return tiny_model(decoder_config(sound_layers=[1, 2], sound_summary_size=8, sound_kinds=5), seed).eval()


def test_statistics_are_of_a_clips_own_frames():
    frames, mask = torch.randn(3, 20, 5), torch.arange(20) < torch.tensor([20, 1, 7])[:, None]
    frames[~mask] = 1e4
    for clip, own, statistics in zip(frames, mask, frame_statistics(frames, mask), strict=True):
        own = clip[own].double().numpy()
        expected = np.concatenate([own.mean(0), own.std(0)])
        torch.testing.assert_close(statistics.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_windows_carry_kinds_in_the_shares_of_their_probabilities(monkeypatch):
    summary = hearing_model().sound_summary
    likely = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0], [0.0, 0.98, 0.02, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    monkeypatch.setattr(summary, "logits", lambda statistics: likely.log())
    frames = torch.zeros(3, 1, 16)
    carried = summary(frames, frames[..., 0] == 0, torch.tensor([10, 10, 1]))
    kinds = torch.cdist(carried, summary.kinds).argmin(-1).tolist()
    assert kinds[:10] == [2] * 6 + [3] * 3 + [0] and kinds[10:20] == [1] * 10 and len(kinds) == 21


def test_every_window_carries_its_own_clips_kinds():
    model, lengths = hearing_model(), [41, 3, 17]
    frames, mask = frames_of(model, lengths)
    sounds, width = torch.randn_like(frames), model.config.audio_config.d_model
    states, counts = model.connect_audio(frames, mask, sounds, mask)
    words, _ = model.connect_audio(frames, mask)
    torch.testing.assert_close(states[:, :width], words)
    for clip, length, own in zip(sounds, lengths, states.split(counts.tolist()), strict=True):
        alone = model.sound_summary(clip[None, :length], mask.new_ones(1, length), torch.tensor([len(own)]))
        torch.testing.assert_close(own[:, width:], alone)


def test_the_language_models_loss_reaches_the_kinds_alone():
    model = hearing_model()
    freeze_base_parts(model)
    frames, mask = frames_of(model, [20])
    states, counts = model.connect_audio(frames, mask, torch.randn_like(frames), mask)
    model.embed_audio(states, counts)[0].sum().backward()
    summary = model.sound_summary
    assert summary.kinds.grad.any() and not any(p.requires_grad for p in summary.mlp.parameters())


def test_the_summary_stands_where_no_word_does():
    """It enters the embeddings by the blank's probability, and the CTC head does not see it."""
    model = hearing_model()
    states, _ = model.connect_audio(*frames_of(model, [41]))
    summary = torch.randn(model.config.text_config.hidden_size).expand(len(states), -1)
    both, embedding = torch.cat([states, summary], -1), model.get_input_embeddings()
    log_probs = model.ctc_head(both, model.speech_tokens)
    torch.testing.assert_close(log_probs, model.ctc_head(states, model.speech_tokens))
    added, _ = model.ctc_head.embed(both, model.speech_tokens, embedding)
    added = added - model.ctc_head.embed(states, model.speech_tokens, embedding)[0]
    torch.testing.assert_close(added, log_probs[:, :1].exp() * summary, atol=1e-5, rtol=1e-4)


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
    monkeypatch.setattr("salmonn_hf.sound_summary.FIT_STEPS", 150)
    model, generator = hearing_model(), torch.Generator().manual_seed(0)
    heard = torch.randn(3, 2 * model.config.sound_width, generator=generator)

    def clips(count):
        return (heard + 0.3 * torch.randn(count, *heard.shape, generator=generator)).flatten(0, 1)

    captions = [[[5, 6], [5, 8]], [[20, 21]], [[30, 6]]]  # all clips of a kind are called the same
    fit_sound_summary(model, clips(40), captions * 40)
    with torch.no_grad():
        best = model.eval().sound_summary.logits(clips(20)).argmax(-1)
    said = torch.nn.functional.cosine_similarity(
        model.sound_summary.kinds[best][:, None], caption_directions(model.get_input_embeddings(), captions), dim=-1
    )
    assert (said.argmax(-1) == torch.arange(3).repeat(20)).float().mean() > 0.9


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
