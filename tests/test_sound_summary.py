"""What a whole clip sounds like, as one vector: by hand, in batches, in the model, and fitted to captions."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_speech_decoder import decoder_config, decoder_model, frames_of

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.sound_summary import fit_sound_summary, frame_statistics


def hearing_model(seed=0):
    model = tiny_model(decoder_config(sound_layers=[1, 2], sound_summary_size=8), seed)
    torch.nn.init.constant_(model.sound_summary.log_scale, 2.0)
    return model.eval()


def test_statistics_are_of_a_clips_own_frames():
    frames, mask = torch.randn(3, 20, 5), torch.arange(20) < torch.tensor([20, 1, 7])[:, None]
    frames[~mask] = 1e4
    for clip, own, statistics in zip(frames, mask, frame_statistics(frames, mask), strict=True):
        own = clip[own].double().numpy()
        expected = np.concatenate([own.mean(0), own.std(0)])
        torch.testing.assert_close(statistics.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_every_window_carries_its_own_clips_summary():
    model, lengths = hearing_model(), [41, 3, 17]
    frames, mask = frames_of(model, lengths)
    sounds, width = torch.randn_like(frames), model.config.audio_config.d_model
    states, counts = model.connect_audio(frames, mask, sounds, mask)
    words, _ = model.connect_audio(frames, mask)
    torch.testing.assert_close(states[:, :width], words)
    for clip, length, own in zip(sounds, lengths, states.split(counts.tolist()), strict=True):
        alone = model.sound_summary(clip[None, :length], mask.new_ones(1, length))
        torch.testing.assert_close(own[:, width:], alone.expand(len(own), -1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.norm(), torch.tensor(2.0).exp())


def test_the_summary_stands_where_no_word_does():
    """It enters the embeddings by the blank's probability, and the CTC head does not see it."""
    model = hearing_model()
    states, _ = model.connect_audio(*frames_of(model, [41]))
    summary = torch.randn(model.config.text_config.hidden_size).expand(len(states), -1)
    both, embedding = torch.cat([states, summary], -1), model.get_input_embeddings()
    log_probs = model.ctc_head(both, model.speech_tokens)
    torch.testing.assert_close(log_probs, model.ctc_head(states, model.speech_tokens))
    added = model.ctc_head.embed(both, model.speech_tokens, embedding)
    added = added - model.ctc_head.embed(states, model.speech_tokens, embedding)
    torch.testing.assert_close(added, log_probs[:, :1].exp() * summary, atol=1e-5, rtol=1e-4)


def test_caption_loss_is_that_of_the_summary():
    model = hearing_model()
    frames, mask = frames_of(model, [30, 21, 40])
    sounds = torch.randn_like(frames)
    inputs = {"audio_frames": frames, "audio_frames_mask": mask, "sound_frames": sounds, "sound_frames_mask": mask}
    captions = torch.tensor([[-100, -100], [7, 9], [40, -100]])
    loss = model(**inputs, ctc_labels=torch.full((3, 1), -100), caption_labels=captions).loss

    rows = model.get_input_embeddings().weight
    summaries = model.sound_summary(sounds[1:], mask[1:])
    cosines = torch.nn.functional.cosine_similarity(summaries[:, None], rows - rows.mean(0), dim=-1)
    expected = torch.nn.functional.cross_entropy(50 * cosines[[0, 0, 1]], torch.tensor([7, 9, 40]))
    torch.testing.assert_close(loss, expected)


def test_fitted_it_tells_new_clips_apart(monkeypatch):
    monkeypatch.setattr("salmonn_hf.sound_summary.FIT_STEPS", 150)
    model, generator = hearing_model(), torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 2 * model.config.sound_width, generator=generator)

    def clips(count):
        return (kinds + 0.3 * torch.randn(count, *kinds.shape, generator=generator)).flatten(0, 1)

    captions = [[[5, 6], [5, 8]], [[20, 21]], [[30, 6]]]  # all clips of a kind are called the same
    loss = fit_sound_summary(model, clips(40), captions * 40)
    assert loss < 2.5  # of one of 40 tokens; 3.7 without having learnt anything
    with torch.no_grad():
        heard = model.eval().sound_summary.from_statistics(clips(20))
        rows = model.get_input_embeddings().weight
        nearest = torch.nn.functional.cosine_similarity(heard[:, None], rows - rows.mean(0), dim=-1).topk(2).indices
    names = [{5, 6, 8}, {20, 21}, {30, 6}] * 20
    assert np.mean([set(found.tolist()) <= name for found, name in zip(nearest, names, strict=True)]) > 0.9


def test_a_model_that_hears_words_alone_learns_to_hear_sounds(tmp_path):
    model = decoder_model()
    model.add_sound_summary([1], 8)
    features, mask = torch.randn(2, 80, 300), torch.ones(2, 300)
    before = model.eval().get_audio_features(features, mask).pooler_output
    model.save_pretrained(tmp_path)
    loaded = SalmonnForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.sound_layers == [1]
    torch.testing.assert_close(loaded.get_audio_features(features, mask).pooler_output, before)


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
