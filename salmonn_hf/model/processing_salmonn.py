"""Text and audio to model inputs: placeholders of each clip's length, chat template, transcription request."""

from transformers import BatchFeature, ProcessorMixin

from .audio import load_audio
from .serving import audio_errors_answered, check_source
from .windows import num_windows

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


class SalmonnProcessor(ProcessorMixin):
    r"""
    Wraps a [`SalmonnFeatureExtractor`] and the language model's tokenizer.

    Args:
        feature_extractor ([`SalmonnFeatureExtractor`]).
        tokenizer (`PreTrainedTokenizerBase`): the language model's.
        chat_template (`str`, *optional*): default: the tokenizer's own, or SALMONN's where it has none.
        audio_token (`str`): the token of the vocabulary that stands for one audio embedding.
        window_frames, window_stride, queries_per_window (`int`): as in the model's config.
        transcription_prompt (`str`): what `apply_transcription_request` asks by default.
    """

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
        tokenizer.padding_side = "left"  # generation goes on from the right end of every row
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
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

    @audio_errors_answered()
    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`): prompts, with one `audio_token` per clip.
            audio: one clip or a flat list of clips, in the order of their placeholders: arrays at 16 kHz, paths, bytes
                or anything else that [`load_audio`] takes.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (left-padded) and what the feature extractor returns.

        Raises:
            ValueError: if the number of placeholders is not that of the clips.
            AudioError: for a clip that cannot be used, naming it.
        """
        # The base class has the feature extractor's fetch_audio decode the clips.
        kwargs = {"padding": True, "return_tensors": "pt", **kwargs}
        return super().__call__(text=text, audio=audio, **kwargs)

    @audio_errors_answered()
    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """As `ProcessorMixin.apply_chat_template`; a clip is `{"type": "audio", "audio": path, array, ...}`."""
        batched = isinstance(conversation[0], (list, tuple))
        conversations = [
            [{**message, "content": self._decoded(message["content"])} for message in messages]
            for messages in (conversation if batched else [conversation])
        ]
        return super().apply_chat_template(conversations if batched else conversations[0], chat_template, **kwargs)

    def _decoded(self, content):
        """Message content with its clips decoded to arrays."""
        if isinstance(content, str):
            return content
        parts = []
        for part in content:
            clips = [part[key] for key in ("audio", "path", "url") if part["type"] == "audio" and part.get(key) is not None]
            if clips:
                check_source(clips[0])
                part = {"type": "audio", "audio": load_audio(clips[0], self.feature_extractor.sampling_rate)}
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

    def batch_decode(self, *args, **kwargs):
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)


SalmonnProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["SalmonnProcessor"]
