"""
Evaluation while a model trains: its answers to the clips of an evaluation set, and their scores. Transcripts are made
as the pipeline makes them, in segments cut at pauses, so their word error rate is that of `eval/run_asr.py`.
"""

import io
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import EvalPrediction

from ..data.clip_audio import read_clip
from ..data.clip_dataset import ClipDataset
from ..data.collator import ClipCollator
from ..data.encoder_features import encode_clips, num_frames
from ..data.skipped_clips import UnusableClip
from ..data.task_prompts import is_transcript, training_metric
from ..data.text_choice import row_texts
from ..evaluation.answer_metrics import correct_answers
from ..evaluation.caption_metrics import CaptionMetricsError, cider_d, require_java
from ..evaluation.word_error_rate import word_error_rate
from ..model.answering import generate_answers, transcript_limit
from ..model.audio import SAMPLING_RATE
from ..model.clip_tensors import pad_clips
from ..model.segmentation import speech_segments

logger = logging.getLogger(__name__)

ANSWER_TOKENS, SAMPLES_PRINTED = 96, 3  # of an answer that is no transcript; of each metric


@dataclass(frozen=True)
class Segment:
    """A clip of an evaluation set, or a part of it (`start` and `end` in samples), that is one row of a batch."""

    clip: int
    seconds: float
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Answer:
    task: str
    references: list[str]
    text: str


def metric_of(task: str, alignment_only: bool) -> str | None:
    """By what answers to a task are measured; the CTC head, which is all that is trained in alignment, transcribes."""
    metric = training_metric(task)
    return None if alignment_only and metric != "wer" else metric


def check_metrics(dataset: ClipDataset, alignment_only: bool, metric_for_best_model: str | None):
    """
    Raises:
        ValueError: if the evaluation set does not give `metric_for_best_model`.
        CaptionMetricsError: if it has captions, and what scores them, Java among it, is not installed.
    """
    metrics = {metric_of(task, alignment_only) for task in dataset.tasks()} - {None}
    best = (metric_for_best_model or "").removeprefix("eval_")
    if best and best not in metrics:
        raise ValueError(
            f"metric_for_best_model is {best!r}, but the evaluation set, of the tasks "
            f"{', '.join(sorted(dataset.tasks()))}, gives {', '.join(sorted(metrics)) or 'no metric'}."
        )
    try:
        if "cider" in metrics:
            require_java()
    except CaptionMetricsError as error:
        raise CaptionMetricsError(f"The evaluation set has captions. {error}") from error


@lru_cache(2)
def plan_segments(dataset: ClipDataset, alignment_only: bool) -> tuple[list[Segment], dict[int, Answer]]:
    """
    The segments of all clips, the longest first, and for each clip its task and references, its text still empty.
    Silent segments of transcripts are left out, and so are clips that cannot be decoded.
    """
    segments, clips = [], {}
    max_seconds = dataset.feature_extractor.chunk_length
    for index in range(len(dataset)):
        row, source, seconds = dataset.row(index)
        task = source.task or row.get("task") or "asr"
        clips[index] = Answer(task, row_texts(row), "")
        if alignment_only or not is_transcript(task):
            segments.append(Segment(index, seconds))
            continue
        try:
            waveform = read_clip(row, source.speed)
        except (UnusableClip, ValueError, OSError) as error:
            logger.warning("not evaluated: %s: %s", row["audio"]["path"] or f"clip {index}", error)
            del clips[index]
            continue
        for part in speech_segments(waveform, SAMPLING_RATE, max_seconds):
            end = None if (part.start, part.end) == (0, len(waveform)) else part.end
            segments.append(Segment(index, (part.end - part.start) / SAMPLING_RATE, part.start, end))
    return sorted(segments, key=lambda segment: -segment.seconds), clips


def segment_example(dataset: ClipDataset, segment: Segment) -> dict:
    """The example of a segment, see [`ClipDataset`]; a part of a clip is a clip with audio of its own."""
    if segment.end is None:
        return dataset[segment.clip]
    row, source, _ = dataset.row(segment.clip)
    waveform, file = read_clip(row, source.speed)[segment.start : segment.end], io.BytesIO()
    # Not WAV, in which the time is written as well: by its bytes the clip is found in the cache again.
    soundfile.write(file, waveform, SAMPLING_RATE, format="AU", subtype="FLOAT")
    row = row | {"audio": {"bytes": file.getvalue(), "path": row["audio"]["path"]}, "expand_wav": None}
    return dataset.example(row, replace(source, speed=1.0), None, segment.clip, segment.seconds)


