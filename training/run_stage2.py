"""
Stage 2, instruction tuning: Q-Former, projection and a LoRA adapter in the language model learn to answer, with the
loss on the answer only and the alignment loss of stage 1 kept on with a small weight.

    accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml
    accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml --learning_rate 1e-4
    accelerate launch training/run_stage2.py training/recipes/small/stage2_qlora.yaml   # language model in 4 bits

Start from a stage 1 checkpoint, or from any SALMONN checkpoint to fine-tune it on your own audio
(`model_name_or_path`). The same command goes on from the last checkpoint in `output_dir`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from salmonn_hf import SalmonnConfig, SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.data.arguments import DataArguments
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.data.skipped_clips import SkippedClips
from salmonn_hf.model.lora import cut_lora_rank, encoder_lora
from salmonn_hf.model.quantized_layers import quantize_parts
from salmonn_hf.training.distillation import DistillingTrainer
from salmonn_hf.training.recipe import parse_recipe
from salmonn_hf.training.trainer import (
    ClipCollator,
    SalmonnTrainer,
    SalmonnTrainingArguments,
    freeze_base_parts,
    last_checkpoint,
    save_model,
    start_sound_summary,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "SALMONN checkpoint to start from: directory or hub name."})
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of a new LoRA adapter (8 by default); a larger one is cut to it."}
    )
    lora_alpha: int = field(default=32)
    lora_dropout: float = field(default=0.1)
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    audio_lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of a new LoRA adapter in all layers of the speech encoder as well; default: none."},
    )
    freeze_encoder_lora: bool = field(
        default=False, metadata={"help": "Leave LoRA in the speech encoder as it is: its features are then kept."}
    )
    lora_learning_rate: float | None = field(default=None, metadata={"help": "Default: that of everything else."})
    language_model_bits: int = field(
        default=0,
        metadata={"help": "QLoRA: keep the frozen language model in 4 or 8 bits; 0: as the checkpoint has it."},
    )
    group_size: int = field(default=64, metadata={"help": "Columns that share a scale in 4 bits."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of the language model; on a CPU 'eager' trains short clips fastest."}
    )
    merged_windows: int | None = field(
        default=None,
        metadata={"help": "Windows without a word that the language model reads as one; default: as the checkpoint."},
    )
    sound_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Let a checkpoint that hears words alone hear sounds, by these layers of its encoder."},
    )
    sound_summary_size: int = field(default=128, metadata={"help": "Hidden size of the MLP that they go through."})
    sound_kinds: int = field(default=400, metadata={"help": "How many kinds of sound it tells apart."})
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Learn of transcripts what this checkpoint foretells, in place of their text, so that other tasks "
            "spoil nothing; what reads words from the frames then stays as it is."
        },
    )
    ctc_loss_weight: float = field(default=0.1, metadata={"help": "Weight of the alignment loss; 0 for none."})


def load_model(args: ModelArguments, dtype: torch.dtype) -> SalmonnForConditionalGeneration:
    """
    The checkpoint, its frozen parts in `dtype`, or with its language model in `language_model_bits`, which is for
    bfloat16 alone.

    Raises:
        ValueError: if it is quantised already, in another way.
    """
    config = SalmonnConfig.from_pretrained(args.model_name_or_path)
    if args.merged_windows is not None:
        # Made anew, for its checks.
        config = SalmonnConfig.from_dict(config.to_dict() | {"merged_windows": args.merged_windows})
    stored, rounded = config.quantization or {}, {}
    if args.language_model_bits:
        four = {"group_size": args.group_size} if args.language_model_bits == 4 else {}
        rounded = {"language_model": {"bits": args.language_model_bits, **four}}
        if "language_model" in stored and not rounded.items() <= stored.items():
            raise ValueError(
                f"{args.model_name_or_path} has its language model in {stored['language_model']} already; leave out "
                "language_model_bits, or start from the checkpoint before it was quantised."
            )
    if rounded or "language_model" in stored:
        dtype = torch.bfloat16
    in_base_part = "language_model" in (config.base_parts or {})
    if in_base_part:
        config.quantization = stored | rounded or None  # rounded while it is loaded
    model = SalmonnForConditionalGeneration.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=dtype,
        attn_implementation={"text_config": args.attn_implementation},
    )
    if not in_base_part:
        quantize_parts(model, rounded)  # what is quantised already stays
        model.config.quantization = stored | rounded or None
    return model


def main():
    model_args, data_args, augmentation, training_args = parse_recipe(
        (ModelArguments, DataArguments, Augmentation, SalmonnTrainingArguments)
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.info("world size %d", training_args.world_size)
    torch.manual_seed(training_args.seed)

    processor = SalmonnProcessor.from_pretrained(model_args.model_name_or_path)
    model = load_model(model_args, training_args.frozen_dtype)
    model.config.ctc_loss_weight = model_args.ctc_loss_weight
    if model.config.lora is None:
        model.add_lora(
            {
                "r": 8 if model_args.lora_r is None else model_args.lora_r,
                "lora_alpha": model_args.lora_alpha,
                "lora_dropout": model_args.lora_dropout,
                "target_modules": model_args.lora_target_modules,
            }
        )
    elif model_args.lora_r is not None and model_args.lora_r < model.config.lora["r"]:
        cut_lora_rank(model, model_args.lora_r)
    if model_args.audio_lora_r is not None and model.config.audio_lora is None:
        model.add_lora(encoder_lora(model_args.audio_lora_r), "audio_tower")
    new_to_sounds = model_args.sound_layers is not None and model.config.sound_layers is None
    if new_to_sounds:
        model.add_sound_summary(model_args.sound_layers, model_args.sound_summary_size, model_args.sound_kinds)
    distils = model_args.teacher_name_or_path is not None
    freeze_base_parts(model, keep_words=distils, keep_encoder=model_args.freeze_encoder_lora)
    use_ctc = model.ctc_head is not None and model_args.ctc_loss_weight > 0 and not distils

    skipped = SkippedClips(Path(training_args.output_dir, "skipped.tsv") if training_args.should_save else None)
    train, evaluation = data_args.load(skipped)
    train_dataset, eval_dataset = data_args.datasets(
        train, evaluation, model, processor, augmentation, training_args.drawing_seed
    )
    collator = ClipCollator(
        processor,
        model.ctc_head.token_ids.tolist() if use_ctc else [],
        model.config.ctc_merges,
        clips=getattr(train_dataset, "clips", None),
        caption_bags=not model.config.sound_summary_size,
    )
    checkpoint = last_checkpoint(training_args.output_dir)
    if new_to_sounds and checkpoint is None:
        start_sound_summary(model, train_dataset, collator, training_args.seed)
    trainer_class, of_teacher = SalmonnTrainer, {}
    if distils:
        teacher = SalmonnForConditionalGeneration.from_pretrained(
            model_args.teacher_name_or_path, dtype=training_args.frozen_dtype
        )
        trainer_class, of_teacher = DistillingTrainer, {"teacher": teacher}
    trainer = trainer_class(
        model=model,
        args=training_args,
        lora_learning_rate=model_args.lora_learning_rate,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        skipped=skipped,
        **of_teacher,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    save_model(trainer, processor)
    if eval_dataset is not None:
        trainer.evaluate()


if __name__ == "__main__":
    main()
