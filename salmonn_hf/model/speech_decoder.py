"""
A connector that starts from what Whisper's own decoder knows: its last layers, one query per window, and its tokens.

The decoder's cross-attention reads words out of the very frames that the connector gets: a connector that begins with
those layers reads words of which the training clips hold no example. What was measured is in docs/nano.md.
"""

import copy
import re

import torch
from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer

from .configuration_salmonn import SalmonnConfig
from .quantized_layers import QuantizedMatrix, embedding_rows
from .windows import frame_mlp, num_windows

# The blank's lead over the best token, in nats, from which a window carries no word: all tokens together then have
# less than 1e-4 of the probability, which is less than bfloat16 tells apart.
SURELY_BLANK = 20.0
UNLIKELY = 12.0  # the best one's lead, in nats, from which a token is not worth its row of the embeddings
DRAFT_LEAD = 2.0  # a token's lead over the blank, in nats, to be in a draft, which else has words too many
WORDLESS = 0.9  # the blank's probability from which a window may be merged with its neighbours
BIAS_SCALE = 10.0  # position biases grow to several nats, with weights' learning rates
SAMPLED_TOKENS = 2000  # of those that no training text has, in a training step's softmax


class SalmonnSpeechDecoder(nn.Module):
    """
    In place of the window Q-Former: layers of Whisper's decoder, whose queries stand for a window of frames each. A
    query attends to the frames of its window and `window_context` frames on either side, and to all other queries.
    With `window_reach` each head learns by how much it prefers a window at each distance, up to so many, and a frame
    at each place (relative position biases as in T5, Raffel et al., 2020): Whisper's decoder knows its places from its
    first layer on, which is not here.
    """

    def __init__(self, config: SalmonnConfig):
        super().__init__()
        self.window_frames, self.window_context = config.window_frames, config.window_context
        decoder_config = copy.deepcopy(config.audio_config)
        decoder_config._attn_implementation = "sdpa"  # the attention masks below are additive
        decoder_config.dropout = config.qformer_config.hidden_dropout_prob
        self.query = nn.Parameter(torch.zeros(decoder_config.d_model))
        self.frame_mlp = frame_mlp(config, config.window_frames, decoder_config.d_model)
        first = decoder_config.decoder_layers - config.speech_decoder_layers
        self.layers = nn.ModuleList(
            WhisperDecoderLayer(decoder_config, layer) for layer in range(first, decoder_config.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(decoder_config.d_model)
        heads, self.reach = decoder_config.decoder_attention_heads, config.window_reach
        if self.reach:
            near = 2 * self.window_context + self.window_frames
            self.window_bias = nn.Parameter(torch.zeros(config.speech_decoder_layers, heads, 2 * self.reach + 1))
            self.frame_bias = nn.Parameter(torch.zeros(config.speech_decoder_layers, heads, near))

    def reset_parameters(self):
        """What is not taken from Whisper, without values of its own: see `SalmonnPreTrainedModel._init_weights`."""
        nn.init.normal_(self.query, std=0.02)
        if self.reach:
            nn.init.zeros_(self.window_bias)
            nn.init.zeros_(self.frame_bias)

    def num_windows(self, num_frames: torch.Tensor) -> torch.Tensor:
        """Windows of each clip, see [`windows.num_windows`]."""
        return num_windows(num_frames, self.window_frames, self.window_frames)

    def forward(
        self, frames: torch.Tensor, frame_mask: torch.Tensor, speech_frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            frames (`torch.Tensor` of shape `(clips, frames, width)`): of all encoders, behind their LayerNorms.
            frame_mask (`torch.BoolTensor` of shape `(clips, frames)`).
            speech_frames (`torch.Tensor` of shape `(clips, frames, d_model)`): as Whisper's encoder gave them.

        Returns:
            States of shape `(audio tokens of all clips, d_model)`, in order, without padding, and the number of audio
            tokens of each clip, of shape `(clips,)`.
        """
        windows_of_clips = self.num_windows(frame_mask.sum(-1))
        count, size = int(windows_of_clips.max()), self.window_frames
        own = torch.arange(count, device=frames.device) < windows_of_clips[:, None]

        windows = nn.functional.pad(frames * frame_mask[..., None], (0, 0, 0, count * size - frames.shape[1]))
        states = self.query + self.frame_mlp(windows.reshape(len(frames), count, -1).to(self.query.dtype))

        starts = size * torch.arange(count, device=frames.device)[:, None]
        positions = torch.arange(frames.shape[1], device=frames.device)
        near = (positions >= starts - self.window_context) & (positions < starts + size + self.window_context)
        frame_bias = additive_mask(near & frame_mask[:, None], states.dtype)
        query_bias = additive_mask(own[:, None].expand(-1, count, -1), states.dtype)
        query_biases, frame_biases = [query_bias] * len(self.layers), [frame_bias] * len(self.layers)
        if self.reach:
            windows = torch.arange(count, device=frames.device)
            distances = (windows - windows[:, None]).clamp(-self.reach, self.reach) + self.reach
            places = (positions - starts + self.window_context).clamp(0, self.frame_bias.shape[-1] - 1)
            query_biases = [query_bias + BIAS_SCALE * bias[:, distances] for bias in self.window_bias]
            frame_biases = [frame_bias + BIAS_SCALE * bias[:, places] for bias in self.frame_bias]
        for layer, of_queries, of_frames in zip(self.layers, query_biases, frame_biases, strict=True):
            states = layer(states, of_queries, speech_frames.to(states.dtype), of_frames, use_cache=False)
        return self.layer_norm(states)[own], windows_of_clips


def additive_mask(seen: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """`(clips, queries, keys)` to an attention bias `(clips, 1, queries, keys)`: 0 where seen, else very negative."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class SalmonnSpeechTokenHead(nn.Module):
    """
    CTC (Graves et al., 2006) over Whisper's token embeddings, for those tokens the language model has too; and the
    way from there into the language model: the mean of its own embeddings of those tokens, by probability, as
    in LegoSLM (Ma et al., 2025). Where the blank is likely, a linear map of the state takes the tokens' place, and
    the clip's [`SalmonnSoundSummary`] with it; they carry what is no word.
    """

    def __init__(self, config: SalmonnConfig):
        super().__init__()
        self.width = width = config.audio_config.d_model
        self.num_trained = config.ctc_trained_size
        for name in ("token_ids", "speech_token_ids", "capital_token_ids"):
            self.register_buffer(name, torch.zeros(config.ctc_vocab_size, dtype=torch.int32))
        self.blank = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.proj = nn.Linear(width, config.text_config.hidden_size)
        self.read = None, None  # the states that `embed` took last, and what `best` says of them

    def forward(
        self, audio_embeds: torch.Tensor, speech_tokens: nn.Module, classes: torch.LongTensor | None = None
    ) -> torch.Tensor:
        r"""
        Args:
            audio_embeds (`torch.Tensor` of shape `(..., d_model)` or more): states of [`SalmonnSpeechDecoder`]; what
                stands behind them is left out.
            speech_tokens (`nn.Module`): Whisper's token embeddings.
            classes (`torch.LongTensor` of shape `(classes,)`, *optional*): indices into `token_ids`; default: all.

        Returns:
            float32 log-probabilities of shape `(..., 1 + classes)`: the blank, then the tokens.
        """
        states = audio_embeds[..., : self.width].flatten(0, -2)  # as a plain matrix product, see SalmonnCTCHead
        scores = self.token_scores(states, speech_tokens, classes).float() * self.log_scale.exp()
        log_probs = torch.cat([self.blank(states).float(), scores], dim=-1).log_softmax(-1)
        return log_probs.unflatten(0, audio_embeds.shape[:-1])

    def token_scores(self, states: torch.Tensor, speech_tokens: nn.Module, classes=None) -> torch.Tensor:
        """States `(windows, d_model)` to their products with the tokens, in the better of their two spellings."""
        spellings = (self.speech_token_ids, self.capital_token_ids)
        trained = torch.is_grad_enabled() and states.requires_grad
        if classes is None and not trained:
            # Of a clip's few states the products with all of Whisper's tokens take less time than to gather rows.
            if isinstance(speech_tokens, QuantizedMatrix):
                products = speech_tokens.product(states).T
            else:
                products = speech_tokens.weight.to(states.dtype) @ states.T
            return torch.maximum(*(products.index_select(0, ids) for ids in spellings)).T.contiguous()
        if classes is not None:
            spellings = (ids[classes] for ids in spellings)
        spellings = (embedding_rows(speech_tokens, ids) for ids in spellings)
        return torch.maximum(*(nn.functional.linear(states, rows.to(states.dtype)) for rows in spellings))

    def training_classes(self, labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        The tokens that a training step chooses among, and its labels as indices into them: all tokens of the training
        texts, and a sample of the others, which training can but push away from all that it hears.
        """
        others = torch.randperm(len(self.token_ids) - self.num_trained, device=labels.device)[:SAMPLED_TOKENS]
        trained = torch.arange(self.num_trained, device=labels.device)
        classes = torch.cat([trained, self.num_trained + others, labels[labels != -100]]).unique()
        return classes, torch.where(labels == -100, labels, torch.searchsorted(classes, labels))

    def embed(
        self, audio_embeds: torch.Tensor, speech_tokens: nn.Module, embedding: nn.Module
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        States `(audio tokens, d_model)`, behind each of which its clip's summary `(hidden size,)` may stand, to the
        language model's space, `(audio tokens, hidden size)`; and which of them carry no word, `(audio tokens,)`.
        """
        states, summary = audio_embeds.split([self.width, audio_embeds.shape[-1] - self.width], dim=-1)
        embeds = self.proj(states)
        named = torch.zeros_like(states[:, 0], dtype=torch.bool)
        if summary.shape[-1]:
            named = summary.any(-1)
            embeds = torch.where(named[:, None], summary.to(embeds.dtype), embeds)
        blank, scores = self.blank(states).float(), self.token_scores(states, speech_tokens)
        scale = self.log_scale.exp()
        # Most windows carry no word, and of these nothing but the best score has to be computed.
        with torch.no_grad():
            best, best_token = scores.max(-1, keepdim=True)
            best = best.float() * scale
            if not self.training:
                self.read = audio_embeds, drafted(best, best_token, blank)[:, 0]
            worded = (best > blank - SURELY_BLANK).nonzero()[:, 0]
            least = (torch.maximum(best, blank) - UNLIKELY) / scale
        # Few tokens are likely anywhere. The others are left out of each window apart from its neighbours, for a clip
        # to be heard alike in any company.
        scores = scores.index_select(0, worded)
        likely = scores > least[worded].to(scores.dtype)
        tokens = likely.any(0).nonzero()[:, 0]
        scores = (scores.index_select(1, tokens).float() * scale).masked_fill(
            ~likely.index_select(1, tokens), float("-inf")
        )
        probabilities = torch.cat([blank[worded], scores], dim=-1).softmax(-1)
        rows = embedding_rows(embedding, self.token_ids[tokens])
        words = probabilities[:, 1:].to(rows.dtype) @ rows
        wordless = torch.ones_like(blank[:, 0], dtype=torch.bool)
        wordless[worded] = probabilities[:, 0] > WORDLESS
        read = words + probabilities[:, :1] * embeds[worded]
        return embeds.index_copy(0, worded, read.to(embeds.dtype)), wordless & ~named

    def best(self, audio_embeds: torch.Tensor, speech_tokens: nn.Module) -> torch.Tensor:
        """
        What a draft has of each state `(audio tokens, d_model)` or more: index of the likeliest output, 0 for the
        blank, and for a token that leads the blank by less than `DRAFT_LEAD`.
        """
        if self.read[0] is audio_embeds:  # a clip's draft is read behind its prompt
            return self.read[1]
        states = audio_embeds[:, : self.width]
        scores, tokens = self.token_scores(states, speech_tokens).max(-1)
        return drafted(scores.float() * self.log_scale.exp(), tokens, self.blank(states)[:, 0].float())


def drafted(best: torch.Tensor, tokens: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """Index of the output to draft: see `SalmonnSpeechTokenHead.best`; `best` and `blank` are scores in nats."""
    return torch.where(best > blank + DRAFT_LEAD, tokens + 1, 0)


def shared_tokens(tokenizer, speech_tokenizer) -> list[tuple[int, int, int]]:
    """
    The tokens of lower-case letters that two byte-pair tokenizers have in common: `(id, id in speech_tokenizer, its id
    there with a capital)`, by their second; the last repeats the second where no one token is so spelt.
    """
    vocabulary, speech_vocabulary = tokenizer.get_vocab(), speech_tokenizer.get_vocab()
    shared = []
    for token, speech_id in sorted(speech_vocabulary.items(), key=lambda item: item[1]):
        if token in vocabulary and re.fullmatch(r"\u0120?[a-z']+", token):  # \u0120: a space, in byte-level BPE
            # Only a word's start can be a capital, and Whisper begins a sentence with one.
            capital = token[0] + token[1:].capitalize() if token[0] == "\u0120" else token
            shared.append((vocabulary[token], speech_id, speech_vocabulary.get(capital, speech_id)))
    return shared


@torch.no_grad()
def start_from_whisper(model, directory, examples: list[tuple[torch.Tensor, list[int]]]):
    """
    Give the connector the last layers of Whisper's decoder, and as query the mean state with which that decoder enters
    them when it reads `examples`: encoder frames `(frames, d_model)` with token ids of Whisper's own tokenizer.
    """
    decoder = WhisperForConditionalGeneration.from_pretrained(directory).model.decoder.float().eval()
    connector = model.connector
    kept = decoder.layers[-len(connector.layers) :]
    entering = []
    hook = kept[0].register_forward_pre_hook(lambda _, args: entering.append(args[0][0]))
    start = [decoder.config.decoder_start_token_id]
    for frames, token_ids in examples:
        decoder(input_ids=torch.tensor([start + token_ids]), encoder_hidden_states=frames[None].float())
    hook.remove()
    connector.query.copy_(torch.cat(entering).mean(0))
    for layer, whisper_layer in zip(connector.layers, kept, strict=True):
        layer.load_state_dict(whisper_layer.state_dict())
    connector.layer_norm.load_state_dict(decoder.layer_norm.state_dict())
    # At the start the frames say nothing beyond what the layers read from them.
    nn.init.zeros_(connector.frame_mlp[-1].weight)
    nn.init.zeros_(connector.frame_mlp[-1].bias)
    nn.init.constant_(model.ctc_head.blank.bias, 10.0)  # about what Whisper's best tokens score
    model.ctc_head.proj.bias.copy_(model.get_input_embeddings().weight.float().mean(0))
    nn.init.normal_(model.ctc_head.proj.weight, std=0.002)


@torch.no_grad()
def drop_unused_tokens(model):
    """Keep of Whisper's token embeddings those alone that the head scores. The model then has to be saved whole."""
    head, embedding = model.ctc_head, model.speech_tokens
    used = torch.cat([head.speech_token_ids, head.capital_token_ids]).unique().long()
    for ids in (head.speech_token_ids, head.capital_token_ids):
        ids.copy_(torch.searchsorted(used, ids.long()))
    model.speech_tokens = nn.Embedding.from_pretrained(embedding.weight[used])
    model.config.audio_config.vocab_size = len(used)
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config.audio_config, name, 0)  # none of them is kept, and a start token has to be a number
    model.config.base_parts = None
