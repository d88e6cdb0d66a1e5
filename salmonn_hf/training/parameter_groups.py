"""The optimizer's parameter groups: a learning rate by kind of parameter, weight decay on matrices alone."""

import torch

OWN_RATES = ("lora_learning_rate", "audio_lora_learning_rate", "pretrained_projector_learning_rate")


def parameter_kind(name: str, projector) -> str:
    """Which learning rate a trained parameter of a model with this projector has."""
    if ".lora_" in name:
        return "audio lora" if name.startswith("audio_tower.") else "lora"
    pretrained = tuple(f"projector.{beginning}" for beginning in projector.pretrained_parameters)
    return "pretrained projector" if pretrained and name.startswith(pretrained) else "other"


def parameter_groups(model, args, learning_rate: float, weight_decay: float) -> list[dict]:
    """
    The trained parameters of `model`, behind `freeze_base_parts`, as `torch.optim` takes them. `args` have the rates
    of single kinds, `learning_rate` is that of all others; norms, biases and learned vectors have no weight decay.
    """
    lora = args.lora_learning_rate or learning_rate
    rates = {
        "lora": lora,
        "audio lora": args.audio_lora_learning_rate or lora,
        "pretrained projector": args.pretrained_projector_learning_rate or learning_rate,
        "other": learning_rate,
    }
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for kind, rate in rates.items():
        parameters = [p for name, p in trained if parameter_kind(name, model.projector) == kind]
        for decay, decays in ((weight_decay, True), (0.0, False)):
            if chosen := [p for p in parameters if (p.ndim >= 2) == decays]:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def optimizer_of(trainer) -> tuple[type, dict] | None:
    """
    Class and arguments of the optimizer that `--optim` or `optimizer_cls_and_kwargs` names, our parameter groups among
    them, as `Trainer.create_optimizer` takes them. `None` for an optimizer object that was given.

    Raises:
        ValueError: where the optimizer makes its own groups, so that the rates of single kinds would be lost.
    """
    args = trainer.args
    rates = [name for name in OWN_RATES if getattr(args, name) is not None]
    deepspeed = trainer.accelerator.deepspeed_plugin.deepspeed_config if trainer.is_deepspeed_enabled else {}
    if trainer.optimizer is not None or "optimizer" in deepspeed:
        whose, optimizer = "The optimizer that was given", None
    else:
        optimizer = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        kind, settings = optimizer
        whose = f"optim={args.optim.value}"
        is_class = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if is_class and not {"params", "model", "optimizer_dict"} & settings.keys():
            defaults = settings.get("lr", args.learning_rate), settings.get("weight_decay", args.weight_decay)
            return kind, settings | {"params": parameter_groups(trainer.model, args, *defaults)}
    if rates:
        raise ValueError(f"{whose} has its own parameter groups; leave out {', '.join(rates)}, or take another.")
    return optimizer