@torch.no_grad()
def answer_segments(
    model,
    collator: ClipCollator,
    dataset: ClipDataset,
    segments: Sequence[Segment],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    **generate_kwargs,
) -> list[str | None]:
    """The greedy answers to segments, in one batch, under `autocast`; `None` for a clip that cannot be decoded."""
    examples = [segment_example(dataset, segment) for segment in segments]
    usable = [place for place, example in enumerate(examples) if "skipped" not in example]
    # Of a batch without a usable clip, silence is answered: other processes may wait for this one in each layer.
    rows = [examples[place] for place in usable] or [collator.silence()]
    frames = encode_clips(model, [row["clip"] for row in rows], dataset.cache)
    batch = {name: value.to(model.device) for name, value in pad_clips(frames).items()}
    if collator.alignment_only:
        with autocast():
            projector, embedding = model.projector, model.get_input_embeddings()
            token_ids = projector.ctc_transcripts(*projector.window_states(**batch), embedding)
        texts = [text.strip() for text in collator.processor.batch_decode(token_ids)]
    else:
        left, pairs = {"batch_first": True, "padding_side": "left"}, zip(frames, rows, strict=True)
        prompts = [torch.tensor(collator.prompt_ids(num_frames(clip), row["messages"])) for clip, row in pairs]
        padding = collator.processor.tokenizer.pad_token_id
        batch["input_ids"] = pad_sequence(prompts, padding_value=padding, **left)
        batch["attention_mask"] = pad_sequence([torch.ones_like(prompt) for prompt in prompts], **left)
        limits = [
            transcript_limit(segments[place].seconds) if is_transcript(examples[place]["task"]) else ANSWER_TOKENS
            for place in usable
        ] or [1]
        greedy = {"do_sample": False, "num_beams": 1} | generate_kwargs
        greedy["is_transcript"] = [is_transcript(examples[place]["task"]) for place in usable] or False
        with autocast():
            texts = generate_answers(model, collator.processor, batch, limits, **greedy)
    answers = dict(zip(usable, texts, strict=False))
    return [answers.get(place) for place in range(len(segments))]


def join_segments(segments: list[Segment], texts: dict[int, str | None], clips: dict[int, Answer]) -> list[Answer]:
    """
    The answers of whole clips, in the dataset's order, from the texts of `segments` by their number, as the pipeline
    joins them. A clip with a segment that could not be decoded is left out.
    """
    parts = defaultdict(list)
    for number in sorted(texts, key=lambda number: segments[number].start):
        parts[segments[number].clip].append(texts[number])
    return [
        replace(answer, text=" ".join(" ".join(parts[clip]).split()))
        for clip, answer in clips.items()
        if None not in parts[clip]
    ]


def score_answers(answers: list[Answer], alignment_only: bool) -> dict[str, float]:
    """The "wer" of transcripts, "cider" (CIDEr-D) of captions and "accuracy" of short answers, whichever there are."""
    groups, metrics = defaultdict(list), {}
    for answer in answers:
        groups[metric_of(answer.task, alignment_only)].append(answer)
    for metric, group in groups.items():
        references, texts = [answer.references for answer in group], [answer.text for answer in group]
        if metric == "wer":
            metrics[metric] = word_error_rate([several[0] for several in references], texts).wer
        elif metric == "cider":
            metrics[metric] = cider_d(references, texts)
        elif metric == "accuracy":
            metrics[metric] = float(correct_answers(references, texts).mean())
    return metrics


def print_samples(answers: list[Answer], alignment_only: bool):
    """The first answers of each metric, with the first reference of each."""
    printed = defaultdict(int)
    for answer in answers:
        printed[metric := metric_of(answer.task, alignment_only)] += 1
        if printed[metric] <= SAMPLES_PRINTED:
            tqdm.write(f"  reference  {answer.references[0]}\n  answer     {answer.text}")


def as_prediction(answers: list[Answer], tokenizer) -> EvalPrediction:
    """
    Answers as `Seq2SeqTrainer` gives them to `compute_metrics`: token ids of the answers and of the first references,
    int64 of shape `(clips, tokens)`, -100 padded.
    """

    def token_ids(texts: list[str]) -> np.ndarray:
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=-100).numpy()

    labels = token_ids([answer.references[0] for answer in answers])
    return EvalPrediction(predictions=token_ids([answer.text for answer in answers]), label_ids=labels)
