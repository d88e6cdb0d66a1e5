"""
Memory and latency: time to the first token by part, time per further token, throughput, weights by module.

    python eval/run_efficiency.py --model model_cards/salmonn-lite-nano --output runs/efficiency
    python eval/run_efficiency.py --shapes nano --reference --peer granite-speech --output runs/efficiency-nano
    python eval/run_efficiency.py --shapes seed --quantization '{"language_model": {"bits": 4}}' --output runs/seed

The protocol of SALMONN's compression challenge (batch 1, a clip of 10 s, a transcription prompt, one decode step per
token), with the device synchronised at every mark, the features timed as well, and the peak of memory reset after
loading. The clip is speech, this project's recordings one after another: how many pauses it has decides how much the
language model reads where windows are merged. Systems to compare with, and what is written: `docs/efficiency.md`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

from salmonn_hf import SalmonnConfig, SalmonnFeatureExtractor, SalmonnForConditionalGeneration, load_audio
from salmonn_hf.convert.published_configs import published_config
from salmonn_hf.evaluation import efficiency
from salmonn_hf.evaluation.efficiency import Benchmark, random_model
from salmonn_hf.evaluation.plots import new_figure
from salmonn_hf.evaluation.tables import render
from salmonn_hf.files import complete_or_absent, write_atomically
from salmonn_hf.model.lora import LORA_FIELDS, adapted_parts
from salmonn_hf.terminal import command

RECORDINGS = Path(__file__).resolve().parent / "recordings"
NANO = Path(__file__).resolve().parents[1] / "model_cards" / "salmonn-lite-nano"
SHAPES = {"seed": "seed", "baseline": "nota", "small": "nlp-07", "salmonn-7b": "salmonn-7b"}
QFORMER = published_config("seed").projector_config  # the published systems' projector


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint directory or hub name")
    source.add_argument("--shapes", choices=[*SHAPES, "nano"], help="random weights of these sizes")
    parser.add_argument("--quantization", type=json.loads, help="with --shapes: parts to quantise, JSON")
    parser.add_argument("--own_length", action="store_true", help="with --shapes: a clip costs what it lasts")
    parser.add_argument("--reference", action="store_true", help="also the published way: 30 s, 88 tokens, float32")
    parser.add_argument("--peer", choices=["granite-speech"], help="also a model of transformers of the same sizes")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the clip; default: %(default)s")
    parser.add_argument("--lengths", type=float, nargs="*", default=[1.0, 3.0, 10.0, 30.0], help="further clips")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 8, 32], help="for the throughput")
    parser.add_argument("--decode_steps", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the timed ones; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="directory for the results")
    return parser.parse_args()


class GraniteBenchmark(Benchmark):
    """
    transformers' Granite Speech. Its own feature extractor needs torchaudio; ours makes the same 80 log-mel bins, of
    which it stacks two frames.
    """

    def make_extractor(self) -> SalmonnFeatureExtractor:
        return SalmonnFeatureExtractor()

    def features(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        mel = self.extractor(clips, return_tensors="pt")["input_features"].transpose(1, 2)
        return {"input_features": mel[:, : mel.shape[1] // 2 * 2].reshape(len(mel), -1, 160).to(self.device)}

    def audio_tokens(self, clip: np.ndarray) -> int:
        windows = -(-self.features([clip])["input_features"].shape[1] // self.config.window_size)
        return windows * self.config.window_size // self.config.downsample_rate

    def embed_prompt(self, clip: np.ndarray, marks: list[float]) -> torch.Tensor:
        model = self.model.model
        features = self.features([clip])["input_features"]
        marks.append(self.mark())
        frames = model.encoder(features.to(self.model.dtype)).last_hidden_state
        marks += [self.mark()] * 2  # it has no sound encoder
        audio_embeds = model.projector(frames)
        marks.append(self.mark())
        return model.get_merged_audio_embeddings(self.input_ids(audio_embeds.shape[1]), audio_embeds)


def granite_config(config: SalmonnConfig) -> GraniteSpeechConfig:
    """Granite Speech with the language model of `config`, an encoder of its size, and SALMONN's Q-Former."""
    encoder, qformer = config.audio_config, QFORMER.qformer_config
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    projector = {name: getattr(qformer, name) for name in shared} | {"encoder_hidden_size": encoder.d_model}
    return GraniteSpeechConfig(
        text_config=config.text_config,
        encoder_config={
            "hidden_dim": encoder.d_model,
            "num_layers": encoder.encoder_layers,
            "num_heads": encoder.encoder_attention_heads,
            "feedforward_mult": encoder.encoder_ffn_dim // encoder.d_model,
        },
        projector_config={"model_type": "blip_2_qformer", "cross_attention_frequency": 1, **projector},
        audio_token_index=config.audio_token_id,
        tie_word_embeddings=config.text_config.tie_word_embeddings,
        has_lora_adapter=False,
    )


