"""Configuration of the projector that is Whisper's whole decoder."""

import json

from huggingface_hub.dataclasses import strict

from .configuration_projector import ProjectorConfig
from .respelling import WORD_STARTS

MAX_PIECES = 6  # tokens of the language model that one of Whisper's may be spelt with; more are cut off


@strict
class WhisperDecoderProjectorConfig(ProjectorConfig):
    r"""
    Configuration of [`WhisperDecoderProjector`]; see [`ProjectorConfig`] for the other fields. Its windows say how
    much room a clip has in the prompt: a token each, of which those that are not used are dropped.

    Args:
        num_end_frames (`int`): learnt frames behind each clip's own, which say that the audio ends.
        prompt_ids (`list[int]`): Whisper's tokens that ask for an English transcript without times.
        end_id (`int`): Whisper's token that ends a transcript. Tokens behind it are no text.
        no_speech_id (`int`): Whisper's token for a clip without speech.
        num_merges (`int`): of the language model's tokenizer, see [`Respelling`].
        space_id (`int`, *optional*): its token for a space.
        banned_ids, banned_first_ids (`list[int]`): tokens that no transcript holds, and that none begins with.
        num_layers, num_attention_heads, ffn_dim, vocab_size, max_positions (`int`, *optional*), activation_function
            (`str`, *optional*): of Whisper's decoder. `SalmonnConfig` fills them in from the speech encoder's config.
        dropout (`float`): of the sound summary.
        sound_summary_size (`int`): with sound frames, hidden size of the MLP of [`SalmonnSoundSummary`]; else 0.
        sound_kinds (`int`): kinds of sound that it tells apart.
        sound_name_size (`int`): tokens of a kind's name, at most.
    """

    model_type = "salmonn_whisper_decoder_projector"
    base_parts = ("decoder",)
    token_embeddings = ("decoder.embed_tokens",)
    window_stride = property(lambda self: self.window_frames)
    queries_per_window = property(lambda self: 1)
    pad_to_30_seconds = property(lambda self: False)

    window_frames: int = 2
    num_end_frames: int = 24
    prompt_ids: list[int] | None = None
    end_id: int | None = None
    no_speech_id: int | None = None
    num_merges: int = 0
    space_id: int | None = None
    banned_ids: list[int] | None = None
    banned_first_ids: list[int] | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    activation_function: str | None = None
    dropout: float | int = 0.0
    sound_summary_size: int = 0
    sound_kinds: int = 400
    sound_name_size: int = 24

    @property
    def description(self) -> str:
        return "Whisper's whole decoder, whose transcript and states the language model reads"

    @property
    def names_sounds(self) -> bool:
        return self.sound_summary_size > 0

    def choose_tokens(self, token_ids, tokenizer, speech_tokenizer, speech_generation_config):
        """As in [`ProjectorConfig`]: how each of Whisper's tokens is spelt with the language model's."""
        special = speech_generation_config
        self.end_id = special.eos_token_id
        self.prompt_ids = [special.decoder_start_token_id]
        if special.is_multilingual:
            self.prompt_ids += [special.lang_to_id["<|en|>"], special.task_to_id["transcribe"]]
        self.prompt_ids.append(special.no_timestamps_token_id)
        self.no_speech_id = special.no_timestamps_token_id - 1
        self.banned_ids, self.banned_first_ids = list(special.suppress_tokens), list(special.begin_suppress_tokens)
        merges, self.space_id = token_merges(tokenizer)
        self.num_merges = len(merges)
        return {"pieces": token_pieces(tokenizer, speech_tokenizer, self.end_id), "merges": merges}

    def fit_to(self, audio_config, sound_hidden_size, text_config):
        """As in [`ProjectorConfig`]; the sizes of Whisper's decoder are filled in as well."""
        super().fit_to(audio_config, sound_hidden_size, text_config)
        if bool(self.sound_summary_size) != bool(sound_hidden_size):
            raise ValueError(
                f"projector_config.sound_summary_size is {self.sound_summary_size} and sound frames have "
                f"{sound_hidden_size} features; sounds need a summary, and without sound frames there is none."
            )
        for name, value in {
            "num_layers": audio_config.decoder_layers,
            "num_attention_heads": audio_config.decoder_attention_heads,
            "ffn_dim": audio_config.decoder_ffn_dim,
            "vocab_size": audio_config.vocab_size,
            "max_positions": audio_config.max_target_positions,
            "activation_function": audio_config.activation_function,
        }.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def token_pieces(tokenizer, speech_tokenizer, end_id: int) -> list[list[int]]:
    """
    For each of Whisper's text tokens those of `tokenizer` that spell the same, padded with -1. A token that is no
    whole character, as in other scripts, has none.
    """
    texts = [speech_tokenizer.decode([token]) for token in range(end_id)]
    spelt = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    rows = []
    for text, ids in zip(texts, spelt, strict=True):
        ids = [] if "\ufffd" in text else ids[:MAX_PIECES]
        rows.append(ids + [-1] * (MAX_PIECES - len(ids)))
    return rows


def token_merges(tokenizer) -> tuple[list[tuple[int, int, int]], int | None]:
    """
    Merges of a tokenizer by byte-pair encoding, in order: left token, right token and the one that they make; and its
    token for a space, if it has one. No merges of any other tokenizer.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        return [], None
    vocabulary = model["vocab"]
    merges = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in model["merges"]]
    return merges, next((vocabulary[space] for space in WORD_STARTS if space in vocabulary), None)


__all__ = ["WhisperDecoderProjectorConfig"]
