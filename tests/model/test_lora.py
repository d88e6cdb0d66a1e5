"""LoRA in the language model and in the speech encoder."""

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from peft.tuners.lora import LoraLayer

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.model.quantizer_salmonn import set_quantized_parts

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
ENCODER_LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "out_proj", "fc1"]}


@pytest.fixture
def model():
    model = tiny_model(tiny_config(lora=LORA)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def adapted_encoder(model):
    model.add_lora(ENCODER_LORA, "audio_tower")
    for layer in model.audio_tower.modules():
        if isinstance(layer, LoraLayer):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model


def test_lora_in_the_encoder_is_saved_and_merged(adapted_encoder, tmp_path):
    model, inputs = adapted_encoder, tiny_processor().apply_transcription_request([noise(0.5)])
    layers = len(model.audio_tower.layers)
    assert len([layer for layer in model.audio_tower.modules() if isinstance(layer, LoraLayer)]) == 3 * layers
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = SalmonnForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert loaded.config.audio_lora == ENCODER_LORA and loaded.config.lora == LORA
        assert torch.equal(loaded(**inputs).logits, expected)
        loaded.merge_lora()
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.config.audio_lora is None and loaded.config.lora is None
    assert not any(".lora_" in name or ".base_layer" in name for name in loaded.state_dict())


def test_lora_changes_what_the_encoder_hears(adapted_encoder):
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    clip = inputs["input_features"], inputs["input_features_mask"]
    with torch.no_grad():
        adapted = adapted_encoder.encode_audio(*clip)["audio_frames"]
        for layer in adapted_encoder.audio_tower.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(False)
        assert not torch.allclose(adapted_encoder.encode_audio(*clip)["audio_frames"], adapted, atol=1e-2)


def test_lora_in_quantised_weights_is_not_merged(adapted_encoder):
    set_quantized_parts(adapted_encoder.config, {"audio_tower": {"bits": 8}})
    with pytest.raises(ValueError, match="as audio_tower is"):
        adapted_encoder.merge_lora()
    assert adapted_encoder.config.lora == LORA
