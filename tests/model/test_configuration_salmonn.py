"""The composite config: round trip, and parts that do not fit."""

import pytest
from conftest import LANGUAGE_MODELS, tiny_config, tiny_text_config
from transformers import AutoConfig

from salmonn_hf import SalmonnConfig


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_saved_and_loaded_is_the_same(tmp_path, model_type):
    config = tiny_config(model_type, lora={"r": 4}, base_parts={"audio_tower": "openai/whisper-tiny"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SalmonnConfig and loaded.text_config.model_type == model_type
    assert loaded.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


def test_default_is_a_working_config():
    assert SalmonnConfig().window_frames == 17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qformer_config": {"encoder_hidden_size": 112}}, "112.*16 features"),
        ({"audio_token_id": 300}, "300 tokens"),
        ({"window_stride": 9}, "stride"),
        ({"queries_per_window": 0}, "at least 1"),
        ({"frame_mlp_size": 8, "window_stride": 7}, "7 frames do not fall into 2 equal shares"),
        ({"audio_config": tiny_text_config()}, "must be a Whisper"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)
