"""What is frozen of a projector, and what training does to one that was quantised."""

import pytest
import torch
from conftest import noise, tiny_model, tiny_processor
from test_clip_dataset import dataset, table
from test_quantized_layers import QLORA, gradients, qlora_model
from test_sound_summary import embeds_of, let_kinds_be, sound_model
from test_whisper_projector import frames_of
from transformers import AutoModel

from salmonn_hf.data.streamed_clips import StreamedClips
from salmonn_hf.model.quantized_layers import QuantizedLinear
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.initialization import start_sound_summary


def test_the_language_models_loss_reaches_the_marker_alone(monkeypatch):
    model = sound_model()
    freeze_base_parts(model)
    let_kinds_be(monkeypatch, model, [1])
    frames, mask = frames_of(model, [20])
    embeds_of(model, frames, mask, torch.randn_like(frames))[0].sum().backward()
    summary = model.projector.sound_summary
    assert summary.marker.grad.any() and not any(p.requires_grad for p in summary.mlp.parameters())


def test_a_quantised_projector_is_dequantised_to_be_trained(tmp_path):
    """Its values stay; all of it then has a gradient and is saved as it is."""
    model = qlora_model(quantization=QLORA | {"projector": {"bits": 8}})
    assert isinstance(model.projector.proj, QuantizedLinear)
    values = model.projector.proj.dequantize()
    freeze_base_parts(model)
    assert model.config.quantized_parts == QLORA
    assert not any(isinstance(module, QuantizedLinear) for module in model.projector.modules())
    assert torch.equal(model.projector.proj.weight, values)
    found = gradients(model, tiny_processor().apply_transcription_request([noise(1.0)]), True)
    assert {name for name in found if name.startswith("projector")} == {
        name for name, _ in tiny_model().named_parameters() if name.startswith("projector")
    }
    assert found["projector.proj.weight"].abs().sum() > 0
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).projector.proj.weight.dtype == torch.bfloat16


def test_without_captions_at_hand_training_says_what_it_needs():
    for data in (dataset(table(2)), StreamedClips(dataset(), [])):
        with pytest.raises(ValueError, match="a caption task without streaming"):
            start_sound_summary(sound_model(), data, None)
