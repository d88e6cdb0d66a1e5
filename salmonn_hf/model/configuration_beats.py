"""Configuration of BEATs, an encoder of sound."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class BeatsConfig(PreTrainedConfig):
    r"""
    Configuration of [`BeatsModel`] and [`BeatsForAudioClassification`]. The defaults are the sizes of the published
    BEATs models (Chen et al., "BEATs: Audio Pre-Training with Acoustic Tokenizers", https://arxiv.org/abs/2212.09058),
    without their dropout.

    Args:
        patch_size (`int`): mel bins and frames on each side of a patch, 10 ms each frame.
        embed_dim (`int`): width of a patch embedding, before its projection to `hidden_size`.
        conv_bias (`bool`): give the patch embedding a bias.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): of the transformer.
        hidden_act (`str`): activation of the feed-forward blocks.
        pre_norm (`bool`): LayerNorm before each block and once at the end, not after each block.
        deep_norm (`bool`): DeepNorm (https://arxiv.org/abs/2203.00555): a residual is scaled by (2·layers)^¼.
        feat_proj_dropout (`float`): dropout on the projected patch embeddings.
        hidden_dropout, attention_dropout, activation_dropout (`float`): dropout after each block, on the attention
            probabilities, and inside the feed-forward blocks.
        classifier_dropout (`float`): dropout before the classifier.
        layerdrop (`float`): probability of leaving out a layer in training.
        gradient_decay (`float`): factor on the gradient at the entry of each layer.
        num_conv_pos_embeddings, num_conv_pos_embedding_groups (`int`): kernel size, in tokens, and groups of the
            convolution that embeds positions.
        relative_position_bias (`bool`): add a learned bias, by head and bucket of the distance, to the attention
            scores of all layers.
        num_buckets, max_distance (`int`): buckets of the distance, as in T5; those from `max_distance` tokens on share
            one.
        gated_position_bias (`bool`): scale the bias by a gate on the query.
        num_mel_bins (`int`): of the mel filterbank.
        fbank_mean, fbank_std (`float`): the filterbank x enters as (x - fbank_mean) / (2·fbank_std).
        initializer_range, layer_norm_eps (`float`).

    Raises:
        ValueError: if sizes do not fit each other; the message names them.
    """

    model_type = "beats"
    feat_extract_activation = "gelu"  # of the convolution that embeds positions, under the name that WavLM's has

    patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    pre_norm: bool = False
    deep_norm: bool = True
    feat_proj_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    layerdrop: float | int = 0.0
    gradient_decay: float | int = 1.0
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    relative_position_bias: bool = True
    num_buckets: int = 320
    max_distance: int = 800
    gated_position_bias: bool = True
    num_mel_bins: int = 128
    fbank_mean: float = 15.41663
    fbank_std: float = 6.55582
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for size in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if getattr(self, size) < 1 or self.hidden_size % getattr(self, size):
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {size} {getattr(self, size)}.")
        if not 1 <= self.patch_size <= self.num_mel_bins:
            raise ValueError(f"patch_size {self.patch_size} does not lie in 1..{self.num_mel_bins} (num_mel_bins).")
        if self.pre_norm and self.deep_norm:
            raise ValueError("deep_norm scales residuals that are normalised after the sum; it excludes pre_norm.")
        if self.relative_position_bias and not 0 < self.num_buckets // 4 < self.max_distance:
            raise ValueError(
                f"num_buckets {self.num_buckets} must be 4 or more, and a quarter of them, which are the distances "
                f"with a bucket of their own, less than max_distance {self.max_distance}."
            )


__all__ = ["BeatsConfig"]
