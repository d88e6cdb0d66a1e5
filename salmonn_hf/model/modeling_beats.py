"""BEATs: waveform → mel filterbank → patches → transformer → one embedding per patch.

Chen et al., "BEATs: Audio Pre-Training with Acoustic Tokenizers", ICML 2023 (https://arxiv.org/abs/2212.09058),
section 3.1. This file reads in the order in which data flows.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.wavlm.modeling_wavlm import WavLMPositionalConvEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_beats import BeatsConfig
from .fbank import kaldi_fbank, num_fbank_frames


class BeatsPatchEmbedding(nn.Module):
    """Normalised mel filterbanks to one embedding per patch."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.patch = nn.Conv2d(1, config.embed_dim, config.patch_size, config.patch_size, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        same = config.embed_dim == config.hidden_size
        self.projection = nn.Identity() if same else nn.Linear(config.embed_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, mel bins)` to `(batch, tokens, hidden size)`: by time, and within a time by frequency."""
        patches = self.patch(fbank[:, None].to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        return self.dropout(self.projection(self.layer_norm(patches)))


class BeatsRelativePositionBias(nn.Module):
    """A learned bias on attention scores by head and bucket of the distance, as in T5 (arXiv:1910.10683, 2.1)."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.num_buckets = config.num_buckets
        self.max_distance = config.max_distance
        self.bias = nn.Embedding(config.num_buckets, config.num_attention_heads)

    def buckets(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """`(length, length)`: half of the buckets for keys up to the query, half for those after it; in each half one
        per distance at first, then wider ones, logarithmically, up to `max_distance`."""
        positions = torch.arange(length, device=device)
        offsets = positions[None, :] - positions[:, None]
        distances = offsets.abs()
        half = self.num_buckets // 2
        exact = half // 2
        steps = torch.log(distances.float() / exact) / math.log(self.max_distance / exact) * (half - exact)
        far = (exact + steps.clamp(min=0).long()).clamp(max=half - 1)
        return torch.where(distances < exact, distances, far) + half * (offsets > 0)

    def forward(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """The bias, `(1, heads, queries, keys)`."""
        return self.bias(self.buckets(length, device)).permute(2, 0, 1)[None]


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, position_bias=None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BeatsAttention(nn.Module):
    """Self-attention; the relative position bias is scaled by a gate on the query (WavLM, arXiv:2110.13900, 3.1)."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if config.gated_position_bias:
            self.gate = nn.Linear(self.head_dim, 8)
            self.gate_scale = nn.Parameter(torch.ones(1, config.num_attention_heads, 1, 1))

    def gated(self, position_bias: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        # Each of the two gates is the sum of four outputs: so WavLM has it, and so the weights were trained.
        update, reset = self.gate(query).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        return (update * (reset * self.gate_scale - 1.0) + 2.0) * position_bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (linear(hidden_states).view(heads).transpose(1, 2) for linear in projections)
        if position_bias is not None and self.config.gated_position_bias:
            position_bias = self.gated(position_bias, query)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return self.out_proj(output.flatten(2)), weights


class BeatsFeedForward(nn.Module):
    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.activation(self.fc1(hidden_states))))


class BeatsLayer(GradientCheckpointingLayer):
    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25 if config.deep_norm else 1.0
        self.attention = BeatsAttention(config)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = BeatsFeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        if config.deep_norm:
            # DeepNorm, figure 2: what ends in a residual starts small.
            attention, feed_forward = self.attention, self.feed_forward
            for linear in (attention.v_proj, attention.out_proj, feed_forward.fc1, feed_forward.fc2):
                linear.deep_norm_gain = (8 * config.num_hidden_layers) ** -0.25
            for linear in (attention.q_proj, attention.k_proj):
                linear.deep_norm_gain = 1.0

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if self.pre_norm:
            normed = self.attention_layer_norm(hidden_states)
            attended = self.attention(normed, attention_mask, position_bias, **kwargs)[0]
            hidden_states = hidden_states + self.dropout(attended)
            return hidden_states + self.dropout(self.feed_forward(self.final_layer_norm(hidden_states)))

        attended = self.dropout(self.attention(hidden_states, attention_mask, position_bias, **kwargs)[0])
        hidden_states = self.attention_layer_norm(self.residual_scale * hidden_states + attended)
        transformed = self.dropout(self.feed_forward(hidden_states))
        return self.final_layer_norm(self.residual_scale * hidden_states + transformed)


def scale_gradient(hidden_states: torch.Tensor, scale: float) -> torch.Tensor:
    """The identity, whose gradient is scaled."""
    hidden_states = hidden_states.view_as(hidden_states)
    if hidden_states.requires_grad:
        hidden_states.register_hook(lambda gradient: gradient * scale)
    return hidden_states


class BeatsPreTrainedModel(PreTrainedModel):
    config: BeatsConfig
    config_class = BeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["BeatsLayer", "ParametrizedConv1d"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BeatsLayer, "attentions": BeatsAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # By module with weights of its own: transformers passes over the others, in a model that is not its own.
        if isinstance(module, nn.Conv1d):
            std = math.sqrt(4 / (module.kernel_size[0] * module.in_channels))  # as in wav2vec 2.0
            magnitude, direction = module.parametrizations.weight.original0, module.parametrizations.weight.original1
            init.normal_(direction, std=std)
            init.copy_(magnitude, direction.norm(dim=(0, 1), keepdim=True))
        elif hasattr(module, "gate_scale"):
            init.ones_(module.gate_scale)
        elif hasattr(module, "deep_norm_gain"):
            init.xavier_normal_(module.weight, gain=module.deep_norm_gain)

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor | int) -> torch.Tensor | int:
        """Tokens of clips of `input_lengths` samples: 0 for a clip that is too short for one patch."""
        size = self.config.patch_size
        return (self.config.num_mel_bins // size) * (num_fbank_frames(input_lengths) // size)


class BeatsModel(BeatsPreTrainedModel):
    """BEATs without a head. A clip's embeddings do not depend on the batch that it is in."""

    def __init__(self, config: BeatsConfig):
        super().__init__(config)
        self.patch_embedding = BeatsPatchEmbedding(config)
        self.positional_conv_embedding = WavLMPositionalConvEmbedding(config)
        self.relative_position_bias = BeatsRelativePositionBias(config) if config.relative_position_bias else None
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([BeatsLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self):
        return self.patch_embedding

    def fbank(self, input_values: torch.Tensor) -> torch.Tensor:
        """`(batch, samples)` to float32 `(batch, frames, mel bins)`, normalised; see [`kaldi_fbank`]."""
        fbank = kaldi_fbank(input_values, self.config.num_mel_bins)
        return (fbank - self.config.fbank_mean) / (2 * self.config.fbank_std)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(batch, samples)`): 16 kHz waveforms in [-1, 1], padded on the
                right. Best in float32, also for a model in half precision: the filterbank is computed from them.
            attention_mask (`torch.Tensor` of shape `(batch, samples)`, *optional*): 1 on a clip's own samples.

        Returns:
            `last_hidden_state` of shape `(batch, tokens, hidden_size)`, 0 on padding: 8 tokens, one per patch of 16
            mel bins, for each 160 ms. See `_get_feat_extract_output_lengths` for the number of a clip's own.

        Raises:
            ValueError: if the batch is too short for one patch; on a CPU also for NaN or infinite samples, which on
                other devices [`BeatsFeatureExtractor`] alone tells, for the model would have to wait for the device.
        """
        samples = input_values.shape[-1]
        if self._get_feat_extract_output_lengths(samples) == 0:
            shortest = 400 + 160 * (self.config.patch_size - 1)
            raise ValueError(
                f"The longest clip has {samples} samples; BEATs needs {shortest} ({shortest / 16:.0f} ms at 16 kHz) "
                "for one patch. Give longer audio, or append silence."
            )
        checked = input_values.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and not input_values.isfinite().all():
            raise ValueError("input_values hold NaN or infinite samples; leave the damaged clip out, or repair it.")
        hidden_states = self.patch_embedding(self.fbank(input_values))
        padding = None
        if attention_mask is not None:
            lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
            own = torch.arange(hidden_states.shape[1], device=lengths.device) < lengths[:, None]
            padding = ~own[..., None]
            # Masked, not multiplied: padding may hold anything, and the convolution must see silence there.
            hidden_states = hidden_states.masked_fill(padding, 0.0)
            attention_mask = create_bidirectional_mask(self.config, hidden_states, own)

        hidden_states = hidden_states + self.positional_conv_embedding(hidden_states)
        if not self.config.pre_norm:
            hidden_states = self.layer_norm(hidden_states)
        hidden_states = self.dropout(hidden_states)

        relative = self.relative_position_bias
        position_bias = None if relative is None else relative(hidden_states.shape[1], hidden_states.device)
        for layer in self.layers:
            if self.training and self.config.gradient_decay != 1:
                hidden_states = scale_gradient(hidden_states, self.config.gradient_decay)
            if not (self.training and torch.rand([]) < self.config.layerdrop):
                hidden_states = layer(hidden_states, attention_mask, position_bias, **kwargs)

        if self.config.pre_norm:
            hidden_states = self.layer_norm(hidden_states)
        if padding is not None:
            hidden_states = hidden_states.masked_fill(padding, 0.0)
        return BaseModelOutput(last_hidden_state=hidden_states)


class BeatsForAudioClassification(BeatsPreTrainedModel):
    """BEATs with a linear classifier on each token, whose logits are averaged over a clip's own tokens."""

    def __init__(self, config: BeatsConfig):
        super().__init__(config)
        self.beats = BeatsModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_values, attention_mask: as for [`BeatsModel`].
            labels (`torch.Tensor`, *optional*): float `(batch, num_labels)` of 0 and 1 where `config.problem_type` is
                "multi_label_classification", as in converted checkpoints; else class numbers `(batch,)`.

        Returns:
            `logits` of shape `(batch, num_labels)`; their sigmoid is the probability of each label. A clip too short
            for one patch, beside longer ones, has the logits of the classifier's bias alone.

        Raises:
            ValueError: as [`BeatsModel`].
        """
        outputs = self.beats(input_values, attention_mask, **kwargs)
        # The mean of the tokens' logits is the logits of their mean: padding is 0 and takes no part in the sum.
        hidden_states = self.dropout(outputs.last_hidden_state)
        if attention_mask is None:
            pooled = hidden_states.mean(1)
        else:
            lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1)).clamp(min=1)
            pooled = hidden_states.sum(1) / lengths[:, None]
        logits = self.classifier(pooled.to(hidden_states.dtype))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = ["BeatsForAudioClassification", "BeatsModel", "BeatsPreTrainedModel"]
