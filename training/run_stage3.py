"""
Stage 3, activation tuning: a model that was tuned on transcripts and captions answers whatever it is asked with one of
these. It still can do otherwise: with its LoRA turned down it writes at length. A few such answers of its own, and as
many steps on them, bring that back (SALMONN, https://arxiv.org/abs/2310.13289: 12 stories, 12 steps of one each).

    accelerate launch training/run_stage3.py training/recipes/small/stage3.yaml

The sources need a task of long answers, such as audio_story_telling; what they have as text is not used. The answers
are written to `output_dir` as stories.parquet. The same command goes on from the last checkpoint there. The same
factor at inference:

    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model.language_model, 0.5):
        output = model.generate(**inputs)
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft.helpers import rescale_adapter_scale
from transformers.hf_argparser import HfArg

from salmonn_hf import SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.data.clip_audio import read_clip
from salmonn_hf.data.clip_dataset import ClipDataset
from salmonn_hf.data.clip_table import ClipTable
from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.data.encoder_features import encode_clips, num_frames
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.data.sources import Source
from salmonn_hf.model.answering import generate_answers
from salmonn_hf.model.clip_tensors import pad_clips
from salmonn_hf.terminal import command
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.stage import CheckpointArguments, TrainingStage


@dataclass(kw_only=True)
class ModelArguments(CheckpointArguments):
    lora_scale: float = HfArg(default=0.5, help="Factor on LoRA while the answers are generated.")
    stories: int = HfArg(default=12, help="Clips to generate an answer for.")
    max_new_tokens: int = HfArg(default=256, help="Of an answer.")


@torch.no_grad()
def tell_stories(model, processor, clips: ClipDataset, args: ModelArguments, seed: int) -> list[dict]:
    """Rows of random clips with the model's own answers, LoRA turned down, as their text."""
    collator, rows = ClipCollator(processor, []), []
    for index in np.random.default_rng(seed).permutation(len(clips)).tolist():
        example = clips[0, index]
        if "skipped" in example or len(rows) == args.stories:
            continue
        (frames,) = encode_clips(model, [example["clip"]])
        prompt = torch.tensor([collator.prompt_ids(num_frames(frames), example["messages"])])
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)} | pad_clips([frames])
        with rescale_adapter_scale(model.language_model, args.lora_scale):
            (text,) = generate_answers(model, processor, inputs, args.max_new_tokens, do_sample=False)
        if text:
            row, _, seconds = clips.row(index)
            audio = {"bytes": flac_bytes(read_clip(row)), "path": example["path"]}
            story = {"audio": audio, "text": text, "task": example["task"], "seconds": seconds}
            rows.append(story | {"question": row.get("question") or ""})
    return rows


@command
def main():
    stage = TrainingStage(ModelArguments)
    args, training_args = stage.model_args, stage.training_args

    processor = SalmonnProcessor.from_pretrained(args.model_name_or_path)
    model = SalmonnForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=training_args.frozen_dtype)
    if model.config.lora is None:
        raise ValueError(f"{args.model_name_or_path} has no LoRA to turn down; start from a stage 2 checkpoint.")
    path = Path(training_args.output_dir, "stories.parquet")
    with training_args.main_process_first(desc="telling stories"):
        if not path.exists():
            seed = training_args.data_seed_or_seed
            clips, _ = stage.data_args.datasets(stage.train_tables, [], model, processor, Augmentation(), seed)
            rows = tell_stories(model.eval(), processor, clips, args, training_args.seed)
            pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
    freeze_base_parts(model, freeze_encoder_lora=True)  # as it was when the stories were told
    stories = [ClipTable(Source(path=str(path)), skipped=stage.skipped)]
    stage.train(model, processor, ClipCollator(processor, []), stage.datasets(model, processor, stories))


if __name__ == "__main__":
    main()
