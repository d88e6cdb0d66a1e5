"""LoRA in the language model and in the speech encoder."""

import pytest
import torch
from conftest import ENCODER_LORA, LORA, noise, tiny_processor
from peft.tuners.lora import LoraLayer

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.model.quantizer_salmonn import set_quantized_parts


def test_lora_in_the_encoder_is_saved_and_merged(lora_in_both, tmp_path):
    model, inputs = lora_in_both, tiny_processor().apply_transcription_request([noise(0.5)])
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


def test_lora_changes_what_the_encoder_hears(lora_in_both):
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    clip = inputs["input_features"], inputs["input_features_mask"]
    with torch.no_grad():
        adapted = lora_in_both.encode_audio(*clip)["audio_frames"]
        for layer in lora_in_both.audio_tower.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(False)
        assert not torch.allclose(lora_in_both.encode_audio(*clip)["audio_frames"], adapted, atol=1e-2)


def test_lora_in_quantised_weights_is_not_merged(lora_in_both):
    set_quantized_parts(lora_in_both.config, {"audio_tower": {"bits": 8}})
    with pytest.raises(ValueError, match="as audio_tower is"):
        lora_in_both.merge_lora()
    assert lora_in_both.config.lora == LORA
