"""
A projector that is Whisper's whole decoder: it transcribes a clip, and the language model reads that transcript, with
the decoder's state at each token, which knows how sure it is and what else was likely.
"""

from functools import cached_property

import torch
from torch import nn
from transformers import WhisperConfig

from .answering import transcript_limit
from .clip_tensors import pad_clips
from .configuration_whisper_decoder_projector import MAX_PIECES, WhisperDecoderProjectorConfig
from .projector import ProjectorOutput, SalmonnProjector
from .quantized_layers import embedding_rows
from .repetition import cut_repetition
from .respelling import Respelling
from .sound_summary import SalmonnSoundSummary
from .speech_decoder import SalmonnWhisperDecoder
from .windows import num_windows

END = -1  # in place of a token's id, where a transcript ends
TEXT_FRAMES = 8  # 20 ms each, that a token of text alone stands for


class WhisperDecoderProjector(SalmonnProjector):
    """
    Whisper's greedy transcript is spelt in the language model's tokens, see [`Respelling`]. For each of them the
    language model gets its own embedding, plus a linear map of the decoder's state there. About three tokens stand
    for a second of speech, as with SALMONN's Q-Former. Behind them comes one for the end; before them, with sound
    frames, the name of the clip's sound, see [`SalmonnSoundSummary`].

    Whisper was trained on clips padded to 30 s. Over a clip's own length it does not know where the audio ends, and
    repeats itself: `end_frames`, learnt frames behind the clip's own, tell it, see `training/end_frames.py`.

    The decoder is frozen, so its transcript can be kept, as the encoders' frames can: [`transcribe`] gives it.
    """

    config: WhisperDecoderProjectorConfig
    config_class = WhisperDecoderProjectorConfig
    _no_split_modules = ["WhisperDecoderLayer"]
    base_part_prefixes = {"decoder": ("model.decoder.", "decoder.")}
    frozen_parameters = ("decoder.", "end_frames", "sound_summary.norm.", "sound_summary.mlp.")
    transcribing_parameters = ("decoder.", "end_frames", "pieces", "merges")
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
        self.register_buffer("merges", torch.zeros(config.num_merges, 3, dtype=torch.int32))
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
            nn.init.zeros_(self.merges)
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

    @cached_property
    def respelling(self) -> Respelling:
        return Respelling(self.pieces, self.merges, self.config.space_id)

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
        Whisper's greedy transcripts: `transcript_ids` `(clips, tokens)`, the language model's, with `END` behind those
        that have ended, and the states that predicted them, `transcript_states` `(clips, tokens, d_model)`, both
        padded, with masks of the same names.
        """
        config, dtype = self.config, self.decoder.layer_norm.weight.dtype
        most = config.max_positions - len(config.prompt_ids)
        limits = [min(transcript_limit(0.02 * frames), most) for frames in audio_frames_mask.sum(-1).tolist()]
        frames, mask = self.with_end(audio_frames.to(dtype), audio_frames_mask)
        clips = []
        for said, states in zip(*self.decoder.transcribe(frames, mask, config, self.banned, limits), strict=True):
            said = cut_repetition(said.tolist())
            ended = said[-1:] == [config.end_id]
            ids, places = self.respelling(said[:-1] if ended else said)
            if ended:
                ids, places = [*ids, END], [*places, len(said) - 1]
            ids = states.new_tensor(ids, dtype=torch.int64)
            clips.append({"transcript_ids": ids, "transcript_states": states[places]})
        return pad_clips(clips)

    def text_frames(self, token_ids: torch.LongTensor) -> dict[str, torch.Tensor]:
        """
        What `SalmonnModel.encode_audio` would give of a clip whose transcript is this text, `(tokens,)`, but that no
        state goes with it; without padding. For training on text alone.
        """
        config, zeros = self.config, self.end_frames.new_zeros
        ids = nn.functional.pad(token_ids, (0, 1), value=END)
        text = {
            "audio_frames": zeros(TEXT_FRAMES * len(ids), config.audio_hidden_size),
            "transcript_ids": ids,
            "transcript_states": zeros(len(ids), config.audio_hidden_size),
        }
        return text if self.sound_summary is None else text | {"sound_frames": zeros(0, config.sound_hidden_size)}

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
        """Of each clip its audio tokens `(tokens, hidden size)`, and the transcript's tokens without the end."""
        lengths = mask.sum(-1).tolist()
        ids, states = ids[mask], states[mask]
        text = embedding_rows(token_embedding, ids.clamp(min=0))
        text = torch.where(ids[:, None] == END, self.end_marker.to(text.dtype), text)
        of_states = self.project_states(states) * states.any(-1, keepdim=True)  # zeros are none, as of text alone
        drafts = [[token for token in clip.tolist() if token != END] for clip in ids.split(lengths)]
        return list((text + of_states.to(text.dtype)).split(lengths)), drafts

    def project_states(self, states: torch.Tensor) -> torch.Tensor:
        """
        States `(tokens, d_model)` in the language model's space, `(tokens, hidden size)`. Scaled down: an optimiser
        such as Adam moves every weight as far, so that the sum over all features would soon drown the text.
        """
        return self.proj(self.state_norm(states.to(self.proj.weight.dtype))) * states.shape[-1] ** -0.5

    def has_words(self, token_embedding, audio_frames, audio_frames_mask, transcript_ids=None, **kept):
        if transcript_ids is None:
            kept = self.transcribe(audio_frames, audio_frames_mask)
            transcript_ids = kept["transcript_ids"]
        return ((transcript_ids != END) & kept["transcript_ids_mask"]).any(-1)

    def draft(self, output, token_embedding):
        return output.draft_ids[0]

    def vocabulary_ids(self):
        names = {} if self.sound_summary is None else {"sound_summary.names": self.sound_summary.names.flatten()}
        return {"pieces": self.pieces.flatten(), "merges": self.merges.flatten()} | names


__all__ = ["WhisperDecoderProjector"]
