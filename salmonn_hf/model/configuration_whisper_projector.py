"""Configuration of the projector that is made of Whisper's own decoder layers."""

import re

from huggingface_hub.dataclasses import strict

from .configuration_projector import ProjectorConfig


@strict
class WhisperProjectorConfig(ProjectorConfig):
    r"""
    Configuration of [`WhisperProjector`]; see [`ProjectorConfig`] for the other fields. It needs `frame_mlp_size` and
    `ctc_vocab_size`.

    Args:
        num_layers (`int`): so many of the last layers of Whisper's decoder.
        num_attention_heads, ffn_dim, vocab_size (`int`, *optional*), activation_function (`str`, *optional*): of these
            layers and of Whisper's token embeddings. `SalmonnConfig` fills them in from the speech encoder's config.
        dropout (`float`): of the layers, of the MLP on the frames and of the sound summary.
        window_context (`int`): frames on either side of a window that its query attends to as well.
        window_reach (`int`): learned position biases reach up to so many windows; 0 for none.
        merged_windows (`int`): so many windows in a row without a word become one audio token, see
            [`merge_wordless`]; 1: none are merged.
        ctc_trained_size (`int`): the first so many of the CTC head's tokens occur in training transcripts.
        sound_summary_size (`int`): with sound frames, hidden size of the MLP of [`SalmonnSoundSummary`]; else 0.
        sound_kinds (`int`): kinds of sound that it tells apart.
        sound_name_size (`int`): tokens of a kind's name, at most.

    Raises:
        ValueError: if the sizes do not fit each other.
    """

    model_type = "salmonn_whisper_projector"
    base_parts = token_embeddings = ("speech_tokens",)
    window_stride = property(lambda self: self.window_frames)
    queries_per_window = property(lambda self: 1)
    pad_to_30_seconds = property(lambda self: False)

    window_frames: int = 4
    num_layers: int = 2
    num_attention_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    activation_function: str | None = None
    dropout: float | int = 0.0
    window_context: int = 0
    window_reach: int = 0
    merged_windows: int = 1
    ctc_trained_size: int = 0
    sound_summary_size: int = 0
    sound_kinds: int = 400
    sound_name_size: int = 24

    def __post_init__(self, **kwargs):
        if fixed := sorted(kwargs.keys() & {"window_stride", "queries_per_window", "pad_to_30_seconds"}):
            raise ValueError(
                f"{fixed[0]} cannot be set for a projector of Whisper's decoder layers: its windows do not overlap, "
                "each has one query, and clips keep their own length."
            )
        super().__post_init__(**kwargs)

    @property
    def description(self) -> str:
        return f"the last {self.num_layers} layers of Whisper's decoder over windows"

    @property
    def names_sounds(self) -> bool:
        return self.sound_summary_size > 0

    def choose_tokens(self, token_ids, tokenizer, speech_tokenizer, speech_generation_config):
        """As in [`ProjectorConfig`]; the head's tokens are those of both tokenizers, `token_ids` first."""
        trained = set(token_ids)
        shared = shared_tokens(tokenizer, speech_tokenizer, trained)
        self.ctc_vocab_size, self.ctc_trained_size = len(shared), sum(ids[0] in trained for ids in shared)
        columns = map(list, zip(*shared, strict=True))
        names = ("token_ids", "speech_token_ids", "capital_token_ids")
        return {f"ctc_head.{name}": column for name, column in zip(names, columns, strict=True)}

    def fit_to(self, audio_config, sound_hidden_size, text_config):
        """As in [`ProjectorConfig`]; the sizes of Whisper's decoder are filled in as well."""
        super().fit_to(audio_config, sound_hidden_size, text_config)
        if not self.frame_mlp_size or not self.ctc_vocab_size:
            sizes = f"{self.frame_mlp_size} and {self.ctc_vocab_size}"
            raise ValueError(f"Whisper's decoder layers need frame_mlp_size and ctc_vocab_size; they are {sizes}.")
        if min(self.window_frames, self.num_layers, self.merged_windows) < 1:
            raise ValueError(
                f"window_frames {self.window_frames}, num_layers {self.num_layers} and merged_windows "
                f"{self.merged_windows} must be at least 1."
            )
        if self.num_layers > (layers := audio_config.decoder_layers):
            raise ValueError(f"num_layers is {self.num_layers}, but the speech model's decoder has {layers} layers.")
        if bool(self.sound_summary_size) != bool(sound_hidden_size):
            raise ValueError(
                f"projector_config.sound_summary_size is {self.sound_summary_size} and sound frames have "
                f"{sound_hidden_size} features; sounds need a summary, and without sound frames there is none."
            )
        for name, value in {
            "num_attention_heads": audio_config.decoder_attention_heads,
            "ffn_dim": audio_config.decoder_ffn_dim,
            "vocab_size": audio_config.vocab_size,
            "activation_function": audio_config.activation_function,
        }.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def shared_tokens(tokenizer, speech_tokenizer, trained: set[int]) -> list[tuple[int, int, int]]:
    """
    The tokens of lower-case letters that two byte-pair tokenizers have in common: `(id, id in speech_tokenizer, its id
    there with a capital)`, those in `trained` first, then by their second; the last repeats the second where no one
    token is so spelt.
    """
    vocabulary, speech_vocabulary = tokenizer.get_vocab(), speech_tokenizer.get_vocab()
    shared = []
    for token, speech_id in sorted(speech_vocabulary.items(), key=lambda item: item[1]):
        if token in vocabulary and re.fullmatch(r"\u0120?[a-z']+", token):  # \u0120: a space, in byte-level BPE
            # Only a word's start can be a capital, and Whisper begins a sentence with one.
            capital = token[0] + token[1:].capitalize() if token[0] == "\u0120" else token
            shared.append((vocabulary[token], speech_id, speech_vocabulary.get(capital, speech_id)))
    return sorted(shared, key=lambda ids: ids[0] not in trained)


__all__ = ["WhisperProjectorConfig"]
