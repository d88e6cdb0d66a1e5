"""
Stage 1, alignment: the window Q-Former learns to put audio where the language model's own word embeddings lie, by CTC
against them. The language model itself is not run, so this takes minutes.

    accelerate launch training/run_stage1.py training/recipes/nano/stage1.yaml
    accelerate launch training/run_stage1.py training/recipes/nano/stage1.yaml --max_steps 50 --output_dir runs/try

The same command goes on from the last checkpoint in `output_dir`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from salmonn_hf import SalmonnConfig, SalmonnFeatureExtractor, SalmonnProcessor
from salmonn_hf.base_parts.resolver import resolve_base_part
from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.data.ctc_vocabulary import ctc_text, ctc_tokenizer, ctc_vocabulary
from salmonn_hf.data.tasks import is_transcript
from salmonn_hf.model.checkpoint import config_from_base_parts, from_base_parts
from salmonn_hf.model.lora import encoder_lora
from salmonn_hf.model.speech_decoder import shared_tokens, start_from_whisper
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.initialization import encoded_examples, standardise_frames, start_sound_summary
from salmonn_hf.training.stage import SpeechEncoderArguments, TrainingStage


@dataclass(kw_only=True)
class ModelArguments(SpeechEncoderArguments):
    audio_tower: str = field(metadata={"help": "Whisper encoder: hub name or directory."})
    language_model: str = field(metadata={"help": "Causal language model: hub name or directory."})
    sound_tower: str | None = field(default=None, metadata={"help": "Sound encoder: directory of a converted BEATs."})
    encoder_dtype: str | None = field(
        default=None,
        metadata={"help": "Of the frozen encoders; default: bfloat16, or float32 with bf16 off."},
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
    window_reach: int = field(
        default=0, metadata={"help": "Windows apart that such layers learn to distinguish; 0: none."}
    )
    merged_windows: int = field(
        default=1,
        metadata={"help": "Windows without a word that become one embedding of the language model; 1: none."},
    )
    ctc_merges: int | None = field(
        default=None,
        metadata={"help": "Spell CTC targets with the tokenizer's first merges; default: all."},
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file; default: the language model's own."}
    )

    @property
    def windows(self) -> dict[str, int]:
        """The settings of windows, which the model and its processor share."""
        return {name: getattr(self, name) for name in ("window_frames", "window_stride", "queries_per_window")}

    @property
    def has_sound_summary(self) -> bool:
        return self.speech_decoder_layers > 0 and (self.sound_layers or self.sound_tower) is not None


def make_config(args: ModelArguments, tokenizer, ctc_vocab_size: int, ctc_trained_size: int) -> SalmonnConfig:
    return config_from_base_parts(
        args.audio_tower,
        args.language_model,
        args.sound_tower,
        sound_layers=args.sound_layers,
        pad_to_30_seconds=args.pad_to_30_seconds,
        audio_token_id=tokenizer.convert_tokens_to_ids(args.audio_token),
        window_position_embeddings=True,
        frame_mlp_size=args.frame_mlp_size,
        speech_decoder_layers=args.speech_decoder_layers,
        window_context=args.window_context,
        window_reach=args.window_reach,
        merged_windows=args.merged_windows,
        sound_summary_size=args.sound_summary_size if args.has_sound_summary else 0,
        sound_kinds=args.sound_kinds,
        projector_norm=True,
        ctc_vocab_size=ctc_vocab_size,
        ctc_trained_size=ctc_trained_size,
        ctc_merges=args.ctc_merges,
        qformer_config={
            "hidden_size": args.qformer_hidden_size,
            "num_hidden_layers": args.qformer_layers,
            "num_attention_heads": args.qformer_heads,
            "intermediate_size": args.qformer_intermediate_size,
            "hidden_dropout_prob": args.qformer_dropout,
            "attention_probs_dropout_prob": args.qformer_dropout,
        },
        **args.windows,
    )


def make_processor(args: ModelArguments, config: SalmonnConfig, tokenizer) -> SalmonnProcessor:
    extractor = SalmonnFeatureExtractor(
        feature_size=config.audio_config.num_mel_bins,
        pad_to_30_seconds=args.pad_to_30_seconds,
        return_input_values=args.sound_tower is not None,
    )
    return SalmonnProcessor(extractor, tokenizer, audio_token=args.audio_token, **args.windows)


def make_model(args: ModelArguments, config: SalmonnConfig, ctc_token_ids: list[int], dtype: torch.dtype):
    model = from_base_parts(config, dtype=dtype)
    for tower in ("audio_tower", "sound_tower"):
        if hasattr(model, tower) and args.encoder_dtype:
            getattr(model, tower).to(getattr(torch, args.encoder_dtype))
    if args.audio_lora_r is not None:
        model.add_lora(encoder_lora(args.audio_lora_r), "audio_tower")
    model.ctc_head.token_ids.copy_(torch.tensor(ctc_token_ids))
    if not args.speech_decoder_layers:
        model.match_projection_to_embeddings()
    return model


def start_speech_decoder(model, args: ModelArguments, dataset, speech_tokenizer, speech_ids, capital_ids):
    """Whisper's own weights and tokens for a connector from its decoder, aligned on a few clips."""
    model.ctc_head.speech_token_ids.copy_(torch.tensor(speech_ids))
    model.ctc_head.capital_token_ids.copy_(torch.tensor(capital_ids))
    transcribed = [
        (frames["audio_frames"].cpu(), speech_tokenizer(ctc_text(example["text"]), add_special_tokens=False).input_ids)
        for frames, example in encoded_examples(model, dataset, clips=60)
        if is_transcript(example["task"])
    ]
    start_from_whisper(model, resolve_base_part(args.audio_tower), transcribed)


def main():
    stage = TrainingStage(ModelArguments)
    args = stage.model_args

    tokenizer = AutoTokenizer.from_pretrained(resolve_base_part(args.language_model))
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text()
    texts = (text for table in stage.train_tables for text in table.transcripts())
    ctc_token_ids = ctc_vocabulary(texts, ctc_tokenizer(tokenizer, args.ctc_merges))
    ctc_trained_size, whispers_ids = 0, []
    if args.speech_decoder_layers:
        speech_tokenizer = AutoTokenizer.from_pretrained(resolve_base_part(args.audio_tower))
        shared, trained = shared_tokens(tokenizer, speech_tokenizer), set(ctc_token_ids)
        shared.sort(key=lambda ids: ids[0] not in trained)  # those of the training texts first
        ctc_trained_size = sum(ids[0] in trained for ids in shared)
        ctc_token_ids, *whispers_ids = map(list, zip(*shared, strict=True))

    config = make_config(args, tokenizer, len(ctc_token_ids), ctc_trained_size)
    processor = make_processor(args, config, tokenizer)
    model = make_model(args, config, ctc_token_ids, stage.training_args.frozen_dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    freeze_base_parts(model, freeze_language_model_lora=True)

    datasets = train_dataset, _ = stage.datasets(model, processor)
    collator = ClipCollator(
        processor, ctc_token_ids, args.ctc_merges, alignment_only=True, caption_bags=not config.sound_summary_size
    )
    if stage.checkpoint is None:
        standardise_frames(model, train_dataset)
        if args.speech_decoder_layers:
            start_speech_decoder(model, args, train_dataset, speech_tokenizer, *whispers_ids)
        if config.sound_summary_size:
            start_sound_summary(model, train_dataset, collator, stage.training_args.seed)
    stage.train(model, processor, collator, datasets)


if __name__ == "__main__":
    main()
