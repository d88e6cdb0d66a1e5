"""
Stage 2, instruction tuning: Q-Former, projection and a LoRA adapter in the language model learn to answer, with the
loss on the answer only and the alignment loss of stage 1 beside it with a small weight.

    accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml
    accelerate launch training/run_stage2.py training/recipes/nano/stage2.yaml --learning_rate 1e-4
    accelerate launch training/run_stage2.py training/recipes/small/stage2_qlora.yaml   # language model in 4 bits

Start from a stage 1 checkpoint, or from any SALMONN checkpoint to fine-tune it on your own audio
(`model_name_or_path`). The same command goes on from the last checkpoint in `output_dir`.
"""

import json
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from salmonn_hf import SalmonnConfig, SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.model.lora import encoder_lora
from salmonn_hf.model.quantizer_salmonn import quantize_in_place, set_quantized_parts
from salmonn_hf.terminal import command
from salmonn_hf.training.distillation import DistillingTrainer
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.initialization import start_sound_summary
from salmonn_hf.training.lora_rank import cut_lora_rank
from salmonn_hf.training.sound_kinds import add_sound_summary
from salmonn_hf.training.stage import CheckpointArguments, SpeechEncoderArguments, TrainingStage


@dataclass(kw_only=True)
class ModelArguments(CheckpointArguments, SpeechEncoderArguments):
    lora_r: int | None = HfArg(default=None, help="Rank of new LoRA (8 by default); a larger one is cut to it.")
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_target_modules: list[str] = HfArg(default_factory=lambda: ["q_proj", "v_proj"])
    freeze_encoder_lora: bool = HfArg(
        default=False, help="Leave LoRA in the speech encoder as it is: its features are then cached."
    )
    language_model_bits: int = HfArg(
        default=0, help="QLoRA: keep the frozen language model in 4 or 8 bits; 0: as the checkpoint has it."
    )
    group_size: int = HfArg(default=64, help="Columns that share a scale in 4 bits.")
    attn_implementation: str | None = HfArg(
        default=None, help="Of the language model; on a CPU 'eager' trains short clips fastest."
    )
    teacher_name_or_path: str | None = HfArg(
        default=None,
        help="Learn transcripts from this checkpoint's next-token distributions, in place of their text, so that "
        "other tasks spoil nothing; everything from the frames to the words then stays frozen.",
    )


def load_model(args: ModelArguments, projector: dict, dtype: torch.dtype) -> SalmonnForConditionalGeneration:
    """
    The checkpoint, with these fields of its projector's config changed, its frozen parts in `dtype`, or with its
    language model in `language_model_bits`, which is for bfloat16 alone.

    Raises:
        ValueError: if it is quantised already, in another way.
    """
    config = SalmonnConfig.from_pretrained(args.model_name_or_path)
    if projector:  # made anew, for its checks
        changed = config.projector_config.to_dict() | projector
        config = SalmonnConfig.from_dict(config.to_dict() | {"projector_config": changed})
    stored, rounded = config.quantized_parts, {}
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
    if rounded and "language_model" in (config.base_parts or {}):
        set_quantized_parts(config, stored | rounded)  # rounded while it is loaded
    attention = {"text_config": args.attn_implementation}
    model = SalmonnForConditionalGeneration.from_pretrained(
        args.model_name_or_path, config=config, dtype=dtype, attn_implementation=attention
    )
    if rounded:
        quantize_in_place(model, rounded)  # what is quantised already stays
    return model


def add_lora(model, args: ModelArguments):
    """A new adapter in the language model, or the checkpoint's own, cut to `lora_r`; and one in the speech encoder."""
    if model.config.lora is None:
        lora = {"r": 8 if args.lora_r is None else args.lora_r, "lora_alpha": args.lora_alpha}
        lora |= {"lora_dropout": args.lora_dropout, "target_modules": args.lora_target_modules}
        model.add_lora(lora)
    elif args.lora_r is not None and args.lora_r < model.config.lora["r"]:
        cut_lora_rank(model, args.lora_r)
    if args.audio_lora_r is not None and model.config.audio_lora is None:
        model.add_lora(encoder_lora(args.audio_lora_r), "audio_tower")


@command
def main():
    stage = TrainingStage(ModelArguments)
    args, training_args = stage.model_args, stage.training_args

    processor = SalmonnProcessor.from_pretrained(args.model_name_or_path)
    config = SalmonnConfig.from_pretrained(args.model_name_or_path)
    projector = json.loads(args.projector_config)
    new_to_sounds = args.sound_layers is not None and config.sound_layers is None
    sizes = {"sound_summary_size", "sound_kinds"} & projector.keys() if new_to_sounds else ()
    of_sounds = {name: projector.pop(name) for name in sizes}
    model = load_model(args, projector, training_args.frozen_dtype)
    add_lora(model, args)
    if new_to_sounds:
        add_sound_summary(model, args.sound_layers, **of_sounds)
    distils = args.teacher_name_or_path is not None
    freeze_base_parts(model, freeze_encoder_lora=args.freeze_encoder_lora, freeze_speech_parts=distils)

    datasets = train_dataset, _ = stage.datasets(model, processor)
    use_ctc = model.projector.has_ctc_head and training_args.ctc_loss_weight > 0 and not distils
    token_ids = model.projector.ctc_head.token_ids.tolist() if use_ctc else []
    merges, bags = model.config.projector_config.ctc_merges, not model.config.projector_config.names_sounds
    clips = getattr(train_dataset, "clips", None)
    collator = ClipCollator(processor, token_ids, merges, clips=clips, caption_bags=bags)
    if new_to_sounds and stage.checkpoint is None:
        start_sound_summary(model, train_dataset, collator, training_args.seed)
    distillation = {}
    if distils:
        dtype = training_args.frozen_dtype
        teacher = SalmonnForConditionalGeneration.from_pretrained(args.teacher_name_or_path, dtype=dtype)
        distillation = {"trainer_class": DistillingTrainer, "teacher": teacher}
    stage.train(model, processor, collator, datasets, **distillation)


if __name__ == "__main__":
    main()