def published_way(config: SalmonnConfig) -> SalmonnConfig:
    """The same encoders and language model with the published systems' projector, without LoRA and quantisation."""
    left_out = ("sound_layers", "quantization_config", "base_parts", *LORA_FIELDS.values())
    qformer = QFORMER.to_dict() | dict.fromkeys(("audio_hidden_size", "sound_hidden_size", "output_size"))
    qformer["qformer_config"]["encoder_hidden_size"] = 0  # the sizes of the encoders are filled in
    return SalmonnConfig.from_dict(config.to_dict() | dict.fromkeys(left_out) | {"projector_config": qformer})


def measure(bench: Benchmark, arguments) -> dict:
    seconds, steps, load_peak = arguments.seconds, arguments.decode_steps, efficiency.peak_memory(arguments.device)
    efficiency.reset_peak_memory(arguments.device)
    protocol = bench.latency(seconds, arguments.rounds, arguments.warmup, steps)
    peak = efficiency.peak_memory(arguments.device)
    cached = bench.latency(seconds, arguments.rounds, arguments.warmup, 0, bench.prompt_cache())
    few = max(arguments.rounds // 4, 1)
    return {
        "dtype": str(bench.model.dtype),
        "prompt_cache_ttft": cached["ttft"],
        "audio_tokens": bench.audio_tokens(bench.clip(seconds)),
        "quantization": getattr(bench.config, "quantized_parts", None) or None,
        "weights": efficiency.weights_by_module(bench.model),
        "peak_memory": peak,
        "load_peak_memory": load_peak,
        "protocol": protocol,
        "lengths": [bench.latency(length, few, 1, steps) for length in arguments.lengths],
        "throughput": {str(size): bench.throughput(seconds, size, steps) for size in arguments.batch_sizes},
    }


def plot(systems: dict[str, dict], file: Path):
    """Time to the first token by length; by part it is a picture of `eval/make_report.py`."""
    figure, axes = new_figure(4, 5)
    for name, result in systems.items():
        points = [(found["seconds_of_audio"], found["ttft"]["p50"]) for found in result["lengths"]]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="s of audio", ylabel="s", title="time to the first token, by length")
    axes.set_ylim(bottom=0)
    axes.legend()
    with complete_or_absent(file) as partial:
        figure.savefig(partial, dpi=120, format="png")


def load_model(arguments, dtype: torch.dtype) -> SalmonnForConditionalGeneration:
    if arguments.model:
        model = SalmonnForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
        if adapted_parts(model.config) and not model.config.quantized_parts:
            model.merge_lora()
        return model
    nano = arguments.shapes == "nano"
    config = SalmonnConfig.from_pretrained(NANO) if nano else published_config(SHAPES[arguments.shapes])
    config.lora = config.audio_lora = config.base_parts = None
    if arguments.own_length:
        config.projector_config.pad_to_30_seconds = False
    return random_model(SalmonnForConditionalGeneration, config, dtype, arguments.device, arguments.quantization)


@command
def main() -> None:
    arguments = parse_arguments()
    if arguments.model and (arguments.quantization or arguments.own_length):
        raise ValueError("--quantization and --own_length are for --shapes; a checkpoint has its own.")
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    name = Path(arguments.model).name if arguments.model else arguments.shapes
    speech = np.concatenate([load_audio(str(file)) for file in sorted(RECORDINGS.glob("*.flac"))])
    model = load_model(arguments, dtype)
    config, systems = model.config, {name: measure(Benchmark(model, speech), arguments)}
    del model  # one model in memory at a time
    if arguments.reference:
        model = random_model(SalmonnForConditionalGeneration, published_way(config), torch.float32, device)
        systems[f"{name}, the published way"] = measure(Benchmark(model, speech), arguments)
        del model
    if arguments.peer:
        model = random_model(GraniteSpeechForConditionalGeneration, granite_config(config), dtype, device)
        systems[f"{arguments.peer}, of {name}'s sizes"] = measure(GraniteBenchmark(model, speech), arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {"model": arguments.model or arguments.shapes, "rounds": arguments.rounds, "warmup": arguments.warmup}
    machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"settings": settings, "machine": machine, "systems": systems}
    write_atomically(arguments.output / "efficiency.json", json.dumps(result, indent=2) + "\n")
    table = render("efficiency.md", systems=systems, parts=efficiency.PARTS)
    write_atomically(arguments.output / "table.md", table)
    plot(systems, arguments.output / "latency.png")
    print(table)


if __name__ == "__main__":
    main()
