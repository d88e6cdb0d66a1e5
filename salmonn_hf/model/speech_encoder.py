"""The speech encoder: Whisper's, over a clip's own length."""

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class SalmonnWhisperEncoder(WhisperEncoder):
    """Whisper's encoder over a clip's own length: transformers' version takes 30 s exactly and no mask."""

    main_input_name = "input_features"

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor, **kwargs) -> BaseModelOutput:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(batch, mel bins, mel frames)`), at most 3000 frames.
            attention_mask (`torch.Tensor` of shape `(batch, mel frames)`): 1 on a clip's own frames.

        Returns:
            `last_hidden_state` of shape `(batch, ceil(mel frames / 2), d_model)`.
        """
        # The convolutions look one frame ahead: padding is zeroed before each, as if the clip ended there.
        mel_mask = attention_mask[:, None].to(input_features.dtype)
        hidden_states = nn.functional.gelu(self.conv1(input_features * mel_mask)) * mel_mask
        hidden_states = nn.functional.gelu(self.conv2(hidden_states)).transpose(1, 2)
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        hidden_states = hidden_states + self.embed_positions(positions)

        attention_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask[:, ::2])
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))
