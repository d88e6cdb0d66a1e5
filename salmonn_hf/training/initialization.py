"""What a new model starts from: statistics of its training set's frames, before the first step."""

import logging

import torch

from ..data.clip_dataset import ClipDataset
from ..data.collator import ClipCollator
from ..data.ctc_vocabulary import ctc_text
from ..data.encoder_features import encode_clips, pad_features
from ..data.streamed_clips import StreamedClips
from ..data.task_prompts import CAPTION_TASKS, is_transcript
from ..model.clip_tensors import pad_clips
from ..model.sound_summary import frame_statistics
from .sound_kinds import fit_sound_summary

logger = logging.getLogger(__name__)

SPEECH_SHARE = 0.1  # of transcribed clips, among those that a sound summary is fitted to


def encoded_examples(model, dataset: ClipDataset, clips: int, seed: int = 0) -> list[tuple[dict, dict]]:
    """The encoders' frames of random clips that can be decoded, see `encode_clips`, with their examples."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:clips].tolist()
    examples = [example for index in chosen if "clip" in (example := dataset[index])]
    return [(encode_clips(model, [example["clip"]], dataset.cache)[0], example) for example in examples]


def start_projector(model, dataset: ClipDataset, speech_tokenizer, whisper_directory):
    """Let the projector of `model` begin where its pretrained parts are, see [`SalmonnProjector.initialize`]."""
    transcribed = [
        (frames["audio_frames"].cpu(), speech_tokenizer(ctc_text(example["text"]), add_special_tokens=False).input_ids)
        for frames, example in encoded_examples(model, dataset, clips=60)
        if is_transcript(example["task"])
    ]
    model.projector.initialize(model.get_input_embeddings(), whisper_directory, transcribed)


def standardise_frames(model, dataset: ClipDataset, clips: int = 2000, seed: int = 0):
    """
    Start the LayerNorms behind the encoders so that every feature has mean 0 and variance 1 over `clips` random
    clips: a few of Whisper's features are ten times the others, and would drown them in the Q-Former's first layer.
    """
    encoded = [frames for frames, _ in encoded_examples(model, dataset, clips, seed)]
    for kind in ("audio", "sound"):
        if (norm := getattr(model.projector, f"{kind}_norm", None)) is not None:
            frames = torch.cat([frames[f"{kind}_frames"].cpu() for frames in encoded]).float()
            standardise(norm, frames)


@torch.no_grad()
def standardise(norm: torch.nn.LayerNorm, inputs: torch.Tensor):
    """Start a LayerNorm so that every feature of `inputs`, `(rows, width)`, float32, has mean 0 and variance 1."""
    normed = torch.nn.functional.layer_norm(inputs, inputs.shape[-1:])
    norm.weight.copy_(1 / normed.std(0))
    norm.bias.copy_(-normed.mean(0) / normed.std(0))


def start_sound_summary(model, dataset: ClipDataset, collator: ClipCollator, seed: int = 0):
    """
    Fit the summary of `model` to a training set's captioned clips and some with a transcript: `fit_sound_summary`.

    Raises:
        ValueError: if the training set is read as a stream, or has no caption.
    """
    tasks = [] if isinstance(dataset, StreamedClips) else dataset.task_of_each()
    captioned = [index for index, task in enumerate(tasks) if task in CAPTION_TASKS]
    if not captioned:
        raise ValueError(
            "For sounds, a model is first fitted to all captions of its training set, but none of its sources has "
            "a caption task without streaming; add one, or start from a checkpoint with sounds."
        )
    spoken = [index for index, task in enumerate(tasks) if is_transcript(task)]
    order = torch.randperm(len(spoken), generator=torch.Generator().manual_seed(seed))
    spoken = [spoken[place] for place in order[: int(SPEECH_SHARE * len(captioned))]]

    statistics, captions = [], []
    for index in captioned + spoken:
        example = dataset[index]
        clip = example.get("clip")
        if clip is None or "text" in clip:  # it cannot be decoded, or has no sound
            continue
        if "sound_frames" in clip:
            frames = pad_clips([{"sound_frames": clip["sound_frames"]}])
        else:
            with torch.no_grad():
                frames = model.encode_audio(**pad_features([clip], model.device), transcribe=False)
        statistics.append(frame_statistics(frames["sound_frames"], frames["sound_frames_mask"]).cpu())
        texts = [] if is_transcript(example["task"]) else example["texts"]
        captions.append([collator.caption_ids(text) for text in texts])
    loss = fit_sound_summary(model, torch.cat(statistics), captions, seed)
    logger.info("sound summary fitted to %d clips, %.2f nats per clip", len(captions), loss)
