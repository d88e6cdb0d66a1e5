"""Text and audio to model inputs: placeholders of each clip's length, chat template, transcription request."""

import copy
import json
from itertools import groupby
from pathlib import Path

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .audio import load_audio
from .serving import check_source, errors_answered
from .windows import num_windows

logger = logging.get_logger(__name__)

# Puts content lists ({"type": "text"}, {"type": "audio"}) as plain strings before a language model's own chat
# template, which knows text only.
CONTENT_PRELUDE = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set flat.text = message['content'] -%}"
    "{%- else -%}{%- set flat.text = '' -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'audio' -%}{%- set flat.text = flat.text + 'AUDIO_TOKEN' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set flat.text = flat.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': flat.text}] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
# For base models without a chat template: SALMONN's own prompt format.
SALMONN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' if message['role'] == 'assistant' else '' }}"
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{%- endfor -%}{{ 'ASSISTANT: ' if add_generation_prompt else '' }}"
)


class SalmonnProcessorKwargs(ProcessingKwargs, total=False):
    """Where neither the call nor the tokenizer's own settings say otherwise."""

    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "left"},
        "common_kwargs": {"return_tensors": "pt"},
    }


class SalmonnProcessor(ProcessorMixin):
    r"""
    Wraps a [`SalmonnFeatureExtractor`] and the language model's tokenizer.

    Args:
        feature_extractor ([`SalmonnFeatureExtractor`]).
        tokenizer (`PreTrainedTokenizerBase`): the language model's. It is left as it is; where it has no token to pad
            with, the processor has a copy that pads with the end token.
        chat_template (`str`, *optional*): default: the tokenizer's own, or SALMONN's where it has none.
        audio_token (`str`): the token of the vocabulary that stands for one audio embedding.
        window_frames, window_stride, queries_per_window (`int`): as in the model's config.
        transcription_prompt (`str`): what `apply_transcription_request` asks by default.
    """

    valid_processor_kwargs = SalmonnProcessorKwargs

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        audio_token="<|audio|>",
        window_frames=17,
        window_stride=17,
        queries_per_window=1,
        transcription_prompt="Transcribe the speech.",
    ):
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id is None or tokenizer.convert_ids_to_tokens(self.audio_token_id) != audio_token:
            raise ValueError(f"The tokenizer has no token {audio_token!r}; name one that it has as audio_token.")
        self.window_frames = window_frames
        self.window_stride = window_stride
        self.queries_per_window = queries_per_window
        self.transcription_prompt = transcription_prompt
        if tokenizer.pad_token is None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.eos_token
        if vars(tokenizer).get("padding_side") == type(tokenizer).padding_side:
            if "padding_side" not in tokenizer.init_kwargs:
                del tokenizer.padding_side  # its class says the same, so that one that is set later can be told
        if chat_template is None:
            prelude = CONTENT_PRELUDE.replace("AUDIO_TOKEN", audio_token)
            chat_template = prelude + (tokenizer.chat_template or SALMONN_TEMPLATE)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", *self.feature_extractor.model_input_names]

    def num_audio_tokens(self, num_frames: int) -> int:
        """Audio tokens for `num_frames` encoder frames (20 ms each), see [`windows.num_windows`]."""
        keep_tail = not self.feature_extractor.pad_to_30_seconds
        return num_windows(num_frames, self.window_frames, self.window_stride, keep_tail) * self.queries_per_window

    def replace_audio_token(self, audio_inputs, audio_idx, **kwargs) -> str:
        mel_frames = int(audio_inputs["input_features_mask"][audio_idx].sum())
        return self.audio_token * self.num_audio_tokens((mel_frames + 1) // 2)

    @errors_answered()
    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`): prompts, with one `audio_token` per clip. What stands here in place of text is
                taken for `audio`, as Whisper's processor takes it: `model.generate` asks for a transcript of that.
            audio: one clip or a flat list of clips, in the order of their placeholders: arrays at 16 kHz, paths, bytes
                or anything else that [`load_audio`] takes.
            kwargs: as for any processor, flat or nested (`text_kwargs`, `audio_kwargs`, `common_kwargs`). By default
                tensors of torch, and rows padded on the left, unless the tokenizer's files, or its `padding_side` that
                is set on `processor.tokenizer`, say otherwise.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, and what the feature extractor returns.

        Raises:
            ValueError: if the number of placeholders is not that of the clips; for a `sampling_rate` that is not the
                feature extractor's, and for `audio_kwargs` that do nothing here.
            AudioError: for a clip that cannot be used, naming it.
        """
        if audio is None and text is not None and not is_text(text):
            text, audio = None, text
        check_audio_kwargs(kwargs.get("audio_kwargs") or {})
        if "padding_side" in vars(self.tokenizer) and "padding_side" not in {
            **kwargs,
            **kwargs.get("common_kwargs", {}),
        }:
            kwargs["text_kwargs"] = {"padding_side": self.tokenizer.padding_side} | kwargs.get("text_kwargs", {})
        # The base class has the feature extractor's fetch_audio decode the clips.
        return super().__call__(text=text, audio=audio, **kwargs)

    @errors_answered()
    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, **kwargs):
        """
        As `ProcessorMixin.apply_chat_template`; a clip is `{"type": "audio", "audio": path, array, ...}`. A control
        token, the audio token among them, that the messages' text spells is plain text in what is tokenised. Rows to
        be continued (`add_generation_prompt`) are padded on the left.
        """
        batched = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        if not all(map(len, conversations)):
            raise ValueError("The conversation is an empty list: it needs a message at least.")
        conversations = [
            [{**message, "content": self._decoded(message.get("content"))} for message in messages]
            for messages in conversations
        ]
        processor_kwargs = dict(processor_kwargs or {})
        for_text = processor_kwargs.get("text_kwargs", {})
        if kwargs.get("add_generation_prompt") and not any(
            "padding_side" in given for given in (kwargs, processor_kwargs, for_text)
        ):
            processor_kwargs["text_kwargs"] = {"padding_side": "left"} | for_text
        if kwargs.get("tokenize") and self._spells_control_token(conversations):
            kwargs.setdefault("sanitize_control_tokens", True)
            if kwargs["sanitize_control_tokens"] and self._adds_bos():
                # Which is else put before a prompt without one; of sanitised text transformers leaves it out.
                chat_template = "{{ bos_token }}" + self._resolve_chat_template(chat_template)
        conversation = conversations if batched else conversations[0]
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

    def _spells_control_token(self, conversations: list[list[dict]]) -> bool:
        contents = [message["content"] for messages in conversations for message in messages]
        texts = [part.get("text") or "" for parts in contents if not isinstance(parts, str) for part in parts]
        texts += [content for content in contents if isinstance(content, str)]
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return any(token in text for token in tokens if not token.isspace() for text in texts)

    def _adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with its BOS token, which the chat template leaves out."""
        ids, bos = self.tokenizer("a")["input_ids"], self.tokenizer.bos_token_id
        literal = self.chat_template if isinstance(self.chat_template, str) else ""
        writes = "bos_token" in literal or (self.tokenizer.bos_token or "\0") in literal
        return bos is not None and ids[:1] == [bos] and not writes

    def _decoded(self, content):
        """Message content with its clips decoded to arrays."""
        if isinstance(content, str):
            return content
        if not content:
            raise ValueError(f"A message has no content, but {content!r}: give a text, or a list of parts.")
        parts = []
        for part in content:
            if "type" not in part:
                raise ValueError(f'A part of a message has no "type": give it "text" or "audio". It is {part!r:.200}.')
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f'A part of type "text" has no text, but {part.get("text")!r:.200}.')
            if part["type"] not in ("text", "audio"):
                raise ValueError(f"A message holds a part of type {part['type']!r}; the model takes text and audio.")
            keys = ("audio", "path", "url") if part["type"] == "audio" else ()
            if (source := next((part[key] for key in keys if part.get(key) is not None), None)) is not None:
                check_source(source)
                part = {"type": "audio", "audio": load_audio(source, self.feature_extractor.sampling_rate)}
            parts.append(part)
        return parts

    def transcription_messages(self, audio=None, prompt=None, language=None) -> list[dict]:
        """The user turn that asks for a transcript of one clip."""
        if prompt is None:
            prompt = self.transcription_prompt if language is None else f"Transcribe the speech in {language}."
        clip = {"type": "audio"} if audio is None else {"type": "audio", "audio": audio}
        return [{"role": "user", "content": [clip, {"type": "text", "text": prompt}]}]

    def apply_transcription_request(self, audio, prompt=None, language=None, **kwargs) -> BatchFeature:
        r"""
        Inputs for `model.generate` that ask for the transcript of each clip.

        Args:
            audio: one clip or a list of clips, each an array at 16 kHz, path, bytes or dict.
            prompt (`str`, *optional*): asked instead of `transcription_prompt`.
            language (`str`, *optional*): the language to write, e.g. "English".

        Returns:
            `BatchFeature`, one row per clip.
        """
        clips = audio if isinstance(audio, (list, tuple)) else [audio]
        if len(clips) == 0:
            raise ValueError("apply_transcription_request needs at least one clip.")
        return self.apply_chat_template(
            [self.transcription_messages(clip, prompt, language) for clip in clips],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **kwargs,
        )

    def transcription_ids(self) -> list[int]:
        """
        The tokens that ask for a transcript, with one `audio_token` for the whole clip: `model.generate` makes its
        prompt of them where it is given audio alone. It looks for them in its `generation_config`, where
        `save_pretrained` of a processor beside a model puts them.
        """
        ids = self.apply_transcription_request(np.zeros(1600, np.float32))["input_ids"][0].tolist()
        groups = ((token, list(group)) for token, group in groupby(ids))
        return [token for token, group in groups for _ in (group[:1] if token == self.audio_token_id else group)]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `ProcessorMixin.save_pretrained`; beside a model it notes the `transcription_ids` for that."""
        file = Path(save_directory, "generation_config.json")
        if file.is_file():
            settings = json.loads(file.read_text("utf-8")) | {"transcription_ids": self.transcription_ids()}
            settings.pop("_from_model_config", None)  # with this mark they would not be read
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
        self.tokenizer.init_kwargs.pop("dtype", None)  # left there by `pipeline(..., dtype=...)`, and no JSON
        files = super().save_pretrained(save_directory, *args, **kwargs)
        vars(self).pop("auto_map", None)  # which saving leaves on the processor, and loading does not set
        return files

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The tokens of a prompt for an answer, with one `audio_token` for each whole clip."""
        settings = {"add_generation_prompt": True, "return_dict": False, "sanitize_control_tokens": True}
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=True, **settings
        )

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text in which no control token counts as one."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def batch_decode(self, *args, **kwargs):
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)


def keep_transcription_ids(generation_config, directory):
    """Have a model's settings saved with their `transcription_ids`, or with those of a processor that is there."""
    if not hasattr(generation_config, "transcription_ids"):
        if not Path(directory, "processor_config.json").is_file():
            return
        generation_config.transcription_ids = SalmonnProcessor.from_pretrained(directory).transcription_ids()
    generation_config._from_model_config = False  # with this mark they would not be read


def check_audio_kwargs(given: dict):
    """
    Raises:
        ValueError: for options of one feature extractor or another by which a clip would be cut or padded otherwise.
    """
    if name := next((name for name in ("max_length", "pad_to_multiple_of") if given.get(name) is not None), None):
        raise ValueError(
            f"{name} does nothing in audio_kwargs: clips are padded to the longest, and none is cut. Leave it out."
        )
    for name, done in (("padding", (None, True, "longest")), ("truncation", (None, False))):
        if given.get(name) not in done:
            logger.warning_once(
                f"{name}={given[name]!r} does nothing in audio_kwargs: clips are as in `padding=True`."
            )


def is_text(given) -> bool:
    """Whether it is a text, or texts, and not audio."""
    if isinstance(given, (list, tuple)):
        return len(given) > 0 and all(map(is_text, given))
    return isinstance(given, str)


SalmonnProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["SalmonnProcessor"]
