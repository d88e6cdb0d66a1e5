"""Configuration of SALMONN: a Whisper encoder, an optional sound encoder, a projector and a causal LM."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .configuration_beats import BeatsConfig
from .configuration_whisper_decoder_projector import WhisperDecoderProjectorConfig
from .configuration_whisper_projector import WhisperProjectorConfig
from .configuration_window_qformer import WindowQFormerConfig

# Where a checkpoint keeps its code, see `remote_code.save_code`.
PIPELINE = {"impl": "pipeline_salmonn.SalmonnAutomaticSpeechRecognitionPipeline", "pt": ["AutoModel"]}
AUTO_CLASSES = ("AutoModel", "AutoModelForSpeechSeq2Seq", "AutoModelForMultimodalLM")
AUTO_MODELS = dict.fromkeys(AUTO_CLASSES, "modeling_salmonn.SalmonnForConditionalGeneration")


@strict
class SalmonnConfig(PreTrainedConfig):
    r"""
    Configuration of [`SalmonnForConditionalGeneration`].

    Args:
        audio_config (`WhisperConfig` or `dict`): the speech encoder (only the encoder half of Whisper is built).
        sound_config (`PreTrainedConfig` or `dict`, *optional*): a second encoder, for sound and music, that takes raw
            audio as `input_values` with an `attention_mask`, as BEATs, Wav2Vec2 and HuBERT do.
        sound_layers (`list[int]`, *optional*): in place of a sound encoder, the speech encoder's own layers by number
            (1 is the first): the mean of their outputs are the sound frames. The last layer keeps the words, those
            before it know sounds as well (Gong et al., "Whisper-AT", Interspeech 2023). Neither this nor
            `sound_config`: speech alone.
        projector_config ([`ProjectorConfig`] or `dict`): the projector, by its `model_type`: the window Q-Former of
            [`WindowQFormerConfig`], the default, or another. The sizes of its inputs and outputs are filled in.
        text_config (`PreTrainedConfig` or `dict`): the language model, any that `AutoModelForCausalLM` knows.
        audio_token_id (`int`): the token that stands for one audio embedding in `input_ids`.
        languages (`list[str]`, *optional*): codes of those that the model was trained to write, e.g. "en"; others are
            then refused. `None`: not declared.
        lora (`dict`, *optional*): `peft.LoraConfig` arguments of the adapter inside the language model.
        audio_lora (`dict`, *optional*): the same for one inside the speech encoder.
        base_parts (`dict`, *optional*): for an adapter checkpoint, which frozen modules its file leaves out and where
            they come from, e.g. `{"audio_tower": "openai/whisper-base.en", "language_model": "google/gemma-2-2b-it"}`.
        quantization_config ([`SalmonnQuantizationConfig`] or `dict`, *optional*): parts whose weights have 4 or 8
            bits.

    Raises:
        ValueError: if the parts do not fit each other; the message names both sizes.
    """

    model_type = "salmonn"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "sound_config": SubConfigSpec(config_class=AutoConfig, model_type="wav2vec2", optional=True),
        "projector_config": SubConfigSpec(config_class=AutoConfig, model_type=WindowQFormerConfig.model_type),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    sound_config: dict | PreTrainedConfig | None = None
    sound_layers: list[int] | None = None
    projector_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 0
    languages: list[str] | None = None
    lora: dict | None = None
    audio_lora: dict | None = None
    base_parts: dict | None = None
    tie_word_embeddings: bool = False  # the language model ties its own

    def __post_init__(self, **kwargs):
        if "qformer_config" in kwargs:
            command = "python -m salmonn_hf.convert migrate OLD NEW"
            raise ValueError(f"This checkpoint was written by salmonn_hf 0.1.0; bring it up to date with `{command}`.")
        if not __name__.startswith("transformers_modules"):
            # Where the package is imported, its own pipeline is registered; the checkpoint's would ask for trust.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if (kind := self.audio_config.model_type) != "whisper":
            raise ValueError(f"audio_config is of type '{kind}'; the speech encoder must be a Whisper one.")
        if self.sound_layers is not None:
            self.check_sound_layers()
        self.projector_config.fit_to(self.audio_config, self.sound_hidden_size, self.text_config)
        if not 0 <= self.audio_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"audio_token_id {self.audio_token_id} lies outside the language model's vocabulary of "
                f"{self.text_config.vocab_size} tokens; name a token that it has and text never uses."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but what is no SALMONN is refused; it would become a model of defaults, of 32 layers."""
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (kind := settings.get("model_type")) != cls.model_type:
            found = f"holds a model of type {kind!r}" if kind else "has no config.json of a model"
            raise ValueError(f"{pretrained_model_name_or_path} {found}, not of a SALMONN; name a checkpoint of that.")
        return settings, kwargs

    @property
    def quantized_parts(self) -> dict[str, dict]:
        """`parts` of the quantization_config, see [`SalmonnQuantizationConfig`]; empty for none."""
        return self._quantization.get("parts", {})

    @property
    def library_quantization(self) -> dict | None:
        """`language_model` of the quantization_config: another library's format."""
        settings = self._quantization
        return settings.get("language_model") if settings.get("quant_method") == "salmonn" else settings or None

    @property
    def _quantization(self) -> dict:
        settings = getattr(self, "quantization_config", None) or {}
        return settings if isinstance(settings, dict) else settings.to_dict()

    @property
    def vocab_size(self) -> int:
        """Of the language model, as for a config without parts."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int):
        self.text_config.vocab_size = size

    @property
    def sound_hidden_size(self) -> int:
        """Features of a sound frame; 0 for a model of speech alone."""
        if self.sound_layers is not None:
            return self.audio_config.d_model
        return self.sound_config.hidden_size if self.sound_config is not None else 0

    def check_sound_layers(self):
        if self.sound_config is not None:
            raise ValueError("sound_layers take the place of a sound encoder; leave out these or sound_config.")
        layers = self.audio_config.encoder_layers
        if not self.sound_layers or not all(1 <= layer <= layers for layer in self.sound_layers):
            wanted = f"numbers of the speech encoder's layers, from 1 to {layers}"
            raise ValueError(f"sound_layers {self.sound_layers} must be {wanted}.")

    def to_dict(self):
        """With what a process without the package needs to find the checkpoint's own code (`trust_remote_code`)."""
        settings = super().to_dict() | {"custom_pipelines": {"automatic-speech-recognition": PIPELINE}}
        if settings.get("auto_map"):
            settings["auto_map"] = settings["auto_map"] | AUTO_MODELS
        return settings


SalmonnConfig.register_for_auto_class()
# `transformers serve` and any-to-any look here, and not among registered models; they import this module before.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["salmonn"] = "SalmonnForConditionalGeneration"
# Here and not in the package's __init__, so that the code in a checkpoint knows the parts' types, too.
for part_config in (BeatsConfig, WindowQFormerConfig, WhisperProjectorConfig, WhisperDecoderProjectorConfig):
    AutoConfig.register(part_config.model_type, part_config, exist_ok=True)

__all__ = ["SalmonnConfig"]
