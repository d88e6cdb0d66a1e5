"""What the configurations of all projectors have in common."""

import difflib

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .windows import num_windows

# What transformers, beside the fields and properties of every config, passes to one or writes into its config.json.
TRANSFORMERS_FIELDS = {"attn_implementation", "experts_implementation", "auto_map", "quantization_config"}


@strict
class ProjectorConfig(PreTrainedConfig):
    r"""
    Base of the projectors' configurations. A window is a run of encoder frames, 20 ms each. Beside the fields below
    each has a `window_stride`, `queries_per_window` and `pad_to_30_seconds`, of its own or fixed.

    Args:
        audio_hidden_size (`int`, *optional*): features of a frame of the speech encoder. `SalmonnConfig` fills it in.
        sound_hidden_size (`int`, *optional*): features of a sound frame, 0 for a model without. Filled in, too.
        output_size (`int`, *optional*): the language model's hidden size. Filled in, too.
        window_frames (`int`): frames of a window. SALMONN: 17, that is 0.34 s.
        frame_mlp_size (`int`): hidden size of an MLP on a window's stacked frames; 0 for none.
        ctc_vocab_size (`int`): tokens of the CTC head; 0 for no head.
        ctc_merges (`int`, *optional*): the head's tokens are those of the language model's tokenizer stopped after so
            many byte-pair merges; `None` for all.
        min_word_lead (`float`, *optional*): a clip has words only where the CTC head scores some token so many nats
            above the blank, and no transcript is made up for others; `None` takes every clip to have words. For a head
            that is trained: measured on clips with and without speech.

    Raises:
        ValueError: for a field that the projector does not have, naming the nearest one.
    """

    base_parts = ()  # frozen modules that come from the speech model's checkpoint
    token_embeddings = ()  # embeddings of Whisper's tokens, by their modules' names

    audio_hidden_size: int | None = None
    sound_hidden_size: int | None = None
    output_size: int | None = None
    window_frames: int = 17
    frame_mlp_size: int = 0
    ctc_vocab_size: int = 0
    ctc_merges: int | None = None
    min_word_lead: float | None = None

    def __post_init__(self, **kwargs):
        """`kwargs` are not among the fields; transformers would set any as an attribute that nothing reads."""
        fields = [name for name in self.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]
        for name in kwargs:
            if not (name.startswith("_") or name in TRANSFORMERS_FIELDS or hasattr(PreTrainedConfig, name)):
                nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0)[0]
                raise ValueError(
                    f"{type(self).__name__} has no field {name!r}; the nearest is {nearest!r}. It has: "
                    f"{', '.join(fields)}."
                )
        super().__post_init__(**kwargs)

    @property
    def description(self) -> str:
        """What the projector is, for a model card."""
        return type(self).__name__.removesuffix("Config")

    @property
    def names_sounds(self) -> bool:
        """Whether the projector names a clip's sound from all of its frames; else they enter window by window."""
        return False

    def num_audio_tokens(self, num_frames):
        """Audio tokens, at most, of a clip of `num_frames` encoder frames, an `int` or a tensor."""
        keep_tail = not self.pad_to_30_seconds
        return num_windows(num_frames, self.window_frames, self.window_stride, keep_tail) * self.queries_per_window

    def choose_tokens(self, token_ids: list[int], tokenizer, speech_tokenizer, speech_generation_config) -> dict:
        """
        Size what knows tokens by their ids, for training transcripts that are spelt with the language model's tokens
        `token_ids`, and give the contents of the projector's buffers, by their names. `tokenizer` is the language
        model's, `speech_tokenizer` and `speech_generation_config` are Whisper's.
        """
        self.ctc_vocab_size = len(token_ids)
        return {"ctc_head.token_ids": token_ids}

    def fit_to(self, audio_config: PreTrainedConfig, sound_hidden_size: int, text_config: PreTrainedConfig):
        """
        Fill in the sizes of the parts that the projector joins.

        Raises:
            ValueError: if the projector was made for parts of other sizes; the message names both.
        """
        sizes = {
            "audio_hidden_size": audio_config.d_model,
            "sound_hidden_size": sound_hidden_size,
            "output_size": text_config.hidden_size,
        }
        for name, size in sizes.items():
            if getattr(self, name) not in (None, size):
                raise ValueError(
                    f"projector_config.{name} is {getattr(self, name)}, but the encoders and the language model have "
                    f"{size}; name those that the projector was trained with."
                )
            setattr(self, name, size)


__all__ = ["ProjectorConfig"]
