"""Log-mel frames: Whisper's own numbers, over each clip's own length, whatever the batch."""

import numpy as np
import pytest
from conftest import noise
from transformers import AutoFeatureExtractor, WhisperFeatureExtractor

from salmonn_hf import AudioError, SalmonnFeatureExtractor


@pytest.mark.parametrize("bins", [80, 128])
def test_frames_are_whispers_own(bins):
    clip = noise(3.0)
    ours = SalmonnFeatureExtractor(feature_size=bins)(clip, sampling_rate=16000)
    whisper = WhisperFeatureExtractor(feature_size=bins)(clip, sampling_rate=16000)["input_features"]
    assert ours["input_features"].shape == (1, bins, 320)  # 3 s and the tail, not 30
    np.testing.assert_allclose(ours["input_features"], whisper[..., :320], atol=1e-5)


@pytest.mark.parametrize("seconds", [0.001, 0.0777, 1.0, 12.34, 29.79, 29.9, 29.999, 30.0])
def test_a_clip_has_the_same_frames_alone_and_in_a_batch(seconds):
    extractor = SalmonnFeatureExtractor()
    clip = noise(seconds)
    alone = extractor(clip)
    batch = extractor([noise(30.0, 1), clip, noise(0.5, 2)])
    length = int(batch["input_features_mask"][1].sum())
    assert length == alone["input_features"].shape[-1] == min(2 * -(-(len(clip) + 3200) // 320), 3000)
    assert (batch["input_features_mask"][1][:length] == 1).all()
    np.testing.assert_array_equal(batch["input_features"][1][:, :length], alone["input_features"][0])


def test_waveforms_for_a_sound_encoder():
    clips = [noise(0.5), noise(1.5)]
    features = SalmonnFeatureExtractor(return_input_values=True)(clips)
    assert features["input_values"].shape == (2, 24000)
    assert features["input_values_mask"].sum(-1).tolist() == [16000, 24000]  # a second at least, as in SALMONN
    np.testing.assert_array_equal(features["input_values"][0, :8000], clips[0])
    assert not features["input_values"][0, 8000:].any()


@pytest.mark.parametrize("seconds", [0.3, 12.34, 30.0])
def test_original_geometry_is_whispers_own(seconds):
    extractor = SalmonnFeatureExtractor(pad_to_30_seconds=True)
    clips = [noise(seconds), noise(2.0, 1)]
    ours = extractor(clips)
    whisper = WhisperFeatureExtractor()(clips, sampling_rate=16000)["input_features"]
    assert ours["input_features_mask"].shape == (2, 3000) and ours["input_features_mask"].all()
    np.testing.assert_allclose(ours["input_features"], whisper, atol=1e-5)


def test_other_sampling_rates_are_refused():
    with pytest.raises(AudioError, match="44100"):
        SalmonnFeatureExtractor()(noise(1.0), sampling_rate=44100)


def test_saved_and_loaded_is_the_same(tmp_path):
    SalmonnFeatureExtractor(feature_size=128, tail_seconds=0.1, pad_to_30_seconds=True).save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is SalmonnFeatureExtractor and loaded.feature_size == 128 and loaded.tail_seconds == 0.1
    assert loaded.pad_to_30_seconds
