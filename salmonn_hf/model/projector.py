"""What joins the audio encoders and the language model: the interface that every projector has."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from .alignment_loss import caption_loss, collapse_ctc_path, ctc_loss
from .configuration_projector import ProjectorConfig
from .ctc_head import token_directions


@dataclass
class ProjectorOutput(ModelOutput):
    r"""
    embeds (`torch.Tensor` of shape `(audio tokens of all clips, hidden size)`): in the language model's space, the
        clips in a row without padding.
    num_tokens (`torch.LongTensor` of shape `(clips,)`): audio tokens of each clip; never more than `num_states`.
    ctc_log_probs (`torch.Tensor` of shape `(states of all clips, 1 + ctc_vocab_size)`, *optional*): float32, the blank
        first.
    states (`torch.Tensor` of shape `(states of all clips, width)`, *optional*): what a projector of windows made of
        each window's queries, from which all of these follow.
    num_states (`torch.LongTensor` of shape `(clips,)`): of each clip, as many as it has placeholders in the prompt.
    draft_ids (`list[list[int]]`, *optional*): each clip's transcript in the language model's tokens, where the
        projector has one at hand.
    """

    embeds: torch.Tensor | None = None
    num_tokens: torch.LongTensor | None = None
    ctc_log_probs: torch.Tensor | None = None
    states: torch.Tensor | None = None
    num_states: torch.LongTensor | None = None
    draft_ids: list[list[int]] | None = None


class SalmonnProjector(PreTrainedModel):
    """
    Base of all projectors. One of windows defines `window_states` and `embed`; with a CTC head also `ctc_log_probs`
    and `ctc_path`. Another has a `forward`, `has_words` and `draft` of its own. `token_embedding` is everywhere the
    language model's input embeddings, a module.
    """

    config: ProjectorConfig
    config_class = ProjectorConfig
    main_input_name = "audio_frames"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    # Frozen modules that a base part brings, with the names that they may have there.
    base_part_prefixes: ClassVar[dict[str, tuple[str, ...]]] = {}
    # Submodules that stay in full precision where the projector is quantised.
    modules_to_not_quantize: ClassVar[tuple[str, ...]] = ()
    # Of its parameters, by the beginnings of their names: those that stay as they are in training; those that sound
    # alone is described with; those that `transcribe` uses; those that come from a pretrained model, and may be
    # trained at a rate of their own.
    frozen_parameters: ClassVar[tuple[str, ...]] = ()
    sound_parameters: ClassVar[tuple[str, ...]] = ()
    transcribing_parameters: ClassVar[tuple[str, ...]] = ()
    pretrained_parameters: ClassVar[tuple[str, ...]] = ()

    @property
    def has_ctc_head(self) -> bool:
        return self.config.ctc_vocab_size > 0

    @property
    def speculation_type(self) -> str | None:
        """What drafts the language model's transcript, see `draft`; `None`: nothing."""
        return "ctc" if self.has_ctc_head else None

    def transcribe(self, audio_frames: torch.Tensor, audio_frames_mask: torch.BoolTensor) -> dict[str, torch.Tensor]:
        """What a frozen part of the projector makes of the frames, to be kept with them and given to `forward`."""
        return {}

    def forward(
        self,
        audio_frames: torch.Tensor,
        audio_frames_mask: torch.BoolTensor,
        token_embedding: nn.Module,
        sound_frames: torch.Tensor | None = None,
        sound_frames_mask: torch.BoolTensor | None = None,
        return_ctc: bool = False,
    ) -> ProjectorOutput:
        r"""
        Args:
            audio_frames (`torch.Tensor` of shape `(clips, frames, audio_hidden_size)`): the speech encoder's, one in
                20 ms.
            audio_frames_mask (`torch.BoolTensor` of shape `(clips, frames)`): true on a clip's own frames.
            sound_frames, sound_frames_mask: the same of the sound encoder, for a model with one.
            return_ctc (`bool`): with `ctc_log_probs`, where there is a CTC head.
        """
        states, num_states = self.window_states(audio_frames, audio_frames_mask, sound_frames, sound_frames_mask)
        embeds, is_token = self.embed(states, num_states, token_embedding, sound_frames, sound_frames_mask)
        num_tokens = num_states
        if is_token is not None:
            embeds = embeds[is_token]
            last = is_token.cumsum(0)[num_states.cumsum(0) - 1]  # tokens up to the end of each clip
            num_tokens = last.diff(prepend=last.new_zeros(1))
        ctc_log_probs = self.ctc_log_probs(states, token_embedding) if return_ctc and self.has_ctc_head else None
        return ProjectorOutput(embeds, num_tokens, ctc_log_probs, states, num_states)

    def window_states(self, audio_frames, audio_frames_mask, sound_frames=None, sound_frames_mask=None):
        """Encoder frames to `states` and `num_states`, see [`ProjectorOutput`]."""
        raise NotImplementedError

    def embed(self, states, num_states, token_embedding, sound_frames=None, sound_frames_mask=None):
        """States to embeddings `(states, hidden size)`, and which are audio tokens, bool `(states,)`; `None`: all."""
        raise NotImplementedError

    def ctc_log_probs(self, states, token_embedding, classes: torch.LongTensor | None = None) -> torch.Tensor:
        """Log-probabilities of the CTC head, float32 `(..., 1 + classes)`; `classes` are indices of its tokens."""
        raise NotImplementedError

    def word_leads(self, states, token_embedding) -> torch.Tensor:
        """By how many nats the CTC head's best token leads the blank at each state, float32 `(states,)`."""
        log_probs = self.ctc_log_probs(states, token_embedding)
        return log_probs[:, 1:].amax(-1) - log_probs[:, 0]

    @property
    def tells_words(self) -> bool:
        """Whether `has_words` can be false."""
        return self.config.min_word_lead is not None

    def has_words(self, token_embedding, **frames) -> torch.BoolTensor:
        """
        Whether there is a word in each clip, `(clips,)`; `frames` are those that `forward` takes. Here: whether the
        CTC head finds one, see `min_word_lead` of the config.
        """
        states, num_states = self.window_states(**frames)
        leads = self.word_leads(states, token_embedding).split(num_states.tolist())
        return torch.stack([(clip > self.config.min_word_lead).any() for clip in leads])

    def ctc_path(self, states, token_embedding) -> torch.LongTensor:
        """The output to draft at each state: 0 for the blank, else 1 + the index of a token; `(states,)`."""
        raise NotImplementedError

    def vocabulary_ids(self) -> dict[str, torch.LongTensor]:
        """The language model's tokens that it knows by their ids, by name; of buffers that are filled."""
        return {"ctc_head.token_ids": self.ctc_head.token_ids} if self.has_ctc_head else {}

    def ctc_transcripts(self, states, num_states, token_embedding) -> list[list[int]]:
        """Greedy CTC: token ids of each clip, repeats merged and blanks dropped."""
        paths = self.ctc_log_probs(states, token_embedding).argmax(-1).split(num_states.tolist())
        return [collapse_ctc_path(path, self.ctc_head.token_ids) for path in paths]

    def draft(self, output: ProjectorOutput, token_embedding) -> list[int]:
        """
        Token ids of a transcript of the one clip of which `forward` gave `output`, for the language model to verify;
        see [`Draft`].
        """
        return collapse_ctc_path(self.ctc_path(output.states, token_embedding), self.ctc_head.token_ids)

    def ctc_training_classes(self, labels: torch.LongTensor) -> tuple[torch.LongTensor | None, torch.LongTensor]:
        """The tokens that a training step's softmax is over, `None` for all, and `labels` as indices into them."""
        return None, labels

    def ctc_loss(self, states, num_states, labels: torch.LongTensor, token_embedding) -> torch.Tensor:
        """See [`alignment_loss.ctc_loss`]; `labels` `(clips, tokens)` are indices into the head's tokens."""
        classes, labels = self.ctc_training_classes(labels) if self.training else (None, labels)
        clips = nn.utils.rnn.pad_sequence(states.split(num_states.tolist()))
        return ctc_loss(self.ctc_log_probs(clips, token_embedding, classes), num_states, labels)

    def caption_loss(self, embeds, num_states, labels: torch.LongTensor, token_embedding) -> torch.Tensor:
        """See [`alignment_loss.caption_loss`]: of the mean of each clip's embeddings (before any is merged)."""
        captioned = (labels != -100).any(-1)
        clips = embeds.split(num_states.tolist())
        center, directions = token_directions(token_embedding)
        clips = torch.stack([clips[clip].float().mean(0) for clip in captioned.nonzero()[:, 0]]) - center
        return caption_loss(clips, labels[captioned], directions)

    def initialize(self, token_embedding, whisper_directory=None, examples=()):
        """
        Start from what the language model's embeddings and the Whisper in `whisper_directory` hold; `examples` are
        pairs of encoder frames `(frames, d_model)` and their transcript's token ids, of Whisper's tokenizer.
        """

    def drop_unused_tokens(self):
        """Drop what of its base parts is not used, in place. The checkpoint then has to hold the rest."""


__all__ = ["ProjectorOutput", "SalmonnProjector"]
