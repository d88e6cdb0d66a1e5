"""The speech decoder: Whisper's own, over the frames of a clip's own length; its greedy transcript and its states."""

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from .quantized_layers import QuantizedMatrix, embedding_rows

# Logistic regression on clips of speech, sounds and noise: how much speaks against words in a clip, see `no_speech`.
# At this limit 4 of 350 clips of speech have none (sighs, lone syllables), and of 168 without speech 154, all noise
# among them.
NO_SPEECH_WEIGHT, END_WEIGHT, UNSURE_WEIGHT, BIAS, LIMIT = 0.5, 0.76, 2.4, 2.6, 1.0


class SalmonnWhisperDecoder(WhisperDecoder):
    """Whisper's decoder over padded frames: transformers' version takes 30 s exactly and no mask."""

    def forward(
        self,
        input_ids: torch.LongTensor,
        frames: torch.Tensor,
        frames_bias: torch.Tensor,
        cache: EncoderDecoderCache | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(clips, tokens)`): behind those in `cache`; no row is padded left.
            frames (`torch.Tensor` of shape `(clips, frames, d_model)`): the speech encoder's.
            frames_bias (`torch.Tensor` of shape `(clips, 1, 1, frames)`): added to attention scores, see
                `attention_bias`.

        Returns:
            States behind the last LayerNorm, `(clips, tokens, d_model)`; their products with the token embeddings are
            the scores of the next token.
        """
        known, tokens = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        positions = torch.arange(known, known + tokens, device=input_ids.device)
        states = self.embed_tokens(input_ids) + self.embed_positions.weight[positions]
        causal = None
        if tokens > 1:
            places = torch.arange(known + tokens, device=input_ids.device)
            causal = attention_bias(places <= positions[:, None], states.dtype)
        for layer in self.layers:
            states = layer(states, causal, frames, frames_bias, past_key_values=cache, use_cache=cache is not None)
        return self.layer_norm(states)

    def token_scores(self, states: torch.Tensor) -> torch.Tensor:
        """Products of states `(rows, d_model)` with the token embeddings, `(rows, vocabulary)`."""
        tokens = self.embed_tokens
        if isinstance(tokens, QuantizedMatrix):
            return tokens.product(states)
        return nn.functional.linear(states, tokens.weight)

    @torch.no_grad()
    def transcribe(
        self,
        frames: torch.Tensor,
        frames_mask: torch.BoolTensor,
        config,
        banned: torch.BoolTensor,
        limits: list[int],
    ) -> tuple[list[torch.LongTensor], list[torch.Tensor]]:
        r"""
        Greedy decoding of each clip; clips that have ended leave the batch. Where Whisper takes a clip to be no
        speech, and is unsure of what it has written, the transcript is empty.

        Args:
            frames (`torch.Tensor` of shape `(clips, frames, d_model)`), frames_mask (`(clips, frames)`).
            config ([`WhisperDecoderProjectorConfig`]): its `prompt_ids`, `end_id` and `no_speech_id`.
            banned (`torch.BoolTensor` of shape `(2, vocabulary)`): tokens that no transcript begins with, and tokens
                that none holds.
            limits (`list[int]`): the most tokens of each clip's transcript, without the end token.

        Returns:
            For each clip its token ids `(tokens,)`, the last of which is `end_id` wherever it has ended, and the state
            that predicted each `(tokens, d_model)`.
        """
        end_id = config.end_id
        device, bias = frames.device, attention_bias(frames_mask, frames.dtype)[:, None, None]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = torch.tensor([config.prompt_ids], device=device).expand(len(frames), -1)
        left = torch.tensor(limits, device=device) + 1
        rows = torch.arange(len(frames), device=device)
        said, states = [[] for _ in limits], [[] for _ in limits]
        log_probs, step = torch.zeros(len(frames), device=device), 0
        while len(rows):
            seen = self(ids, frames, bias, cache)
            state = seen[:, -1]
            scores = self.token_scores(state).float()
            ids = scores.masked_fill(banned[min(step, 1)], float("-inf")).argmax(-1, keepdim=True)
            if step == 0:
                no_speech = self.no_speech(seen[:, 0], scores, config)
                ids[no_speech > LIMIT] = end_id  # whatever the words would be
            log_probs[rows] += scores.gather(1, ids)[:, 0] - scores.logsumexp(-1)
            for place, row in enumerate(rows.tolist()):
                said[row].append(ids[place])
                states[row].append(state[place])
            step += 1
            goes_on = ((ids[:, 0] != end_id) & (step < left[rows])).nonzero()[:, 0]
            if len(goes_on) < len(rows):
                rows, ids, bias = rows[goes_on], ids[goes_on], bias[goes_on]
                frames = frames[goes_on]
                cache.batch_select_indices(goes_on)
        lengths = torch.tensor([len(tokens) for tokens in said], device=device)
        for clip in (no_speech - UNSURE_WEIGHT * log_probs / lengths > LIMIT).nonzero()[:, 0].tolist():
            said[clip], states[clip] = [ids.new_tensor([end_id])], states[clip][:1]
        return [torch.cat(tokens) for tokens in said], [torch.stack(of_clip) for of_clip in states]

    def no_speech(self, first_state: torch.Tensor, scores: torch.Tensor, config) -> torch.Tensor:
        """
        How much speaks against words in each clip, `(clips,)`, before any is written: by how much Whisper, behind its
        first token, prefers the one for that to the prompt's next one, and behind the whole prompt the end.

        Args:
            first_state (`torch.Tensor` of shape `(clips, d_model)`): behind the first token.
            scores (`torch.Tensor` of shape `(clips, vocabulary)`): of the transcript's first token.
        """
        candidates = torch.tensor([config.no_speech_id, config.prompt_ids[1]], device=first_state.device)
        candidates = embedding_rows(self.embed_tokens, candidates).to(first_state.dtype)
        no_speech, prompt = nn.functional.linear(first_state, candidates).float().unbind(-1)
        end = scores[:, config.end_id] - scores.logsumexp(-1)
        return NO_SPEECH_WEIGHT * (no_speech - prompt) + END_WEIGHT * end + BIAS


def attention_bias(mask: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores: 0 where `mask` is true, else very negative; of the same shape."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
