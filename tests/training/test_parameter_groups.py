"""Learning rates by kind of parameter, whatever the optimizer."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from transformers.optimization import Adafactor

from salmonn_hf.training.arguments import SalmonnTrainingArguments
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.trainer import SalmonnTrainer


def adapted_model():
    model = tiny_model(tiny_config(ctc_vocab_size=3))
    model.add_lora({"r": 2, "target_modules": ["q_proj"]})
    freeze_base_parts(model)
    return model


def test_what_comes_from_whisper_and_lora_have_learning_rates_of_their_own(tmp_path):
    model = tiny_model(tiny_config(ctc_vocab_size=3, num_layers=1, frame_mlp_size=8))
    for part in ("language_model", "audio_tower"):
        model.add_lora({"r": 2, "target_modules": ["q_proj"]}, part)
    freeze_base_parts(model)
    arguments = SalmonnTrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=1e-3,
        pretrained_projector_learning_rate=1e-4,
        audio_lora_learning_rate=2e-3,
        lora_learning_rate=1e-2,
        use_cpu=True,
    )
    trainer = SalmonnTrainer(model=model, args=arguments)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    expected = {f"projector.{name}": 1e-4 for name in ("query", "layers", "layer_norm")}
    expected |= {f"projector.{name}": 1e-3 for name in ("frame_mlp", "audio_norm", "ctc_head")}
    expected |= {"language_model": 1e-2, "audio_tower": 2e-3}
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kind,) = (kind for kind in expected if name.startswith(f"{kind}.") or name == kind)
            assert rates[id(parameter)] == expected[kind], name
            seen.add(kind)
    assert seen == set(expected)


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adafactor", Adafactor),
    ],
)
def test_any_optimizer_has_the_groups(optim, kind, tmp_path):
    settings = {"lora_learning_rate": 1e-2, "learning_rate": 1e-3, "weight_decay": 0.1}
    args = SalmonnTrainingArguments(output_dir=str(tmp_path), optim=optim, optim_args="momentum=0.5", **settings)
    optimizer = SalmonnTrainer(model=adapted_model(), args=args).create_optimizer()
    assert type(optimizer) is kind
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (1e-2, 0.1),
        (1e-3, 0.1),
        (1e-3, 0.0),
    }
    assert [bool(group.get("fused")) for group in optimizer.param_groups] == [optim.endswith("fused")] * 3
    assert [group.get("momentum", 0.5) for group in optimizer.param_groups] == [0.5] * 3


def test_numbers_of_adamw_are_those_before_any_other_could_be_chosen(tmp_path):
    assert SalmonnTrainingArguments(output_dir=str(tmp_path)).optim == "adamw_torch"


def test_an_optimizer_that_is_given_is_used(tmp_path):
    args = SalmonnTrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3)
    by_class = (torch.optim.RMSprop, {"lr": 0.5, "alpha": 0.9, "weight_decay": 0.2})
    model = adapted_model()
    optimizer = SalmonnTrainer(model=model, args=args, optimizer_cls_and_kwargs=by_class).create_optimizer()
    assert type(optimizer) is torch.optim.RMSprop
    groups = [(group["lr"], group["alpha"], group["weight_decay"]) for group in optimizer.param_groups]
    assert set(groups) == {(0.5, 0.9, 0.2), (0.5, 0.9, 0.0)}
    own = torch.optim.SGD([model.projector.audio_norm.weight], lr=0.1)
    assert SalmonnTrainer(model=model, args=args, optimizers=(own, None)).create_optimizer() is own
    args.lora_learning_rate = 1e-2
    with pytest.raises(ValueError, match="has its own parameter groups; leave out lora_learning_rate"):
        SalmonnTrainer(model=model, args=args, optimizers=(own, None))


def test_an_optimizer_with_groups_of_its_own_refuses_single_rates(tmp_path, monkeypatch):
    """As GaLore's and APOLLO's, whose groups `optim_target_modules` makes."""
    args = SalmonnTrainingArguments(output_dir=str(tmp_path), optim="galore_adamw", optim_target_modules=["q_proj"])
    groups = {"params": [{"params": [torch.nn.Parameter(torch.zeros(2))]}], "lr": 0.1}

    def galore(arguments, model=None):
        assert arguments.optim_target_modules == ["q_proj"]
        return torch.optim.AdamW, dict(groups)

    monkeypatch.setattr(SalmonnTrainer, "get_optimizer_cls_and_kwargs", staticmethod(galore))
    optimizer = SalmonnTrainer(model=adapted_model(), args=args).create_optimizer()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    args.audio_lora_learning_rate = 1e-2
    with pytest.raises(ValueError, match="optim=galore_adamw has its own.* leave out audio_lora_learning_rate"):
        SalmonnTrainer(model=adapted_model(), args=args)


def test_an_optimizer_that_is_not_installed_is_named(tmp_path):
    args = SalmonnTrainingArguments(output_dir=str(tmp_path), optim="galore_adamw", optim_target_modules=["q_proj"])
    with pytest.raises(ImportError, match="galore_torch"):
        SalmonnTrainer(model=adapted_model(), args=args)
