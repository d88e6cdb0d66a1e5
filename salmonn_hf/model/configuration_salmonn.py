"""Configuration of SALMONN: a Whisper encoder, an optional sound encoder, a window Q-Former and a causal LM."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_beats import BeatsConfig

# Where a checkpoint keeps its code, see `remote_code.save_code`.
CUSTOM_PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "pipeline_salmonn.SalmonnAutomaticSpeechRecognitionPipeline",
        "pt": ["AutoModel"],
    }
}
AUTO_MODELS = {
    name: "modeling_salmonn.SalmonnForConditionalGeneration"
    for name in ("AutoModel", "AutoModelForSpeechSeq2Seq", "AutoModelForMultimodalLM")
}


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
        qformer_config (`Blip2QFormerConfig` or `dict`): the window Q-Former. Its `encoder_hidden_size` must equal the
            width of the joined encoder features.
        text_config (`PreTrainedConfig` or `dict`): the language model, any that `AutoModelForCausalLM` knows.
        audio_token_id (`int`): the token that stands for one audio embedding in `input_ids`.
        window_frames (`int`): encoder frames (20 ms each) in a Q-Former window. SALMONN: 17, that is 0.333 s.
        window_stride (`int`): encoder frames between the starts of two windows. SALMONN: 17.
        queries_per_window (`int`): learned queries, and so audio tokens, per window. SALMONN: 1.
        pad_to_30_seconds (`bool`): SALMONN's original geometry. Every clip is heard as 30 s, silence included, and an
            incomplete last window is dropped: 88 audio tokens, whatever the clip. `False`: a clip costs what it lasts,
            and its tail is kept. The feature extractor has a field of the same name.
        window_position_embeddings (`bool`): add a learned position to the frames of a window, so that the queries can
            tell its start from its end. SALMONN has none.
        frame_mlp_size (`int`): hidden size of an MLP beside the Q-Former, which takes the frames that a query stands
            for, stacked, straight to its audio embedding; 0 for none, as SALMONN. With it a small model aligns
            several times faster. Needs a stride that is a multiple of `queries_per_window`.
        speech_decoder_layers (`int`): so many of the last layers of Whisper's own decoder in place of the Q-Former,
            see [`SalmonnSpeechDecoder`]; 0 for a Q-Former. Of `qformer_config` its dropout alone then counts.
        sound_summary_size (`int`): with `speech_decoder_layers` and sound frames, hidden size of the MLP that tells
            from all of a clip's sound frames of which kind of sound it is, see [`SalmonnSoundSummary`].
        sound_kinds (`int`): how many kinds it tells apart.
        sound_name_size (`int`): tokens of a kind's name, at most.
        window_context (`int`): frames on either side of a window that such a decoder's queries see as well.
        window_reach (`int`): up to so many windows apart such queries know one another's places; 0 for not at all.
        merged_windows (`int`): with `speech_decoder_layers`, so many windows in a row that carry no word come into the
            language model as one, see [`merge_wordless`]; 1: none are merged.
        projector_norm (`bool`): LayerNorm after the projection into the language model. SALMONN has none.
        ctc_vocab_size (`int`): tokens of the CTC alignment head over the language model's own embeddings; 0 for no
            head.
        ctc_trained_size (`int`): with `speech_decoder_layers`, the first so many of them occur in training texts.
        ctc_merges (`int`, *optional*): the head's tokens are those of the language model's tokenizer stopped after so
            many byte-pair merges (see `training.ctc_tokenizer`); `None` for all.
        ctc_loss_weight (`float`): weight of the CTC loss beside the next-token loss when `ctc_labels` are given.
        lora (`dict`, *optional*): `peft.LoraConfig` arguments of the adapter inside the language model.
        audio_lora (`dict`, *optional*): the same for one inside the speech encoder.
        base_parts (`dict`, *optional*): for an adapter checkpoint, which frozen parts its file leaves out and where
            they come from, e.g. `{"audio_tower": "openai/whisper-base.en", "language_model": "google/gemma-2-2b-it"}`.
        quantization (`dict`, *optional*): parts kept in 4 or 8 bits, see `quantization.quantize_parts`, e.g.
            `{"language_model": {"bits": 4, "group_size": 64}, "embedding": {"bits": 8}}`.

    Raises:
        ValueError: if the parts do not fit each other; the message names both sizes.
    """

    model_type = "salmonn"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "sound_config": SubConfigSpec(config_class=AutoConfig, model_type="wav2vec2", optional=True),
        "qformer_config": SubConfigSpec(
            config_class=Blip2QFormerConfig,
            init_kwargs={"num_hidden_layers": 2, "cross_attention_frequency": 1, "encoder_hidden_size": 384},
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    sound_config: dict | PreTrainedConfig | None = None
    sound_layers: list[int] | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 0
    window_frames: int = 17
    window_stride: int = 17
    queries_per_window: int = 1
    pad_to_30_seconds: bool = False
    window_position_embeddings: bool = False
    frame_mlp_size: int = 0
    speech_decoder_layers: int = 0
    window_context: int = 0
    window_reach: int = 0
    merged_windows: int = 1
    sound_summary_size: int = 0
    sound_kinds: int = 400
    sound_name_size: int = 24
    projector_norm: bool = False
    ctc_vocab_size: int = 0
    ctc_trained_size: int = 0
    ctc_merges: int | None = None
    ctc_loss_weight: float | int = 0.0
    lora: dict | None = None
    audio_lora: dict | None = None
    base_parts: dict | None = None
    quantization: dict | None = None
    tie_word_embeddings: bool = False  # the language model ties its own

    def __post_init__(self, **kwargs):
        if not __name__.startswith("transformers_modules"):
            # Where the package is imported, its own pipeline is registered; the checkpoint's would ask for trust.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if self.audio_config.model_type != "whisper":
            raise ValueError(
                f"audio_config is of type '{self.audio_config.model_type}'; the speech encoder must be a Whisper one."
            )
        if self.sound_layers is not None:
            self.check_sound_layers()
        if bool(self.sound_summary_size) != bool(self.speech_decoder_layers and self.sound_width):
            raise ValueError(
                f"sound_summary_size is {self.sound_summary_size}, sound frames have {self.sound_width} features and "
                f"speech_decoder_layers is {self.speech_decoder_layers}; with such layers sounds need a summary, and "
                "without one of both there is none."
            )
        # Layers of Whisper's decoder read words alone; what sounds otherwise goes past them, in the summary.
        sound_width = 0 if self.speech_decoder_layers else self.sound_width
        width = self.audio_config.d_model + sound_width
        if self.qformer_config.encoder_hidden_size != width:
            raise ValueError(
                f"qformer_config.encoder_hidden_size is {self.qformer_config.encoder_hidden_size}, but the encoders "
                f"give {width} features (Whisper {self.audio_config.d_model} + sound {sound_width}). Set it to "
                f"{width}, or name the encoders this Q-Former was trained with."
            )
        if self.qformer_config.hidden_size % self.qformer_config.num_attention_heads:
            raise ValueError(
                f"qformer_config.hidden_size {self.qformer_config.hidden_size} is not a multiple of its "
                f"num_attention_heads {self.qformer_config.num_attention_heads}."
            )
        if self.window_frames < 1 or self.queries_per_window < 1 or not 1 <= self.window_stride <= self.window_frames:
            raise ValueError(
                f"window_frames {self.window_frames}, window_stride {self.window_stride} and queries_per_window "
                f"{self.queries_per_window} must be at least 1, and the stride no longer than the window."
            )
        if self.frame_mlp_size and self.window_stride % self.queries_per_window:
            raise ValueError(
                f"frame_mlp_size needs a window_stride that queries_per_window divides; {self.window_stride} frames "
                f"do not fall into {self.queries_per_window} equal shares."
            )
        if self.speech_decoder_layers:
            self.check_speech_decoder()
        elif self.merged_windows != 1:
            raise ValueError(
                f"merged_windows is {self.merged_windows}, but without speech_decoder_layers every window is kept (1)."
            )
        if not 0 <= self.audio_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"audio_token_id {self.audio_token_id} lies outside the language model's vocabulary of "
                f"{self.text_config.vocab_size} tokens; name a token that it has and text never uses."
            )

    @property
    def sound_width(self) -> int:
        """Features of a sound frame; 0 where speech alone is heard."""
        if self.sound_layers is not None:
            return self.audio_config.d_model
        return self.sound_config.hidden_size if self.sound_config is not None else 0

    def check_sound_layers(self):
        if self.sound_config is not None:
            raise ValueError("sound_layers take the place of a sound encoder; leave out these or sound_config.")
        layers = self.audio_config.encoder_layers
        if not self.sound_layers or not all(1 <= layer <= layers for layer in self.sound_layers):
            raise ValueError(
                f"sound_layers {self.sound_layers} must be numbers of the speech encoder's layers, from 1 to {layers}."
            )

    def check_speech_decoder(self):
        if self.speech_decoder_layers > self.audio_config.decoder_layers:
            raise ValueError(
                f"speech_decoder_layers is {self.speech_decoder_layers}, but the speech model's decoder has "
                f"{self.audio_config.decoder_layers} layers."
            )
        if not self.frame_mlp_size or not self.ctc_vocab_size:
            raise ValueError(
                f"speech_decoder_layers {self.speech_decoder_layers} needs frame_mlp_size and ctc_vocab_size; they "
                f"are {self.frame_mlp_size} and {self.ctc_vocab_size}."
            )
        if self.merged_windows < 1:
            raise ValueError(f"merged_windows {self.merged_windows} must be at least 1.")
        if self.window_stride != self.window_frames or self.queries_per_window != 1 or self.pad_to_30_seconds:
            raise ValueError(
                "speech_decoder_layers needs windows without overlap (window_stride = window_frames, here "
                f"{self.window_stride} and {self.window_frames}), queries_per_window 1, and clips at their own length."
            )

    def to_dict(self):
        """With what a process without the package needs to find the checkpoint's own code (`trust_remote_code`)."""
        settings = super().to_dict() | {"custom_pipelines": CUSTOM_PIPELINES}
        if settings.get("auto_map"):
            settings["auto_map"] = settings["auto_map"] | AUTO_MODELS
        return settings


SalmonnConfig.register_for_auto_class()
# Here and not in the package's __init__, so that the code in a checkpoint knows BEATs too.
AutoConfig.register("beats", BeatsConfig, exist_ok=True)

__all__ = ["SalmonnConfig"]
