"""
Stage 3, activation tuning: a model that was tuned on transcripts and captions answers whatever it is asked with one of
these. It still can do otherwise: with its LoRA turned down it writes at length. A few such answers of its own, and as
many steps on them, bring that back (SALMONN, https://arxiv.org/abs/2310.13289: 12 stories, 12 steps of one each).

    accelerate launch training/run_stage3.py training/recipes/small/stage3.yaml

The sources need a task of long answers, such as audio_story_telling; what they have as text is not used. The answers
are kept in `output_dir` as stories.parquet. The same command goes on from the last checkpoint there. The same knob at
inference:

    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model.language_model, 0.5):
        output = model.generate(**inputs)
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft.helpers import rescale_adapter_scale

from salmonn_hf import SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.data.arguments import DataArguments
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.data.clip_audio import read_clip
from salmonn_hf.data.clip_dataset import ClipDataset
from salmonn_hf.data.clip_table import ClipTable
from salmonn_hf.data.encoder_features import encode_clips, num_frames, pad_clips
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.data.skipped_clips import SkippedClips
from salmonn_hf.data.sources import Source
from salmonn_hf.training.recipe import parse_recipe
from salmonn_hf.training.trainer import (
    ClipCollator,
    SalmonnTrainer,
    SalmonnTrainingArguments,
    freeze_base_parts,
    generate_answers,
    last_checkpoint,
    save_model,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "SALMONN checkpoint of stage 2: directory or hub name."})
    lora_scale: float = field(default=0.5, metadata={"help": "Factor on LoRA while the answers are generated."})
    stories: int = field(default=12, metadata={"help": "Clips to generate an answer for."})
    max_new_tokens: int = field(default=256, metadata={"help": "Of an answer."})


@torch.no_grad()
def tell_stories(model, processor, clips: ClipDataset, args: ModelArguments, seed: int) -> list[dict]:
    """Rows of random clips with the model's own answers, LoRA turned down, as their text."""
    collator, rows = ClipCollator(processor, []), []
    for index in np.random.default_rng(seed).permutation(len(clips)).tolist():
        example = clips[0, index]
        if "skipped" in example or len(rows) == args.stories:
            continue
        (frames,) = encode_clips(model, [example["clip"]])
        prompt = collator.prompt_ids(num_frames(frames), example["messages"])
        with rescale_adapter_scale(model.language_model, args.lora_scale):
            (text,) = generate_answers(model, processor, [prompt], pad_clips([frames]), args.max_new_tokens)
        if text:
            row, _, seconds = clips.row(index)
            audio = {"bytes": flac_bytes(read_clip(row)), "path": example["path"]}
            question = row.get("question") or ""
            rows.append(
                {"audio": audio, "text": text, "task": example["task"], "question": question, "seconds": seconds}
            )
    return rows


def main():
    model_args, data_args, augmentation, training_args = parse_recipe(
        (ModelArguments, DataArguments, Augmentation, SalmonnTrainingArguments)
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(training_args.seed)

    processor = SalmonnProcessor.from_pretrained(model_args.model_name_or_path)
    model = SalmonnForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path, dtype=training_args.frozen_dtype
    )
    if model.config.lora is None:
        raise ValueError(f"{model_args.model_name_or_path} has no LoRA to turn down; start from a stage 2 checkpoint.")
    skipped = SkippedClips(Path(training_args.output_dir, "skipped.tsv") if training_args.should_save else None)
    train, evaluation = data_args.load(skipped)
    path = Path(training_args.output_dir, "stories.parquet")
    with training_args.main_process_first(desc="telling stories"):
        if not path.exists():
            clips, _ = data_args.datasets(train, [], model, processor, Augmentation(), training_args.drawing_seed)
            rows = tell_stories(model.eval(), processor, clips, model_args, training_args.seed)
            pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
    freeze_base_parts(model, keep_encoder=True)  # as it heard when it told them
    stories = [ClipTable(Source(path=str(path)), skipped=skipped)]
    train_dataset, eval_dataset = data_args.datasets(
        stories, evaluation, model, processor, augmentation, training_args.drawing_seed
    )
    trainer = SalmonnTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=ClipCollator(processor, []),
        processing_class=processor,
        skipped=skipped,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    save_model(trainer, processor)
    if eval_dataset is not None:
        trainer.evaluate()


if __name__ == "__main__":
    main()
