"""SALMONN's own projector, a window-level Q-Former (Tang et al., ICLR 2024, https://arxiv.org/abs/2310.13289, 3.1)."""

import torch
from torch import nn
from transformers import Blip2QFormerModel

from .configuration_window_qformer import WindowQFormerConfig
from .ctc_head import SalmonnCTCHead
from .projector import SalmonnProjector
from .windows import dropout_mlp, num_windows


class WindowQFormerProjector(SalmonnProjector):
    """A few learned queries summarise each window of frames; its states are the embeddings that they project to."""

    config: WindowQFormerConfig
    config_class = WindowQFormerConfig
    _no_split_modules = ["WindowQFormerProjector"]

    def __init__(self, config: WindowQFormerConfig):
        super().__init__(config)
        hidden_size, width = config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size
        self.audio_norm = nn.LayerNorm(config.audio_hidden_size)
        self.sound_norm = nn.LayerNorm(config.sound_hidden_size) if config.sound_hidden_size else None
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries_per_window, hidden_size))
        positions = torch.zeros(config.window_frames, width) if config.window_position_embeddings else None
        self.window_positions = None if positions is None else nn.Parameter(positions)
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.proj = nn.Linear(hidden_size, config.output_size)
        self.frame_mlp = None
        if config.frame_mlp_size:
            # Of a window's own frames, those before the next window's start, each query has its equal share.
            share = config.window_stride // config.queries_per_window
            dropout = config.qformer_config.hidden_dropout_prob
            self.frame_mlp = dropout_mlp(share * width, config.frame_mlp_size, config.output_size, dropout)
        self.proj_norm = nn.LayerNorm(config.output_size) if config.output_norm else nn.Identity()
        self.ctc_head = SalmonnCTCHead(config) if config.ctc_vocab_size else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.query_tokens, std=0.02)
            if self.window_positions is not None:
                nn.init.normal_(self.window_positions)  # as strong as the frames that they are added to
        elif isinstance(module, SalmonnCTCHead):
            module.reset_parameters()

    def window_states(self, audio_frames, audio_frames_mask, sound_frames=None, sound_frames_mask=None):
        frames, mask = self.join_frames(audio_frames, audio_frames_mask, sound_frames, sound_frames_mask)
        size, stride = self.config.window_frames, self.config.window_stride
        keep_tail = not self.config.pad_to_30_seconds
        windows_of_clips = num_windows(mask.sum(-1), size, stride, keep_tail)
        length = (num_windows(mask.shape[1], size, stride, keep_tail) - 1) * stride + size
        frames = nn.functional.pad(frames, (0, 0, 0, length - frames.shape[1]))
        mask = nn.functional.pad(mask, (0, length - mask.shape[1]))

        windows, window_mask = frames.unfold(1, size, stride).transpose(2, 3), mask.unfold(1, size, stride)
        own = torch.arange(windows.shape[1], device=frames.device) < windows_of_clips[:, None]
        windows, window_mask = windows[own], window_mask[own]  # the windows of all clips in a row, without padding

        positions = 0 if self.window_positions is None else self.window_positions.to(windows.dtype)
        queries = self.qformer(
            query_embeds=self.query_tokens.expand(windows.shape[0], -1, -1),
            encoder_hidden_states=windows + positions,
            encoder_attention_mask=window_mask,
        ).last_hidden_state
        embeds = self.proj(queries)
        if self.frame_mlp is not None:
            own_frames = (windows * window_mask[..., None])[:, :stride].to(embeds.dtype)
            embeds = embeds + self.frame_mlp(own_frames.reshape(*embeds.shape[:2], -1))
        return self.proj_norm(embeds).flatten(0, 1), windows_of_clips * self.config.queries_per_window

    def join_frames(self, audio_frames, audio_frames_mask, sound_frames, sound_frames_mask):
        """
        Both streams behind their LayerNorms, side by side, and the mask of their frames. The shorter stream is
        zero-padded, after its LayerNorm, to the length of the longer. Where clips are not padded to 30 s, that is the
        speech encoder's: then `missing` may be negative, and pad cuts.
        """
        frames = self.audio_norm(audio_frames)
        if sound_frames is None:
            return frames, audio_frames_mask
        sound_frames = self.sound_norm(sound_frames) * sound_frames_mask[..., None]
        missing = frames.shape[1] - sound_frames.shape[1]
        if self.config.pad_to_30_seconds and missing < 0:
            frames = nn.functional.pad(frames, (0, 0, 0, -missing))
            audio_frames_mask = nn.functional.pad(audio_frames_mask, (0, -missing), value=True)
            missing = 0
        return torch.cat([frames, nn.functional.pad(sound_frames, (0, 0, 0, missing))], dim=-1), audio_frames_mask

    def embed(self, states, num_states, token_embedding, sound_frames=None, sound_frames_mask=None):
        return states, None

    def ctc_log_probs(self, states, token_embedding, classes=None):
        return self.ctc_head(states, token_embedding=token_embedding, classes=classes)

    def ctc_path(self, states, token_embedding):
        return self.ctc_head.best(states, token_embedding)

    @torch.no_grad()
    def initialize(self, token_embedding, whisper_directory=None, examples=()):
        """Start the projection at the mean and spread of the token embeddings, so that audio enters at their scale."""
        if not self.config.output_norm:
            return
        embedding = token_embedding.weight.float()
        self.proj_norm.bias.copy_(embedding.mean(0))
        self.proj_norm.weight.fill_(embedding.std(0).mean())


__all__ = ["WindowQFormerProjector"]
