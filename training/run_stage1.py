"""
Stage 1, alignment: the projector learns to put audio where the language model's own word embeddings lie, by CTC
against them. The language model itself is not run, so this takes minutes.

    accelerate launch training/run_stage1.py training/recipes/nano/stage1.yaml
    accelerate launch training/run_stage1.py training/recipes/nano/stage1.yaml --max_steps 50 --output_dir runs/try

The same command goes on from the last checkpoint in `output_dir`. A projector that is Whisper's whole decoder has
nothing to align: only its end frames are fitted.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.hf_argparser import HfArg

from salmonn_hf import SalmonnConfig, SalmonnFeatureExtractor, SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.data.collator import ClipCollator
from salmonn_hf.data.ctc_vocabulary import ctc_tokenizer, ctc_vocabulary
from salmonn_hf.model.base_part_resolver import resolve_base_part
from salmonn_hf.model.checkpoint import config_from_base_parts
from salmonn_hf.model.lora import encoder_lora
from salmonn_hf.terminal import command
from salmonn_hf.training.end_frames import fit_end_frames
from salmonn_hf.training.freezing import freeze_base_parts
from salmonn_hf.training.initialization import standardise_frames, start_projector, start_sound_summary
from salmonn_hf.training.stage import SpeechEncoderArguments, TrainingStage


@dataclass(kw_only=True)
class ModelArguments(SpeechEncoderArguments):
    audio_tower: str = HfArg(help="Whisper encoder: hub name or directory.")
    language_model: str = HfArg(help="Causal language model: hub name or directory.")
    sound_tower: str | None = HfArg(default=None, help="Sound encoder: directory of a converted BEATs.")
    encoder_dtype: str | None = HfArg(default=None, help="Of the frozen encoders; default: bfloat16 with bf16 on.")
    tail_seconds: float | None = HfArg(default=None, help="Silence behind each clip; default: 0.2 s.")
    languages: list[str] | None = HfArg(default=None, help="Codes of those that the training data has, e.g. en.")
    audio_token: str = HfArg(default="<|audio|>", help="Token of its vocabulary that text never uses.")
    chat_template: str | None = HfArg(default=None, help="Jinja file; default: the language model's own.")


def make_processor(args: ModelArguments, config: SalmonnConfig, tokenizer) -> SalmonnProcessor:
    projector, mel_bins = config.projector_config, config.audio_config.num_mel_bins
    features = {"pad_to_30_seconds": projector.pad_to_30_seconds, "return_input_values": args.sound_tower is not None}
    features |= {} if args.tail_seconds is None else {"tail_seconds": args.tail_seconds}
    extractor = SalmonnFeatureExtractor(mel_bins, **features)
    windows = ("window_frames", "window_stride", "queries_per_window")
    settings = {name: getattr(projector, name) for name in windows}
    return SalmonnProcessor(extractor, tokenizer, audio_token=args.audio_token, **settings)


def make_model(args: ModelArguments, config: SalmonnConfig, tokens: dict[str, list], dtype: torch.dtype):
    model = SalmonnForConditionalGeneration.from_base_parts(config, dtype=dtype)
    for tower in ("audio_tower", "sound_tower"):
        if hasattr(model, tower) and args.encoder_dtype:
            getattr(model, tower).to(getattr(torch, args.encoder_dtype))
    if args.audio_lora_r is not None:
        model.add_lora(encoder_lora(args.audio_lora_r), "audio_tower")
    for name, ids in tokens.items():
        buffer = model.projector.get_buffer(name)
        buffer.copy_(torch.tensor(ids, dtype=buffer.dtype).view_as(buffer))
    return model


def save_initial_model(stage: TrainingStage, model, processor, dataset):
    """Of a projector that is Whisper's whole decoder the end frames alone are learnt here, see `fit_end_frames`."""
    fit_end_frames(model, dataset, stage.training_args.seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(stage.training_args.output_dir)
    processor.save_pretrained(stage.training_args.output_dir)


@command
def main():
    stage = TrainingStage(ModelArguments)
    args = stage.model_args

    whisper, language_model = map(resolve_base_part, (args.audio_tower, args.language_model))
    tokenizer, speech_tokenizer = map(AutoTokenizer.from_pretrained, (language_model, whisper))
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text()
    fields = {"model_type": "salmonn_window_qformer"} | json.loads(args.projector_config)
    projector_config = AutoConfig.for_model(**fields)
    texts = (text for table in stage.train_tables for text in table.transcripts())
    token_ids = ctc_vocabulary(texts, ctc_tokenizer(tokenizer, projector_config.ctc_merges))
    tokenizers = (tokenizer, speech_tokenizer, GenerationConfig.from_pretrained(whisper))
    tokens = projector_config.choose_tokens(token_ids, *tokenizers)

    parts = (args.audio_tower, args.language_model, projector_config, args.sound_tower)
    audio_token_id = tokenizer.convert_tokens_to_ids(args.audio_token)
    settings = {"sound_layers": args.sound_layers, "languages": args.languages}
    config = config_from_base_parts(*parts, audio_token_id=audio_token_id, **settings)
    processor = make_processor(args, config, tokenizer)
    model = make_model(args, config, tokens, stage.training_args.frozen_dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    freeze_base_parts(model, freeze_language_model_lora=True)

    datasets = train_dataset, _ = stage.datasets(model, processor)
    names_sounds = config.projector_config.names_sounds
    vocabulary = tokens.get("ctc_head.token_ids", []), projector_config.ctc_merges
    collator = ClipCollator(processor, *vocabulary, alignment_only=True, caption_bags=not names_sounds)
    if not config.projector_config.ctc_vocab_size:
        save_initial_model(stage, model, processor, train_dataset)
        return
    if stage.checkpoint is None:
        standardise_frames(model, train_dataset)
        start_projector(model, train_dataset, speech_tokenizer, whisper)
        if names_sounds:
            start_sound_summary(model, train_dataset, collator, stage.training_args.seed)
    stage.train(model, processor, collator, datasets)


if __name__ == "__main__":
    main()
