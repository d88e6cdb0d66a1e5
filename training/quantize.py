"""
Quantise a trained model: 4 bits by GPTQ, calibrated on prompts with audio and answers, 8 bits by rounding.

    pip install -c constraints.txt -e .[train,quant]
    python training/quantize.py training/recipes/nano/quantize.yaml
    python training/quantize.py training/recipes/nano/quantize.yaml --method nearest --output_dir runs/nano-rounded
    python training/quantize.py training/recipes/nano/quantize.yaml --method nf4 --output_dir runs/nano-nf4

The output is a full checkpoint with its processor and code. It loads by `AutoModel.from_pretrained` and
`pipeline("automatic-speech-recognition")`, without gptqmodel; where the language model is in another library's format
(`nf4`, `int8`, `torchao-int8`), with that library alone. It holds nothing of the calibration data.
"""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.hf_argparser import HfArg

from salmonn_hf import SalmonnConfig, SalmonnForConditionalGeneration, SalmonnProcessor
from salmonn_hf.data.sources import Source
from salmonn_hf.hub.model_card import make_card, write_card
from salmonn_hf.hub.push import push_to_hub
from salmonn_hf.model.adapters import name_adapter_base
from salmonn_hf.model.quantizer_salmonn import SalmonnQuantizationConfig, quantize_in_place
from salmonn_hf.quantization.calibration import draw_clips, prompt_with_answer
from salmonn_hf.quantization.gptq import quantize_layers, quantize_tied_vocabulary
from salmonn_hf.terminal import command
from salmonn_hf.training.recipe import parse_recipe

# The language model in another library's format, by transformers' own quantisers.
LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}


@dataclass
class QuantizeArguments:
    model_name_or_path: str = HfArg(help="Trained SALMONN checkpoint: directory or hub name.")
    output_dir: str = HfArg(help="Where the quantised checkpoint goes.")
    language_model_bits: int = HfArg(default=4, help="4, 8, or 0 to leave a part as it is.")
    embedding_bits: int = HfArg(default=8, help="Of token embeddings and language-model head.")
    encoder_bits: int = HfArg(default=8, help="Of the encoders' layers.")
    projector_bits: int = HfArg(default=8, help="Of the projector's layers and token embeddings.")
    group_size: int = HfArg(default=64, help="Columns that share a scale in 4 bits.")
    method: str = HfArg(
        default="gptq",
        help="'gptq' or 'nearest', for 4 bits; 8 are always 'nearest'. Or bitsandbytes' 'nf4' or 'int8' or "
        "'torchao-int8' for the language model's layers, whatever language_model_bits.",
    )
    train_files: list[str] = HfArg(default_factory=list, help="Parquet files to calibrate on.")
    text_column: str = HfArg(default="text", help="Column that holds the transcript.")
    sources: list[str] = HfArg(default_factory=list, help="More to calibrate on, as in a training recipe.")
    calibration_clips: int = HfArg(default=64, help="Clips, drawn at random, of each source by its weight.")
    merge_lora: bool = HfArg(default=True, help="Fold LoRA in first; otherwise it stays, unquantised.")
    seed: int = 0
    hub_model_id: str | None = HfArg(default=None, help="Push the result there, e.g. user/name.")

    def __post_init__(self):
        if self.method not in ("gptq", "nearest", *LIBRARIES):
            names = ", ".join(map(repr, LIBRARIES))
            raise ValueError(f"method is {self.method!r}; choose 'gptq' or 'nearest', or of {names}.")
        if self.method == "gptq" and not self.calibration_sources():
            raise ValueError("GPTQ needs train_files or sources to calibrate on; or choose method 'nearest'.")

    def calibration_sources(self) -> list[Source]:
        files = [Source(path=file, columns={"text": self.text_column}) for file in self.train_files]
        return files + [Source.parse(settings) for settings in self.sources]

    def parts(self, config: SalmonnConfig) -> dict[str, dict]:
        """`SalmonnQuantizationConfig.parts` of a model of `config` by this recipe."""
        bits = {
            "audio_tower": self.encoder_bits,
            "sound_tower": self.encoder_bits if config.sound_config is not None else 0,
            "projector": self.projector_bits,
            "language_model": 0 if self.method in LIBRARIES else self.language_model_bits,
            "embedding": self.embedding_bits,
        }
        bits |= {f"projector.{name}": self.projector_bits for name in config.projector_config.token_embeddings}
        eight, four = {"bits": 8}, {"bits": 4, "group_size": self.group_size}
        return {part: four if count == 4 else eight for part, count in bits.items() if count}


