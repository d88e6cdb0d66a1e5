"""The CTC head of the projector made of Whisper's decoder, and the way from there into the language model."""

import torch
from torch import nn

from .configuration_whisper_projector import WhisperProjectorConfig
from .quantized_layers import QuantizedMatrix, embedding_rows

# The blank's lead over the best token, in nats, from which a window carries no word: all tokens together then have
# less than 1e-4 of the probability, which is less than bfloat16 tells apart.
SURELY_BLANK = 20.0
UNLIKELY = 12.0  # the best one's lead, in nats, from which a token is not worth its row of the embeddings
DRAFT_LEAD = 2.0  # a token's lead over the blank, in nats, to be in a draft, which else has words too many
WORDLESS = 0.9  # the blank's probability from which a window may be merged with its neighbours
SAMPLED_TOKENS = 2000  # of those that no training text has, in a training step's softmax


class WhisperTokenHead(nn.Module):
    """
    CTC (Graves et al., 2006) over Whisper's token embeddings, for those tokens the language model has too; and the
    embedding that the language model gets for each state: the mean of its own embeddings of those tokens, by
    probability, as in LegoSLM (Ma et al., 2025). Where the blank is likely, a linear map of the state, or the clip's
    [`SalmonnSoundSummary`], takes the tokens' place; they carry what is no word.
    """

    def __init__(self, config: WhisperProjectorConfig):
        super().__init__()
        self.width = width = config.audio_hidden_size
        self.num_trained = config.ctc_trained_size
        for name in ("token_ids", "speech_token_ids", "capital_token_ids"):
            self.register_buffer(name, torch.zeros(config.ctc_vocab_size, dtype=torch.int32))
        self.blank = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.proj = nn.Linear(width, config.output_size)
        self.last_path = None, None  # the states that `embed` took last, and what `best` gives for them

    def forward(
        self, states: torch.Tensor, speech_tokens: nn.Module, classes: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        States `(..., d_model)` to float32 log-probabilities `(..., 1 + classes)`, the blank's first. `speech_tokens`
        are Whisper's token embeddings, `classes` `(classes,)` indices into `token_ids`; default: all.
        """
        rows = states.flatten(0, -2)  # as a plain matrix product, see SalmonnCTCHead
        scores = self.token_scores(rows, speech_tokens, classes).float() * self.log_scale.exp()
        log_probs = torch.cat([self.blank(rows).float(), scores], dim=-1).log_softmax(-1)
        return log_probs.unflatten(0, states.shape[:-1])

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
        spellings = (embedding_rows(speech_tokens, ids if classes is None else ids[classes]) for ids in spellings)
        return torch.maximum(*(nn.functional.linear(states, rows.to(states.dtype)) for rows in spellings))

    def training_classes(self, labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        The tokens that a training step's softmax is over, and its labels as indices into them: all tokens of the
        training transcripts, and a sample of the others, which are never a target.
        """
        others = torch.randperm(len(self.token_ids) - self.num_trained, device=labels.device)[:SAMPLED_TOKENS]
        trained = torch.arange(self.num_trained, device=labels.device)
        classes = torch.cat([trained, self.num_trained + others, labels[labels != -100]]).unique()
        return classes, torch.where(labels == -100, labels, torch.searchsorted(classes, labels))

    def embed(
        self, states: torch.Tensor, summary: torch.Tensor | None, speech_tokens: nn.Module, token_embedding: nn.Module
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        States `(states, d_model)`, with what [`SalmonnSoundSummary`] gives for each, `(states, hidden size)` or none,
        to the language model's space, `(states, hidden size)`; and which of them carry no word, `(states,)`.
        """
        embeds = self.proj(states)
        in_name = torch.zeros_like(states[:, 0], dtype=torch.bool)
        if summary is not None:
            summary = summary.to(states.dtype)
            in_name = summary.any(-1)
            embeds = torch.where(in_name[:, None], summary.to(embeds.dtype), embeds)
        blank, scores = self.blank(states).float(), self.token_scores(states, speech_tokens)
        scale = self.log_scale.exp()
        # Most windows carry no word, and of these nothing but the best score has to be computed.
        with torch.no_grad():
            best, best_token = scores.max(-1, keepdim=True)
            best = best.float() * scale
            # Neither while torch.export traces it, nor with gradients, with which a model cannot be copied.
            if not (self.training or states.requires_grad or torch.compiler.is_exporting()):
                self.last_path = states, path_to_draft(best, best_token, blank)[:, 0]
            with_word = (best > blank - SURELY_BLANK).nonzero()[:, 0]
            least = (torch.maximum(best, blank) - UNLIKELY) / scale
        # Few tokens are likely anywhere. Others are masked, so that a clip's embeddings do not depend on its batch.
        scores = scores.index_select(0, with_word)
        likely = scores > least[with_word].to(scores.dtype)
        tokens = likely.any(0).nonzero()[:, 0]
        scores = scores.index_select(1, tokens).float() * scale
        scores = scores.masked_fill(~likely.index_select(1, tokens), float("-inf"))
        probabilities = torch.cat([blank[with_word], scores], dim=-1).softmax(-1)
        rows = embedding_rows(token_embedding, self.token_ids[tokens])
        words = probabilities[:, 1:].to(rows.dtype) @ rows
        wordless = torch.ones_like(blank[:, 0], dtype=torch.bool)
        wordless[with_word] = probabilities[:, 0] > WORDLESS
        expected = words + probabilities[:, :1] * embeds[with_word]
        return embeds.index_copy(0, with_word, expected.to(embeds.dtype)), wordless & ~in_name

    def word_leads(self, states: torch.Tensor, speech_tokens: nn.Module) -> torch.Tensor:
        """See [`SalmonnProjector.word_leads`]."""
        best = self.token_scores(states, speech_tokens).amax(-1).float() * self.log_scale.exp()
        return best - self.blank(states)[:, 0].float()

    def best(self, states: torch.Tensor, speech_tokens: nn.Module) -> torch.Tensor:
        """Likeliest output at each state; 0: the blank, also where a token leads it by less than `DRAFT_LEAD`."""
        if self.last_path[0] is states:  # the scores were computed for the embeddings already
            return self.last_path[1]
        scores, tokens = self.token_scores(states, speech_tokens).max(-1)
        return path_to_draft(scores.float() * self.log_scale.exp(), tokens, self.blank(states)[:, 0].float())


def path_to_draft(best: torch.Tensor, tokens: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """See `WhisperTokenHead.best`; `best` and `blank` are scores in nats."""
    return torch.where(best > blank + DRAFT_LEAD, tokens + 1, 0)
