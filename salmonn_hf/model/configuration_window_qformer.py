"""Configuration of SALMONN's own projector, the window-level Q-Former."""

from huggingface_hub.dataclasses import strict
from transformers import Blip2QFormerConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_projector import ProjectorConfig

# SALMONN's. The width of the frames is filled in by `fit_to`.
QFORMER_DEFAULTS = {"num_hidden_layers": 2, "cross_attention_frequency": 1, "encoder_hidden_size": 0}


@strict
class WindowQFormerConfig(ProjectorConfig):
    r"""
    Configuration of [`WindowQFormerProjector`]; see [`ProjectorConfig`] for the other fields.

    Args:
        qformer_config (`Blip2QFormerConfig` or `dict`): the Q-Former. Its `encoder_hidden_size` is the width of the
            joined encoder frames.
        window_stride (`int`): frames between the starts of two windows. SALMONN: 17.
        queries_per_window (`int`): learned queries, and so audio tokens, per window. SALMONN: 1.
        pad_to_30_seconds (`bool`): SALMONN's original geometry. Every clip is padded to 30 s by the feature extractor,
            whose field has the same name, and an incomplete last window is dropped: 88 audio tokens, whatever the
            clip. `False`: the tail of a clip is kept.
        window_position_embeddings (`bool`): add a learned position to the frames of a window, so that the queries can
            tell its start from its end. SALMONN has none.
        output_norm (`bool`): LayerNorm after the projection into the language model. SALMONN has none.

    With `frame_mlp_size`, an MLP beside the Q-Former takes the frames that a query stands for straight to its
    embedding; a small model then aligns several times faster. SALMONN has none.

    Raises:
        ValueError: if the sizes do not fit each other.
    """

    model_type = "salmonn_window_qformer"
    sub_configs_defaults = {"qformer_config": SubConfigSpec(Blip2QFormerConfig, init_kwargs=QFORMER_DEFAULTS)}

    qformer_config: dict | PreTrainedConfig | None = None
    window_stride: int = 17
    queries_per_window: int = 1
    pad_to_30_seconds: bool = False
    window_position_embeddings: bool = False
    output_norm: bool = False

    def __post_init__(self, **kwargs):
        if isinstance(self.qformer_config, dict):
            self.qformer_config = QFORMER_DEFAULTS | self.qformer_config
        super().__post_init__(**kwargs)
        size, heads = self.qformer_config.hidden_size, self.qformer_config.num_attention_heads
        if size % heads:
            raise ValueError(
                f"qformer_config.hidden_size {size} is not a multiple of its num_attention_heads {heads}."
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

    @property
    def description(self) -> str:
        return f"a {self.qformer_config.num_hidden_layers}-layer window Q-Former"

    def fit_to(self, audio_config, sound_hidden_size, text_config):
        """As in [`ProjectorConfig`]; the Q-Former's `encoder_hidden_size` is filled in as well."""
        width = audio_config.d_model + sound_hidden_size
        if self.qformer_config.encoder_hidden_size not in (0, width):
            raise ValueError(
                f"qformer_config.encoder_hidden_size is {self.qformer_config.encoder_hidden_size}, but the encoders "
                f"give {width} features (Whisper {audio_config.d_model} + sound {sound_hidden_size}). Set it to "
                f"{width}, or name the encoders this Q-Former was trained with."
            )
        self.qformer_config.encoder_hidden_size = width
        super().fit_to(audio_config, sound_hidden_size, text_config)


__all__ = ["WindowQFormerConfig"]
