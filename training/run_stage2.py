"""
Stage 2, instruction tuning: Q-Former, projection and a LoRA adapter in the language model learn to answer, with the
loss on the answer only and the alignment loss of stage 1 kept on with a small weight.

    accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml
    accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml --learning_rate 1e-4

Start from a stage 1 checkpoint, or from any SALMONN checkpoint to fine-tune it on your own audio
(`model_name_or_path`). The same command goes on from the last checkpoint in `output_dir`.
"""

import logging
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from salmonn_hf import SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.recipe import parse_recipe
from salmonn_hf.training import (
    CachedSpeechDataset,
    CrossFittedDataset,
    SalmonnTrainer,
    SpeechArguments,
    SpeechCollator,
    freeze_base_parts,
    save_model,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "SALMONN checkpoint to start from: directory or hub name."})
    lora_r: int = field(default=8, metadata={"help": "Rank of a new LoRA adapter, if the checkpoint has none yet."})
    lora_alpha: int = field(default=32)
    lora_dropout: float = field(default=0.1)
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    lora_learning_rate: float | None = field(default=None, metadata={"help": "Default: that of everything else."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of the language model; on a CPU 'eager' trains short clips fastest."}
    )
    fold_connectors: list[str] = field(
        default_factory=list,
        metadata={"help": "Stage 1 checkpoints, each trained without one fold; then LoRA alone is trained."},
    )
    ctc_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the alignment loss; 0 for none."})


def main():
    model_args, data_args, training_args = parse_recipe((ModelArguments, SpeechArguments, TrainingArguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(training_args.seed)

    processor = SalmonnProcessor.from_pretrained(model_args.model_name_or_path)
    model = SalmonnForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        dtype=torch.bfloat16,
        attn_implementation={"text_config": model_args.attn_implementation},
    )
    model.config.ctc_loss_weight = model_args.ctc_loss_weight
    if model.config.lora is None:
        model.add_lora(
            {
                "r": model_args.lora_r,
                "lora_alpha": model_args.lora_alpha,
                "lora_dropout": model_args.lora_dropout,
                "target_modules": model_args.lora_target_modules,
            }
        )
    freeze_base_parts(model, alignment=not model_args.fold_connectors)
    use_ctc = model.ctc_head is not None and model_args.ctc_loss_weight > 0 and not model_args.fold_connectors

    train_speech, eval_speech = data_args.load(join=not model_args.fold_connectors)
    build = (model, processor.feature_extractor, data_args.feature_cache)
    train_dataset = CachedSpeechDataset.build(train_speech, *build, data_args.masked_frames)
    if model_args.fold_connectors:
        folds = [SalmonnForConditionalGeneration.from_pretrained(path) for path in model_args.fold_connectors]
        train_dataset = CrossFittedDataset(
            train_dataset, folds, data_args.joined_clips, tuple(data_args.joined_seconds)
        )
    trainer = SalmonnTrainer(
        model=model,
        args=training_args,
        lora_learning_rate=model_args.lora_learning_rate,
        train_dataset=train_dataset,
        eval_dataset=CachedSpeechDataset.build([eval_speech], *build),
        data_collator=SpeechCollator(
            processor, model.ctc_head.token_ids.tolist() if use_ctc else [], model.config.ctc_merges
        ),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir))
    save_model(trainer, processor)
    trainer.evaluate()


if __name__ == "__main__":
    main()
