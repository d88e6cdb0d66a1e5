"""
LoRA (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) in parts of a SALMONN, by PEFT: the adapter "default" of
transformers and PEFT. Others can be put beside it, see `adapters.py`.
"""

from functools import partial

from .quantized_layers import replace_module

# The parts that can have it, and where the config says how.
LORA_FIELDS = {"language_model": "lora", "audio_tower": "audio_lora"}
OWN = "default"  # the adapter's name for transformers and PEFT, and in the keys of a checkpoint
# In `adapter_config.json` of a checkpoint, whose LoRA is in model.safetensors, where PEFT does not look.
OWN_MARK = {"base_model_class": "SalmonnForConditionalGeneration", "parent_library": "salmonn_hf"}


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
        import peft.functional
    except ImportError as error:
        raise ImportError("This model has LoRA beside its weights, which needs PEFT: pip install peft") from error
    return peft


def tuner_layers(model) -> dict:
    """The layers of a model that PEFT put around others, by name; none without PEFT."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def switched_off(model) -> list:
    """The modules of a model whose adapters are disabled, also those that PEFT trains as a whole."""
    return [module for module in model.modules() if getattr(module, "disable_adapters", None) is True]


# Initial values of LoRA for which PEFT changes the weights beneath, which stay so when the adapter is taken out.
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def option_that_changes_weights(config) -> str | None:
    """The option of a PEFT config, if any, that changes weights of the model itself, not of the adapter alone."""
    init, bias = getattr(config, "init_lora_weights", None), getattr(config, "bias", None)
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS):
        return f"init_lora_weights={init!r}"
    return f"bias={bias!r}" if bias not in (None, "none") else None


class OwnAdapter(dict):
    """
    `peft_config` of a model with LoRA of its own. A tuner of PEFT enters its adapter here first, before it switches
    all others off or writes over one of the same name.
    """

    def update(self, *args, **kwargs):
        raise ValueError(
            "This model has LoRA of its own beside its weights, which PEFT would switch off. Merge it first, "
            "model.merge_lora(), and wrap the merged model; or leave it as it is and put another adapter beside it: "
            'model.add_adapter(config, "name") or model.load_adapter(directory, "name").'
        )

    def __setitem__(self, name, config):
        self.update({name: config})

    def __reduce__(self):  # copies are made by this class, not item by item
        return type(self), (dict(self),)


def refuse_to_merge(part: str, *args, **kwargs):
    raise ValueError(
        f"LoRA cannot be merged into 4 or 8 bits, as {part} is; merge it into the model before quantising that. "
        "An adapter checkpoint loads without: config.quantization_config = None, then "
        "from_pretrained(..., config=config)."
    )


class LoraMixin:
    """LoRA of a `SalmonnModel`, and `peft_config`, by which transformers and PEFT know a model's adapters."""

    @property
    def peft_config(self) -> dict:
        try:
            return self.__dict__["_adapter_configs"]
        except KeyError:
            raise AttributeError("This model has no adapter.") from None

    @peft_config.setter
    def peft_config(self, configs: dict):
        """
        Set by PEFT whenever it has put an adapter in.

        Raises:
            ValueError: if PEFT has read its config of a checkpoint, where it will not find the weights.
        """
        for config in configs.values():
            if getattr(config, "auto_mapping", None) == OWN_MARK:
                directory = config.base_model_name_or_path
                raise ValueError(
                    f"{directory} is a whole checkpoint, not an adapter alone: load it with AutoModel."
                    f"from_pretrained, or its LoRA with model.load_adapter({directory!r}); both need no PeftModel."
                )
        self.__dict__["_adapter_configs"] = OwnAdapter(configs) if adapted_parts(self.config) else configs
        self.refuse_to_merge_into_bits()

    @peft_config.deleter
    def peft_config(self):
        """
        Done by PEFT when it has taken all adapters out, merged or not: the weights may be others than those of the
        base parts, and of the checkpoint that was loaded.
        """
        self.__dict__.pop("_adapter_configs", None)
        self._hf_peft_config_loaded = False
        self.config.lora = self.config.audio_lora = self.config.base_parts = None
        self.name_or_path = self.config.name_or_path = ""

    def add_lora(self, lora: dict, part: str = "language_model"):
        """
        Put a LoRA adapter (`peft.LoraConfig` arguments) into a part, this or the "audio_tower", in place.

        Raises:
            ValueError: if the part has one already; if it would change base parts.
        """
        peft, module = require_peft(), getattr(self, part)
        if any(OWN in layer._get_available_adapters() for layer in tuner_layers(module).values()):
            raise ValueError(f"{part} has an adapter '{OWN}' already; fold it in first with merge_lora().")
        config = peft.LoraConfig(**lora)
        self.check_base_parts_stay(config)
        for option in ("modules_to_save", "trainable_token_indices") if self.config.base_parts else ():
            if getattr(config, option):
                raise ValueError(
                    f"{option} trains weights of base parts, which are not saved: leave it out, or set "
                    "config.base_parts = None to have the whole model saved."
                )
        peft.inject_adapter_in_model(config, module, OWN)
        if getattr(self.config, LORA_FIELDS[part]) is None:
            self.name_or_path = self.config.name_or_path = ""  # the checkpoint lacks it
        setattr(self.config, LORA_FIELDS[part], lora)
        module.peft_config = OwnAdapter(module.peft_config)  # refuses a tuner around the part, too
        self.describe_lora()

    def describe_lora(self):
        """Bring `peft_config` up to date with the layers: one `peft.LoraConfig` for LoRA in both parts."""
        layers = {name: m for name, m in tuner_layers(self).items() if OWN in getattr(m, "r", ())}
        settings = next(getattr(self.config, LORA_FIELDS[part]) for part in adapted_parts(self.config))
        own = require_peft().LoraConfig(**settings, inference_mode=True)
        own.layers_to_transform = own.layers_pattern = own.exclude_modules = None  # the names of the layers say it
        own.target_modules = sorted(layers)
        root = 0.5 if own.use_rslora else 1
        alphas = {name: layer.scaling[OWN] * layer.r[OWN] ** root for name, layer in layers.items()}
        own.rank_pattern = {name: layer.r[OWN] for name, layer in layers.items() if layer.r[OWN] != own.r}
        own.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != own.lora_alpha}
        self._hf_peft_config_loaded = True
        self.peft_config = {**getattr(self, "peft_config", {}), OWN: own}

    def check_base_parts_stay(self, config):
        """
        Raises:
            ValueError: if an adapter of this PEFT config would change base parts, which are not saved.
        """
        if self.config.base_parts and (option := option_that_changes_weights(config)):
            raise ValueError(
                f"{option} changes weights of base parts, which are not saved with the model: leave it out; or set "
                "config.base_parts = None, save the whole model, and put the adapter into what is loaded from there."
            )

    def parts_in_bits(self) -> list[str]:
        """Parts of 4 or 8 bits that have an adapter."""
        parts = [part for part in adapted_parts(self.config) if part in self.config.quantized_parts]
        for name, layer in tuner_layers(self).items():
            weight = getattr(layer.get_base_layer(), "weight", None)  # of GPTQ there is none
            # For what is in a library's format before LoRA is put in, PEFT has layers of its own, which can merge it.
            is_plain = type(layer).__module__ == "peft.tuners.lora.layer"
            if is_plain and (weight is None or not weight.is_floating_point()):
                parts.append(name.split(".")[0])
        return parts

    def refuse_to_merge_into_bits(self):
        """Have PEFT refuse it, which would add floats to integers, before it has merged the first layer."""
        parts = self.parts_in_bits()
        for layer in tuner_layers(self).values():
            layer.__dict__.pop("merge", None)
            if parts:
                layer.merge = partial(refuse_to_merge, parts[0])

    def merge_lora(self):
        """
        Fold the active adapters into the weights of their layers and drop all: the model is then a full one. Where
        others than the checkpoint's own LoRA were folded in, it is that checkpoint no more.

        Raises:
            ValueError: if such a part is quantised; if adapters are disabled.
        """
        layers, adapted = tuner_layers(self), adapted_parts(self.config)
        if in_bits := self.parts_in_bits():
            refuse_to_merge(in_bits[0])
        if switched_off(self):
            raise ValueError(
                "The adapters are disabled: call enable_adapters() first to have the active ones merged, or "
                "delete_adapter for those not wanted."
            )
        folded = {name for m in layers.values() for name in [*m.active_adapters, *m.merged_adapters]}
        is_own = folded == {OWN} and all(name.split(".")[0] in adapted for name in layers)
        for name, layer in reversed(layers.items()):  # of different kinds they may be around each other
            layer.merge(safe_merge=True)
            replace_module(self, name, layer.base_layer)
        for name, module in list(self.named_modules()):
            if hasattr(module, "unload_and_optionally_merge_module"):  # of a config with modules_to_save
                replace_module(self, name, module.unload_and_optionally_merge_module(True, True, None))
                is_own = False
        if layers:
            checkpoint = self.name_or_path
            for part in adapted:
                getattr(self, part).__dict__.pop("peft_config", None)
            del self.peft_config
            if is_own:  # it still is that, in another form
                self.name_or_path = self.config.name_or_path = checkpoint
        self.config.base_parts = None
        return self
