"""What is trained."""

import torch
from conftest import tiny_config, tiny_model

from salmonn_hf.data.encoder_features import trains_encoder
from salmonn_hf.training.freezing import freeze_base_parts


def test_only_salmonns_own_parts_train():
    model = tiny_model(tiny_config(ctc_vocab_size=3)).to(torch.bfloat16)
    model.add_lora({"r": 2, "target_modules": ["q_proj"]})
    freeze_base_parts(model)
    for name, parameter in model.named_parameters():
        trained = name.startswith("projector.") or ".lora_" in name
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    freeze_base_parts(model, freeze_language_model_lora=True)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)
    assert not trains_encoder(model)
    model.add_lora({"r": 2, "target_modules": ["q_proj"]}, "audio_tower")
    for frozen, trained in ((False, "audio_tower."), (True, "language_model.")):
        freeze_base_parts(model, freeze_language_model_lora=not frozen, freeze_speech_parts=frozen)
        adapters = {n: p.requires_grad for n, p in model.named_parameters() if ".lora_" in n}
        assert all(requires == name.startswith(trained) for name, requires in adapters.items())
        assert trains_encoder(model) != frozen
