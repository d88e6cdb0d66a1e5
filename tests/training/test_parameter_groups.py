"""Learning rates by kind of parameter, whatever the optimizer."""

from conftest import tiny_config, tiny_model

from salmonn_hf.training.arguments import SalmonnTrainingArguments
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.trainer import SalmonnTrainer


def test_what_comes_from_whisper_and_lora_have_learning_rates_of_their_own(tmp_path):
    windows = {"window_frames": 4, "window_stride": 4, "queries_per_window": 1, "frame_mlp_size": 8}
    model = tiny_model(tiny_config(ctc_vocab_size=3, speech_decoder_layers=1, **windows))
    for part in ("language_model", "audio_tower"):
        model.add_lora({"r": 2, "target_modules": ["q_proj"]}, part)
    freeze_base_parts(model)
    arguments = SalmonnTrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=1e-3,
        speech_decoder_learning_rate=1e-4,
        audio_lora_learning_rate=2e-3,
        lora_learning_rate=1e-2,
        use_cpu=True,
    )
    trainer = SalmonnTrainer(model=model, args=arguments)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    expected = {"connector.query": 1e-4, "connector.layers": 1e-4, "connector.layer_norm": 1e-4}
    expected |= {"connector.frame_mlp": 1e-3, "audio_norm": 1e-3, "ctc_head": 1e-3, "language_model": 1e-2}
    expected["audio_tower"] = 2e-3
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kind,) = (kind for kind in expected if name.startswith(f"{kind}.") or name == kind)
            assert rates[id(parameter)] == expected[kind], name
            seen.add(kind)
    assert seen == set(expected)
