"""Quantised SALMONN checkpoints as transformers knows them: their `quantization_config`, and the quantiser for it."""

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "salmonn"


class SalmonnQuantizationConfig(QuantizationConfigMixin):
    r"""
    Which parts of a SALMONN have weights of few bits. `from_pretrained(..., quantization_config=...)` with one rounds
    the weights of a checkpoint that is not quantised.

    Args:
        parts (`dict[str, dict]`): part to `{"bits": 4 or 8, "group_size": int}`, see [`quantize_parts`], e.g.
            `{"language_model": {"bits": 4, "group_size": 64}, "embedding": {"bits": 8}}`.
        language_model (`dict` or a config of transformers, *optional*): the quantisation of the language model's
            Linears in another library's format, e.g. a `BitsAndBytesConfig` whose `llm_int8_skip_modules` names all
            other parts.

    Raises:
        ValueError: if `parts` has the language model as well.
    """

    def __init__(self, parts: dict[str, dict] | None = None, language_model=None, quant_method: str = METHOD):
        if language_model and "language_model" in (parts or {}):
            raise ValueError("The language model is in parts, and has another library's format; name one of the two.")
        self.quant_method = quant_method
        self.parts = parts or {}
        self.language_model = language_model.to_dict() if hasattr(language_model, "to_dict") else language_model


class SalmonnQuantizer(HfQuantizer):
    """
    Brings the parts of [`SalmonnQuantizationConfig`] into their format. What the language model's tensors need in
    another library's format, that library's own quantiser says.
    """

    def __init__(self, quantization_config: SalmonnQuantizationConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.library = None
        if quantization_config.language_model:
            self.library = AutoHfQuantizer.from_config(quantization_config.language_model, **kwargs)

    def validate_environment(self, *args, **kwargs):
        if self.library:
            self.library.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map):
        return self.library.update_device_map(device_map) if self.library else device_map

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            model.quantize_parts(self.quantization_config.parts)
        if self.library:
            self.library._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.quantize_parts(self.quantization_config.parts)
        if self.library:
            return self.library._process_model_after_weight_loading(model, **kwargs)
        # These weights pass gradients on and are saved as any others. Trainer would refuse a model that counts as
        # quantised, and its save_pretrained ignores the state dict that it is given.
        model.is_quantized = False
        del model.hf_quantizer
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return self.library is not None and self.library.param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self):
        return self.library.get_quantize_ops()

    def get_weight_conversions(self):
        return self.library.get_weight_conversions() if self.library else []

    def update_weight_conversions(self, weight_conversions, model):
        if self.library:
            return self.library.update_weight_conversions(weight_conversions, model)
        return weight_conversions

    def get_state_dict_and_metadata(self, model):
        return self.library.get_state_dict_and_metadata(model) if self.library else (None, {})

    def param_element_size(self, model, param_name: str, param) -> float:
        return (self.library or super()).param_element_size(model, param_name, param)

    def is_serializable(self) -> bool:
        return self.library is None or self.library.is_serializable()

    @property
    def is_trainable(self) -> bool:
        return self.library is None or self.library.is_trainable


if METHOD not in AUTO_QUANTIZER_MAPPING:  # the package and a checkpoint's own code may be in one process
    register_quantization_config(METHOD)(SalmonnQuantizationConfig)
    register_quantizer(METHOD)(SalmonnQuantizer)


def quantize_in_place(model, parts: dict[str, dict]):
    """[`quantize_parts`], noted in the model's config beside what was quantised before."""
    model.quantize_parts(parts)
    set_quantized_parts(model.config, model.config.quantized_parts | parts)


def set_quantized_parts(config, parts: dict[str, dict]):
    """Note in a config which parts of its model are quantised, or that none is; see [`SalmonnQuantizationConfig`]."""
    if parts or config.library_quantization:
        config.quantization_config = SalmonnQuantizationConfig(parts, config.library_quantization)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


__all__ = ["SalmonnQuantizationConfig", "SalmonnQuantizer"]
