"""LoRA (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) in parts of a SALMONN, by PEFT."""

# The parts that can have it, and where the config says how.
LORA_FIELDS = {"language_model": "lora", "audio_tower": "audio_lora"}


def adapted_parts(config) -> list[str]:
    """The parts of a model of this config, of whatever kind, that have LoRA."""
    return [part for part, field in LORA_FIELDS.items() if getattr(config, field, None) is not None]


def encoder_lora(rank: int) -> dict:
    """`peft.LoraConfig` arguments of an adapter in all layers of a Whisper encoder, attention and MLP."""
    linears = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": linears}


def require_peft():
    """
    The module `peft`, which a checkpoint without LoRA does not need. transformers takes any import that is not within
    `try`, wherever it stands, for a requirement of the checkpoints that carry this file.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("This model has LoRA beside its weights, which needs PEFT: pip install peft") from error
    return peft


class LoraMixin:
    """LoRA of a `SalmonnModel`."""

    def add_lora(self, lora: dict, part: str = "language_model"):
        """Put a LoRA adapter (`peft.LoraConfig` arguments) into a part, this or the "audio_tower", in place."""
        peft = require_peft()
        setattr(self.config, LORA_FIELDS[part], lora)
        peft.inject_adapter_in_model(peft.LoraConfig(**lora), getattr(self, part))

    def merge_lora(self):
        """
        Fold the LoRA adapters into the weights of their parts and drop them: the model is then a full one.

        Raises:
            ValueError: if such a part is quantised.
        """
        adapted = adapted_parts(self.config)
        if quantized := [part for part in adapted if part in self.config.quantized_parts]:
            raise ValueError(
                f"LoRA cannot be merged into 4 or 8 bits, as {quantized[0]} is; merge it into the model before "
                "quantising that. An adapter checkpoint loads without: config.quantization_config = None, then "
                "from_pretrained(..., config=config)."
            )
        for part in adapted:
            LoraLayer = require_peft().tuners.lora.LoraLayer
            for module in list(getattr(self, part).modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, LoraLayer):
                        child.merge(safe_merge=True)
                        setattr(module, name, child.get_base_layer())
            setattr(self.config, LORA_FIELDS[part], None)
        self.config.base_parts = None
        return self
