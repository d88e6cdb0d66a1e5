"""
A projector that starts from what Whisper's own decoder knows: its last layers, one query per window, and its tokens.
Their cross-attention reads words out of the very frames that the projector gets, also words of no training clip.
"""

import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer

from .configuration_whisper_projector import WhisperProjectorConfig
from .projector import SalmonnProjector
from .sound_summary import SalmonnSoundSummary
from .whisper_token_head import WhisperTokenHead
from .window_merging import merge_wordless
from .windows import dropout_mlp, num_windows

BIAS_SCALE = 10.0  # position biases grow to several nats, with weights' learning rates


class AdditiveMaskConfig:
    """What Whisper's attention asks of a config: `eager` if the projector has it, else the other that adds masks."""

    def __init__(self, config: WhisperProjectorConfig):
        self.config = config

    @property
    def _attn_implementation(self) -> str:
        return "eager" if self.config._attn_implementation == "eager" else "sdpa"


class WhisperProjector(SalmonnProjector):
    """
    Layers of Whisper's decoder whose queries stand for a window of frames each. A query attends to the frames of its
    window and `window_context` frames on either side, and to all other queries. With `window_reach` each head learns
    by how much it prefers a window at each distance, up to so many, and a frame at each place (relative position
    biases as in T5, Raffel et al., 2020): Whisper's decoder has its position embeddings before its first layer, which
    is not here.

    Its states are those of [`WhisperTokenHead`], which makes embeddings of the language model of them; with sound
    frames, [`SalmonnSoundSummary`] gives the clip's first ones.
    """

    config: WhisperProjectorConfig
    config_class = WhisperProjectorConfig
    _no_split_modules = ["WhisperProjector"]
    base_part_prefixes = {"speech_tokens": ("model.decoder.embed_tokens.", "decoder.embed_tokens.")}
    frozen_parameters = ("speech_tokens.", "sound_summary.norm.", "sound_summary.mlp.")
    sound_parameters = ("sound_summary.marker",)
    pretrained_parameters = ("query", "layers.", "layer_norm.")
    modules_to_not_quantize = ("ctc_head",)

    def __init__(self, config: WhisperProjectorConfig):
        super().__init__(config)
        width, heads = config.audio_hidden_size, config.num_attention_heads
        layer_config = WhisperConfig(
            d_model=width,
            decoder_attention_heads=heads,
            decoder_ffn_dim=config.ffn_dim,
            activation_function=config.activation_function,
            dropout=config.dropout,
        )
        self.audio_norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.zeros(width))
        self.frame_mlp = dropout_mlp(config.window_frames * width, config.frame_mlp_size, width, config.dropout)
        self.layers = nn.ModuleList(WhisperDecoderLayer(layer_config, layer) for layer in range(config.num_layers))
        for layer in self.layers:
            layer.self_attn.config = layer.encoder_attn.config = AdditiveMaskConfig(config)
        self.layer_norm = nn.LayerNorm(width)
        if config.window_reach:
            near = 2 * config.window_context + config.window_frames
            self.window_bias = nn.Parameter(torch.zeros(config.num_layers, heads, 2 * config.window_reach + 1))
            self.frame_bias = nn.Parameter(torch.zeros(config.num_layers, heads, near))
        self.speech_tokens = nn.Embedding(config.vocab_size, width).requires_grad_(False)
        self.ctc_head = WhisperTokenHead(config)
        self.sound_summary = SalmonnSoundSummary(config) if config.sound_summary_size else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.query, std=0.02)
            if self.config.window_reach:
                nn.init.zeros_(self.window_bias)
                nn.init.zeros_(self.frame_bias)
        elif isinstance(module, WhisperTokenHead):
            for values in (module.log_scale, *module.buffers()):
                nn.init.zeros_(values)
        elif isinstance(module, SalmonnSoundSummary):
            nn.init.constant_(module.names, -1)
            nn.init.zeros_(module.marker)

    def window_states(self, audio_frames, audio_frames_mask, sound_frames=None, sound_frames_mask=None):
        size, context, reach = self.config.window_frames, self.config.window_context, self.config.window_reach
        frames = self.audio_norm(audio_frames) * audio_frames_mask[..., None]
        windows_of_clips = num_windows(audio_frames_mask.sum(-1), size, size)
        count = num_windows(frames.shape[1], size, size)
        own = torch.arange(count, device=frames.device) < windows_of_clips[:, None]
        windows = nn.functional.pad(frames, (0, 0, 0, count * size - frames.shape[1]))
        states = self.query + self.frame_mlp(windows.reshape(frames.shape[0], count, -1).to(self.query.dtype))

        starts = size * torch.arange(count, device=frames.device)[:, None]
        positions = torch.arange(frames.shape[1], device=frames.device)
        near = (positions >= starts - context) & (positions < starts + size + context)
        frame_bias = additive_mask(near & audio_frames_mask[:, None], states.dtype)
        query_bias = additive_mask(own[:, None].expand(-1, count, -1), states.dtype)
        query_biases, frame_biases = [query_bias] * len(self.layers), [frame_bias] * len(self.layers)
        if reach:
            order = torch.arange(count, device=frames.device)
            distances = (order - order[:, None]).clamp(-reach, reach) + reach
            places = (positions - starts + context).clamp(0, self.frame_bias.shape[-1] - 1)
            query_biases = [query_bias + BIAS_SCALE * bias[:, distances] for bias in self.window_bias]
            frame_biases = [frame_bias + BIAS_SCALE * bias[:, places] for bias in self.frame_bias]
        for layer, of_queries, of_frames in zip(self.layers, query_biases, frame_biases, strict=True):
            states = layer(states, of_queries, audio_frames.to(states.dtype), of_frames, use_cache=False)
        return self.layer_norm(states)[own], windows_of_clips

    def embed(self, states, num_states, token_embedding, sound_frames=None, sound_frames_mask=None):
        summary = None
        if self.sound_summary is not None and sound_frames is not None:
            of_clips = (sound_frames, sound_frames_mask, num_states)
            summary = self.sound_summary(*of_clips, token_embedding=token_embedding)
        embeds, wordless = self.ctc_head.embed(states, summary, self.speech_tokens, token_embedding)
        if self.config.merged_windows == 1:
            return embeds, None
        return merge_wordless(embeds, wordless, num_states, self.config.merged_windows)

    def vocabulary_ids(self):
        names = {} if self.sound_summary is None else {"sound_summary.names": self.sound_summary.names.flatten()}
        return super().vocabulary_ids() | names

    def ctc_log_probs(self, states, token_embedding, classes=None):
        return self.ctc_head(states, self.speech_tokens, classes)

    def word_leads(self, states, token_embedding):
        return self.ctc_head.word_leads(states, self.speech_tokens)

    def ctc_path(self, states, token_embedding):
        return self.ctc_head.best(states, self.speech_tokens)

    def ctc_training_classes(self, labels):
        return self.ctc_head.training_classes(labels)

    @torch.no_grad()
    def initialize(self, token_embedding, whisper_directory, examples: list[tuple[torch.Tensor, list[int]]]):
        """
        Take the last layers of the decoder of the Whisper in `whisper_directory`, and as query the mean state with
        which it enters them on `examples`: encoder frames `(frames, d_model)` with token ids of Whisper's tokenizer.
        """
        decoder = WhisperForConditionalGeneration.from_pretrained(whisper_directory).model.decoder.float().eval()
        last_layers = decoder.layers[-len(self.layers) :]
        entering = []
        hook = last_layers[0].register_forward_pre_hook(lambda _, args: entering.append(args[0][0]))
        start = [decoder.config.decoder_start_token_id]
        for frames, token_ids in examples:
            decoder(input_ids=torch.tensor([start + token_ids]), encoder_hidden_states=frames[None].float())
        hook.remove()
        self.query.copy_(torch.cat(entering).mean(0))
        for layer, whisper_layer in zip(self.layers, last_layers, strict=True):
            layer.load_state_dict(whisper_layer.state_dict())
        self.layer_norm.load_state_dict(decoder.layer_norm.state_dict())
        # At the start the frames add nothing to what the layers' cross-attention takes from them.
        nn.init.zeros_(self.frame_mlp[-1].weight)
        nn.init.zeros_(self.frame_mlp[-1].bias)
        nn.init.constant_(self.ctc_head.blank.bias, 10.0)  # about what Whisper's best tokens score
        self.ctc_head.proj.bias.copy_(token_embedding.weight.float().mean(0))
        nn.init.normal_(self.ctc_head.proj.weight, std=0.002)

    @torch.no_grad()
    def drop_unused_tokens(self):
        """Keep those of Whisper's token embeddings alone that the CTC head scores; see [`SalmonnProjector`]."""
        head = self.ctc_head
        used = torch.cat([head.speech_token_ids, head.capital_token_ids]).unique().long()
        for ids in (head.speech_token_ids, head.capital_token_ids):
            ids.copy_(torch.searchsorted(used, ids.long()))
        self.speech_tokens = nn.Embedding.from_pretrained(self.speech_tokens.weight[used])
        self.config.vocab_size = len(used)


def additive_mask(mask: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """`(clips, queries, keys)` to an attention bias `(clips, 1, queries, keys)`: 0 where true, else very negative."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[:, None]


__all__ = ["WhisperProjector"]