def calibration_batches(args: QuantizeArguments, processor) -> list[dict]:
    """One input of the model per clip: GPTQ would count padding."""
    examples = draw_clips(args.calibration_sources(), args.calibration_clips, args.seed)
    return [prompt_with_answer(processor, example) for example in examples]


def quantize(model, processor, args: QuantizeArguments):
    """Quantise `model`, in float32, in place; parts that come later are calibrated on those before them."""
    parts = args.parts(model.config)
    if "projector" in parts:
        model.projector.drop_unused_tokens()
    batches = calibration_batches(args, processor) if args.method == "gptq" else []
    layers = {
        "audio_tower": model.audio_tower.layers,
        "projector": getattr(model.projector, "layers", None),  # of a Q-Former none, which GPTQ's loop could go along
        "language_model": getattr(model.language_model.base_model, "layers", None),
    }
    for part, settings in parts.items():
        if batches and settings["bits"] == 4:
            if layers.get(part) is not None:
                quantize_layers(model, layers[part], batches, **settings)
            elif part == "embedding" and model.config.text_config.tie_word_embeddings:
                quantize_tied_vocabulary(model, batches, settings["group_size"])
        quantize_in_place(model, {part: settings})  # what GPTQ has not done
    model.config.base_parts = None


def in_library_format(model, args: QuantizeArguments, directory: str):
    """
    The model with its language model's layers in the format of a library, and its other parts rounded, as it is loaded
    again from a checkpoint in `directory`.
    """
    others = [name for name, _ in model.named_children() if name != "language_model"]
    others += [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    others.append(r".*\.lora_[AB]")
    if args.method == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=others)
    elif args.method == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
    else:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=others, **nf4)
    model.projector.drop_unused_tokens()
    model.config.base_parts = None
    model.to(torch.bfloat16).save_pretrained(directory)
    quantization_config = SalmonnQuantizationConfig(args.parts(model.config), language_model=settings)
    return SalmonnForConditionalGeneration.from_pretrained(directory, quantization_config=quantization_config)


def save(model, processor, output_dir: str, merged_parts: dict[str, str] | None = None):
    """Write the checkpoint, with a card that names what was merged, beside `output_dir` and move it there whole."""
    unfinished = Path(f"{output_dir}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    tokenizer = unfinished / "tokenizer.json"  # which is written with an indented line for each half of a merge
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text("utf-8")), ensure_ascii=False), "utf-8")
    name = Path(output_dir).resolve().name
    name_adapter_base(unfinished, name)  # of LoRA that is left: not the path of this machine
    write_card(make_card(unfinished.resolve(), [], name=name, merged_parts=merged_parts), unfinished)
    if os.path.isdir(output_dir):
        shutil.rmtree(output_dir)
    os.replace(unfinished, output_dir)


@command
@torch.no_grad()
def main():
    (args,) = parse_recipe(QuantizeArguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    processor = SalmonnProcessor.from_pretrained(args.model_name_or_path)
    model = SalmonnForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    merged_parts = model.config.base_parts
    if args.merge_lora:
        model.merge_lora()
    model.eval()
    if args.method in LIBRARIES:
        with tempfile.TemporaryDirectory() as directory:
            model = in_library_format(model, args, directory)
    else:
        quantize(model, processor, args)
        model.to(torch.bfloat16)
    save(model, processor, args.output_dir, merged_parts)
    size = sum(file.stat().st_size for file in Path(args.output_dir).rglob("*") if file.is_file())
    logging.info("%s: %.1f MB", args.output_dir, size / 1e6)
    if args.hub_model_id:
        push_to_hub(args.output_dir, args.hub_model_id)


if __name__ == "__main__":
    main()
