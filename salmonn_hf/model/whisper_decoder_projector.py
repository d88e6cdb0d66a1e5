"""
A projector that is Whisper's whole decoder: it transcribes a clip, and the language model reads that transcript, with
the decoder's state at each token, which knows how sure it is and what else was likely.
"""

from functools import cached_property

import torch
from torch import nn
from transformers import WhisperConfig

from .answering import transcript_limit
from .configuration_whisper_decoder_projector import MAX_PIECES, WhisperDecoderProjectorConfig
from .projector import ProjectorOutput, SalmonnProjector
from .quantized_layers import embedding_rows
from .repetition import cut_repetition
from .sound_summary import SalmonnSoundSummary
from .speech_decoder import SalmonnWhisperDecoder
from .windows import num_windows


class WhisperDecoderProjector(SalmonnProjector):
    """
    For each token of Whisper's greedy transcript the language model gets its own embedding of the same text, plus a
    linear map of the decoder's state there, behind a LayerNorm: as it is, it would drown the text. About three tokens
    stand for a second of speech, as with SALMONN's Q-Former. Behind them comes one for the end; before them, with
    sound frames, the name of the clip's sound, see [`SalmonnSoundSummary`].

    Whisper was trained on clips padded to 30 s. Over a clip's own length it does not know where the audio ends, and
    repeats itself: `end_frames`, learnt frames behind the clip's own, tell it, see `training/end_frames.py`.

    The decoder is frozen, so its transcript can be kept, as the encoders' frames can: [`transcribe`] gives it.
    """

    config: WhisperDecoderProjectorConfig
    config_class = WhisperDecoderProjectorConfig
    _no_split_modules = ["WhisperDecoderLayer"]
    base_part_prefixes = {"decoder": ("model.decoder.", "decoder.")}
    frozen_parameters = ("decoder.", "end_frames", "sound_summary.norm.", "sound_summary.mlp.")
    transcribing_parameters = ("decoder.", "end_frames")
    sound_parameters = ("sound_summary.marker",)
    speculation_type = "transcript"
    tells_words = True

    def __init__(self, config: WhisperDecoderProjectorConfig):
        super().__init__(config)
        width = config.audio_hidden_size
        decoder_config = WhisperConfig(
            d_model=width,
            decoder_layers=config.num_layers,
            decoder_attention_heads=config.num_attention_heads,
            decoder_ffn_dim=config.ffn_dim,
            vocab_size=config.vocab_size,
            max_target_positions=config.max_positions,
            activation_function=config.activation_function,
            pad_token_id=None,
        )
        self.end_frames = nn.Parameter(torch.zeros(config.num_end_frames, width))
        self.decoder = SalmonnWhisperDecoder._from_config(decoder_config).requires_grad_(False)
        self.register_buffer("pieces", torch.full((config.end_id, MAX_PIECES), -1, dtype=torch.int32))
        self.state_norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.output_size)
        self.end_marker = nn.Parameter(torch.zeros(config.output_size))
        self.sound_summary = SalmonnSoundSummary(config) if config.sound_summary_size else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.end_frames)
            nn.init.zeros_(self.end_marker)
            nn.init.constant_(self.pieces, -1)
        elif module is self.proj:
            nn.init.zeros_(module.weight)  # the language model begins as a reader of plain text
            nn.init.zeros_(module.bias)
        elif isinstance(module, SalmonnSoundSummary):
            nn.init.constant_(module.names, -1)
            nn.init.zeros_(module.marker)

    @cached_property
    def banned(self) -> torch.BoolTensor:
        """Whisper's tokens that no transcript begins with, and those that none holds: `(2, vocabulary)`."""
        config = self.config
        banned = torch.zeros(2, config.vocab_size, dtype=torch.bool, device=self.end_frames.device)
        banned[:, config.end_id + 1 :] = True
        banned[:, config.banned_ids or []] = True
        banned[0, config.banned_first_ids or []] = True
        return banned

    def with_end(self, frames: torch.Tensor, mask: torch.BoolTensor) -> tuple[torch.Tensor, torch.BoolTensor]:
        """Frames `(clips, frames, width)` and their mask with `end_frames` behind each clip's own."""
        count, lengths = len(self.end_frames), mask.sum(-1, keepdim=True)
        place = torch.arange(frames.shape[1] + count, device=frames.device) - lengths
        frames = nn.functional.pad(frames, (0, 0, 0, count))
        end = self.end_frames.to(frames.dtype)[place.clamp(0, count - 1)]
        return torch.where((place >= 0)[..., None], end, frames), place < count

    @torch.no_grad()
    def transcribe(self, audio_frames: torch.Tensor, audio_frames_mask: torch.BoolTensor) -> dict[str, torch.Tensor]:
        """
        Whisper's greedy transcripts: `transcript_ids` `(clips, tokens)`, of its own vocabulary, and the states that
        predicted them, `transcript_states` `(clips, tokens, d_model)`, both padded, with masks of the same names.
        """
        config, dtype = self.config, self.decoder.layer_norm.weight.dtype
        most = config.max_positions - len(config.prompt_ids)
        limits = [min(transcript_limit(0.02 * frames), most) for frames in audio_frames_mask.sum(-1).tolist()]
        frames, mask = self.with_end(audio_frames.to(dtype), audio_frames_mask)
        said, states = self.decoder.transcribe(frames, mask, config, self.banned, limits)
        for clip, ids in enumerate(said):
            kept = len(cut_repetition(ids.tolist()))
            said[clip], states[clip] = ids[:kept], states[clip][:kept]
        ids = nn.utils.rnn.pad_sequence(said, batch_first=True)
        lengths = torch.tensor([len(ids) for ids in said], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        states = nn.utils.rnn.pad_sequence(states, batch_first=True)
        transcripts = {"transcript_ids": ids, "transcript_states": states}
        return transcripts | {f"{name}_mask": mask for name in transcripts}

    def forward(
        self,
        audio_frames: torch.Tensor,
        audio_frames_mask: torch.BoolTensor,
        token_embedding: nn.Module,
        sound_frames: torch.Tensor | None = None,
        sound_frames_mask: torch.BoolTensor | None = None,
        transcript_ids: torch.LongTensor | None = None,
        transcript_states: torch.Tensor | None = None,
        transcript_ids_mask: torch.BoolTensor | None = None,
        transcript_states_mask: torch.BoolTensor | None = None,
        return_ctc: bool = False,
    ) -> ProjectorOutput:
        """As [`SalmonnProjector.forward`]; `transcript_…`: what `transcribe` gave for these frames, if it was kept."""
        if transcript_ids is None:
            transcripts = self.transcribe(audio_frames, audio_frames_mask)
            transcript_ids, transcript_states = transcripts["transcript_ids"], transcripts["transcript_states"]
            transcript_ids_mask = transcripts["transcript_ids_mask"]
        size = self.config.window_frames
        room = num_windows(audio_frames_mask.sum(-1), size, size)
        words, draft_ids = self.embed_transcripts(
            transcript_ids, transcript_states, transcript_ids_mask, token_embedding
        )
        if self.sound_summary is not None and sound_frames is not None:
            left = (room - torch.tensor(list(map(len, words)), device=room.device)).clamp(min=1)
            names = self.sound_summary(sound_frames, sound_frames_mask, left, token_embedding).split(left.tolist())
            words = [torch.cat([name[name.any(-1)], clip]) for name, clip in zip(names, words, strict=True)]
        embeds = [clip[:most] for clip, most in zip(words, room.tolist(), strict=True)]
        num_tokens = torch.tensor(list(map(len, embeds)), device=room.device)
        return ProjectorOutput(torch.cat(embeds), num_tokens, num_states=room, draft_ids=draft_ids)

    def embed_transcripts(self, ids, states, mask, token_embedding) -> tuple[list[torch.Tensor], list[list[int]]]:
        """Of each clip its audio tokens `(tokens, hidden size)`, and the transcript in the language model's tokens."""
        is_end = ids >= self.config.end_id
        pieces = self.pieces[ids.clamp(max=self.config.end_id - 1)].masked_fill(is_end[..., None], -1)
        pieces = nn.functional.pad(pieces, (0, 1), value=-1)
        is_piece = pieces >= 0
        is_token = is_piece.clone()
        is_token[..., -1] = is_end
        is_token &= mask[..., None]
        of_states = self.proj(self.state_norm(states.to(self.proj.weight.dtype)))[..., None, :].expand(
            *pieces.shape, -1
        )
        text = embedding_rows(token_embedding, pieces.clamp(min=0)[is_token].long())
        text = torch.where(is_piece[is_token][:, None], text, self.end_marker.to(text.dtype))
        lengths = is_token.flatten(1).sum(-1).tolist()
        drafts = [clip[own].tolist() for clip, own in zip(pieces, is_token & is_piece, strict=True)]
        return list((text + of_states[is_token].to(text.dtype)).split(lengths)), drafts

    def has_words(self, token_embedding, audio_frames, audio_frames_mask, transcript_ids=None, **kept):
        if transcript_ids is None:
            kept = self.transcribe(audio_frames, audio_frames_mask)
            transcript_ids = kept["transcript_ids"]
        return ((transcript_ids < self.config.end_id) & kept["transcript_ids_mask"]).any(-1)

    def draft(self, output, token_embedding):
        return output.draft_ids[0]

    def vocabulary_ids(self):
        names = {} if self.sound_summary is None else {"sound_summary.names": self.sound_summary.names.flatten()}
        return {"pieces": self.pieces.flatten()} | names


__all__ = ["WhisperDecoderProjector"]
