"""
Stage 1, alignment: the window Q-Former learns to put audio where the language model's own word embeddings lie, by CTC
against them. The language model itself is not run, so this takes minutes.

    accelerate launch training/run_stage1.py training/recipes/nano/stage1.yaml
    accelerate launch training/run_stage1.py training/recipes/nano/stage1.yaml --max_steps 50 --output_dir runs/try

The same command goes on from the last checkpoint in `output_dir`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from salmonn_hf.model.speech_decoder import shared_tokens, start_from_whisper
from transformers import AutoTokenizer

from salmonn_hf import SalmonnFeatureExtractor, SalmonnProcessor
from salmonn_hf.base_parts import resolve_base_part
from salmonn_hf.data.arguments import DataArguments
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.data.skipped_clips import SkippedClips
from salmonn_hf.data.task_prompts import is_transcript
from salmonn_hf.model.checkpoint import config_from_base_parts, from_base_parts
from salmonn_hf.model.lora import encoder_lora
from salmonn_hf.training.recipe import parse_recipe
from salmonn_hf.training.trainer import (
    ClipCollator,
    SalmonnTrainer,
    SalmonnTrainingArguments,
    ctc_text,
    ctc_tokenizer,
    ctc_vocabulary,
    encoded_examples,
    freeze_base_parts,
    last_checkpoint,
    save_model,
    standardise_frames,
    start_sound_summary,
)


@dataclass
class ModelArguments:
    audio_tower: str = field(metadata={"help": "Whisper encoder: hub name or directory."})
    language_model: str = field(metadata={"help": "Causal language model: hub name or directory."})
    sound_tower: str | None = field(default=None, metadata={"help": "Sound encoder: directory of a converted BEATs."})
    sound_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers of the speech encoder that hear sounds, in place of a sound encoder."}
    )
    encoder_dtype: str | None = field(
        default=None,
        metadata={"help": "Of the frozen encoders; default: bfloat16, or float32 with bf16 off."},
    )
    audio_lora_r: int | None = field(
        default=None, metadata={"help": "Rank of a LoRA adapter in all layers of the speech encoder; default: none."}
    )
    pad_to_30_seconds: bool = field(default=False, metadata={"help": "Every clip as 30 s: SALMONN's own geometry."})
    audio_token: str = field(default="<|audio|>", metadata={"help": "Token of its vocabulary that text never uses."})
    window_frames: int = field(default=17, metadata={"help": "Encoder frames (20 ms) per Q-Former window."})
    window_stride: int = field(default=17, metadata={"help": "Encoder frames between window starts."})
    queries_per_window: int = field(default=1, metadata={"help": "Audio tokens per window."})
    qformer_hidden_size: int = field(default=768)
    qformer_layers: int = field(default=2)
    qformer_heads: int = field(default=12)
    qformer_intermediate_size: int = field(default=3072)
    qformer_dropout: float = field(default=0.1, metadata={"help": "0 for short runs, which do not overfit."})
    frame_mlp_size: int = field(default=0, metadata={"help": "Hidden size of the MLP beside the Q-Former; 0: none."})
    speech_decoder_layers: int = field(
        default=0, metadata={"help": "Last layers of Whisper's decoder in place of the Q-Former; 0: a Q-Former."}
    )
    window_context: int = field(default=0, metadata={"help": "Frames beside a window that such layers see as well."})
    window_reach: int = field(default=0, metadata={"help": "Windows apart that such layers learn to tell; 0: none."})
    merged_windows: int = field(
        default=1,
        metadata={"help": "Windows without a word that the language model reads as one; 1: none."},
    )
    ctc_merges: int | None = field(
        default=None,
        metadata={"help": "Spell its targets with the tokenizer's first merges; default: all."},
    )
    sound_summary_size: int = field(
        default=128, metadata={"help": "Hidden size of the MLP that sounds go through beside such layers."}
    )
    sound_kinds: int = field(default=400, metadata={"help": "How many kinds of sound it tells apart."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file; default: the language model's own."}
    )

    @property
    def hears_sounds_beside_words(self) -> bool:
        return self.speech_decoder_layers > 0 and (self.sound_layers or self.sound_tower) is not None


def main():
    model_args, data_args, augmentation, training_args = parse_recipe(
        (ModelArguments, DataArguments, Augmentation, SalmonnTrainingArguments)
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.info("world size %d", training_args.world_size)
    torch.manual_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(resolve_base_part(model_args.language_model))
    if model_args.chat_template:
        tokenizer.chat_template = Path(model_args.chat_template).read_text()
    skipped = SkippedClips(Path(training_args.output_dir, "skipped.tsv") if training_args.should_save else None)
    train, evaluation = data_args.load(skipped)
    texts = (text for table in train for text in table.transcripts())
    ctc_token_ids = ctc_vocabulary(texts, ctc_tokenizer(tokenizer, model_args.ctc_merges))
    ctc_trained_size = 0
    if model_args.speech_decoder_layers:
        speech_tokenizer = AutoTokenizer.from_pretrained(resolve_base_part(model_args.audio_tower))
        shared, trained = shared_tokens(tokenizer, speech_tokenizer), set(ctc_token_ids)
        shared.sort(key=lambda ids: ids[0] not in trained)  # those of the training texts first
        ctc_trained_size = sum(ids[0] in trained for ids in shared)
        ctc_token_ids, *speech_ids = map(list, zip(*shared, strict=True))

    windows = {
        "window_frames": model_args.window_frames,
        "window_stride": model_args.window_stride,
        "queries_per_window": model_args.queries_per_window,
    }
    config = config_from_base_parts(
        model_args.audio_tower,
        model_args.language_model,
        model_args.sound_tower,
        sound_layers=model_args.sound_layers,
        pad_to_30_seconds=model_args.pad_to_30_seconds,
        audio_token_id=tokenizer.convert_tokens_to_ids(model_args.audio_token),
        window_position_embeddings=True,
        frame_mlp_size=model_args.frame_mlp_size,
        speech_decoder_layers=model_args.speech_decoder_layers,
        window_context=model_args.window_context,
        window_reach=model_args.window_reach,
        merged_windows=model_args.merged_windows,
        sound_summary_size=model_args.sound_summary_size if model_args.hears_sounds_beside_words else 0,
        sound_kinds=model_args.sound_kinds,
        projector_norm=True,
        ctc_vocab_size=len(ctc_token_ids),
        ctc_trained_size=ctc_trained_size,
        ctc_merges=model_args.ctc_merges,
        qformer_config={
            "hidden_size": model_args.qformer_hidden_size,
            "num_hidden_layers": model_args.qformer_layers,
            "num_attention_heads": model_args.qformer_heads,
            "intermediate_size": model_args.qformer_intermediate_size,
            "hidden_dropout_prob": model_args.qformer_dropout,
            "attention_probs_dropout_prob": model_args.qformer_dropout,
        },
        **windows,
    )
    processor = SalmonnProcessor(
        SalmonnFeatureExtractor(
            feature_size=config.audio_config.num_mel_bins,
            pad_to_30_seconds=model_args.pad_to_30_seconds,
            return_input_values=model_args.sound_tower is not None,
        ),
        tokenizer,
        audio_token=model_args.audio_token,
        **windows,
    )
    model = from_base_parts(config, dtype=training_args.frozen_dtype)
    for tower in ("audio_tower", "sound_tower"):
        if hasattr(model, tower) and model_args.encoder_dtype:
            getattr(model, tower).to(getattr(torch, model_args.encoder_dtype))
    if model_args.audio_lora_r is not None:
        model.add_lora(encoder_lora(model_args.audio_lora_r), "audio_tower")
    model.ctc_head.token_ids.copy_(torch.tensor(ctc_token_ids))
    if not model_args.speech_decoder_layers:
        model.match_projection_to_embeddings()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    freeze_base_parts(model, alignment_only=True)

    train_dataset, eval_dataset = data_args.datasets(
        train, evaluation, model, processor, augmentation, training_args.drawing_seed
    )
    collator = ClipCollator(
        processor,
        ctc_token_ids,
        model_args.ctc_merges,
        alignment_only=True,
        caption_bags=not config.sound_summary_size,
    )
    checkpoint = last_checkpoint(training_args.output_dir)
    if checkpoint is None:
        standardise_frames(model, train_dataset)
        if model_args.speech_decoder_layers:
            model.ctc_head.speech_token_ids.copy_(torch.tensor(speech_ids[0]))
            model.ctc_head.capital_token_ids.copy_(torch.tensor(speech_ids[1]))
            spoken = [
                (frames["audio_frames"].cpu(), ctc_text(example["text"]))
                for frames, example in encoded_examples(model, train_dataset, clips=60)
                if is_transcript(example["task"])
            ]
            spoken = [(frames, speech_tokenizer(text, add_special_tokens=False).input_ids) for frames, text in spoken]
            start_from_whisper(model, resolve_base_part(model_args.audio_tower), spoken)
        if config.sound_summary_size:
            start_sound_summary(model, train_dataset, collator, training_args.seed)
    trainer = SalmonnTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        skipped=skipped,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    save_model(trainer, processor)
    if eval_dataset is not None:
        trainer.evaluate()


if __name__ == "__main__":
    main()
