"""Examples of a dataset to the batches that the trainer takes."""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from ..model.processing_salmonn import SalmonnProcessor
from .clip_dataset import ClipDataset
from .ctc_vocabulary import ctc_text, ctc_tokenizer
from .encoder_features import num_frames
from .task_prompts import CAPTION_TASKS, is_transcript


@lru_cache(maxsize=4096)
def _prompt_ids(processor: SalmonnProcessor, messages: str) -> list[int]:
    return processor.prompt_ids(json.loads(messages))


@dataclass(eq=False)
class ClipCollator:
    """
    Examples of `ClipDataset` to a batch for the trainer:

    - `clips` (`list[dict]`): frames or features, see `encode_clips`; `tasks` (`list[str]`); `seconds` (`float`) of all
      clips; `skipped` (`list[tuple[str, str]]`): path and reason of clips that could not be decoded, left out.
    - `input_ids`, `attention_mask`, `labels` (`torch.LongTensor` of shape `(clips, tokens)`): prompt and answer,
      left-padded whatever the tokenizer's padding side, with the answer's end token at the right end, and -100 in
      place of all but the answer.
    - `ctc_labels` (`torch.LongTensor` of shape `(clips, tokens)`): transcripts as indices into `ctc_token_ids`, -100
      padded; `caption_labels`, of the same kind: tokens of captions.

    Should no clip be left, the batch is a moment of silence without any label, and adds nothing to the loss.

    Args:
        ctc_token_ids: the CTC head's tokens; empty for no `ctc_labels`.
        ctc_merges: see `ctc_tokenizer`.
        alignment_only: clips and `ctc_labels` alone, as the alignment stage needs them.
        clips: which makes the examples of [`StreamedClips`].
        caption_bags: `caption_labels` beside the `ctc_labels`; of no use to a model with a [`SalmonnSoundSummary`].
    """

    processor: SalmonnProcessor
    ctc_token_ids: list[int]
    ctc_merges: int | None = None
    alignment_only: bool = False
    clips: ClipDataset | None = None
    caption_bags: bool = True

    @cached_property
    def ctc_tokenizer(self) -> Tokenizer:
        return ctc_tokenizer(self.processor.tokenizer, self.ctc_merges)

    @cached_property
    def ctc_index(self) -> dict[int, int]:
        return {token: index for index, token in enumerate(self.ctc_token_ids)}

    def silence(self) -> dict:
        features = self.processor.feature_extractor([np.zeros(1600, np.float32)], return_tensors="pt")
        clip = {name: features[name][0] for name in ("input_features", "input_values") if name in features}
        return {"clip": clip, "messages": None, "task": "asr", "text": None, "seconds": 0.0}

    def __call__(self, examples: list) -> dict:
        if examples[0] is None:  # which StreamedClips reads over
            return {}
        examples = [self.clips.example(*item) if isinstance(item, tuple) else item for item in examples]
        skipped = [(example["path"], example["skipped"]) for example in examples if "skipped" in example]
        examples = [example for example in examples if "skipped" not in example] or [self.silence()]
        examples = [self.with_text_ids(example) for example in examples]
        batch = {
            "clips": [example["clip"] for example in examples],
            "tasks": [example["task"] for example in examples],
            "seconds": sum(example["seconds"] for example in examples),
            "skipped": skipped,
        }
        right = {"batch_first": True, "padding_value": -100}
        if self.ctc_token_ids:
            said = [example["text"] if is_transcript(example["task"]) else None for example in examples]
            batch["ctc_labels"] = pad_sequence([self.ctc_labels(text) for text in said], **right)
            described = [self.caption_labels(example) for example in examples] if self.caption_bags else []
            if any(map(len, described)):
                batch["caption_labels"] = pad_sequence(described, **right)
        if self.alignment_only:
            return batch

        tokenizer = self.processor.tokenizer
        prompts = [self.prompt_ids(num_frames(example["clip"]), example["messages"]) for example in examples]
        answers = [self.answer_ids(example["text"]) for example in examples]
        rows, labels = [], []
        for prompt, answer, example in zip(prompts, answers, examples, strict=True):
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.where(torch.arange(len(rows[-1])) < len(prompt), -100, rows[-1]))
            if example["text"] is None:  # silence
                labels[-1].fill_(-100)
        left = {"batch_first": True, "padding_side": "left"}
        batch["input_ids"] = pad_sequence(rows, padding_value=tokenizer.pad_token_id, **left)
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], **left)
        batch["labels"] = pad_sequence(labels, padding_value=-100, **left)
        return batch

    def with_text_ids(self, example: dict) -> dict:
        """Of an example of text alone, its clip as `{"text_ids"}`, `(tokens,)`."""
        if "text" not in example["clip"]:
            return example
        ids = self.processor.text_ids(example["clip"]["text"].strip())
        return example | {"clip": {"text_ids": torch.tensor(ids)}}

    def prompt_ids(self, frames: int, messages: list[dict] | None = None) -> list[int]:
        """The tokens of a prompt about one clip of so many encoder frames; `None`: a request for a transcript."""
        token = self.processor.audio_token_id
        tokens = _prompt_ids(self.processor, json.dumps(messages or self.processor.transcription_messages()))
        place = tokens.index(token)
        return tokens[:place] + [token] * self.processor.num_audio_tokens(frames) + tokens[place + 1 :]

    def answer_ids(self, text: str | None) -> list[int]:
        return self.processor.text_ids((text or "").strip()) + [self.processor.tokenizer.eos_token_id]

    def ctc_labels(self, text: str | None) -> torch.Tensor:
        tokens = [] if text is None else self.ctc_tokenizer.encode(ctc_text(text), add_special_tokens=False).ids
        labels = [self.ctc_index[token] for token in tokens if token in self.ctc_index]
        return torch.tensor(labels, dtype=torch.int64)

    def caption_labels(self, example: dict) -> torch.Tensor:
        """The tokens of a caption, as it is spelt within a sentence; none of any other answer."""
        tokens = self.caption_ids(example["text"]) if example["task"] in CAPTION_TASKS else []
        return torch.tensor(tokens, dtype=torch.int64)

    def caption_ids(self, text: str) -> list[int]:
        return self.processor.text_ids(" " + text.strip().lower())
