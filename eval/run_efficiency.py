"""
Memory and latency: time to the first token by part, time per further token, throughput, weights by module.

    python eval/run_efficiency.py --model model_cards/salmonn-lite-nano --output runs/efficiency
    python eval/run_efficiency.py --shapes nano --reference --peer granite-speech --output runs/efficiency-nano
    python eval/run_efficiency.py --shapes seed --quantization '{"language_model": {"bits": 4}}' --output runs/seed

The protocol of SALMONN's compression challenge (batch 1, a clip of 10 s, a transcription prompt, one decode step per
token), with the device synchronised at every mark, the features timed as well, and the peak of memory reset after
loading. The clip is speech, this project's recordings one after another: how many pauses it has decides how much the
language model reads where windows are merged. `--shapes` builds a published system with random weights (LoRA taken as
merged), so that it can be measured without any download. `--reference` also measures the same parts the way the
published systems run them: 30 s of padding, 88 audio tokens, float32. `--peer granite-speech` measures transformers'
Granite Speech beside it, with the same language model and an encoder of the same size. Writes `efficiency.json`, which
`eval/make_report.py` and `model_cards/make_card.py` read, `table.md` and `latency.png`.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

from salmonn_hf import SalmonnConfig, SalmonnFeatureExtractor, SalmonnForConditionalGeneration, load_audio
from salmonn_hf.convert.published_configs import published_config
from salmonn_hf.files import write_atomically
from salmonn_hf.model.lora import LORA_FIELDS, adapted_parts
from salmonn_hf.model.quantized_layers import QuantizedMatrix

RECORDINGS = Path(__file__).resolve().parent / "recordings"
NANO = Path(__file__).resolve().parents[1] / "model_cards" / "salmonn-lite-nano"
SHAPES = {"seed": "seed", "baseline": "nota", "small": "nlp-07", "salmonn-7b": "salmonn-7b"}
PARTS = ("features", "whisper", "sound encoder", "q-former", "prefill")
# Geometry and precision of the published systems.
REFERENCE = {
    "pad_to_30_seconds": True,
    "window_frames": 17,
    "window_stride": 17,
    "queries_per_window": 1,
    # A Q-Former, and that alone.
    "speech_decoder_layers": 0,
    "sound_layers": None,
    "sound_summary_size": 0,
    "frame_mlp_size": 0,
    "merged_windows": 1,
    "ctc_vocab_size": 0,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint directory or hub name")
    source.add_argument("--shapes", choices=[*SHAPES, "nano"], help="random weights of these sizes")
    parser.add_argument("--quantization", type=json.loads, help="with --shapes: as SalmonnConfig.quantization, JSON")
    parser.add_argument("--own_length", action="store_true", help="with --shapes: a clip costs what it lasts")
    parser.add_argument("--reference", action="store_true", help="also the published way: 30 s, 88 tokens, float32")
    parser.add_argument("--peer", choices=["granite-speech"], help="also a model of transformers of the same sizes")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of the clip; default: %(default)s")
    parser.add_argument("--lengths", type=float, nargs="*", default=[1.0, 3.0, 10.0, 30.0], help="further clips")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 8, 32], help="for the throughput")
    parser.add_argument("--prompt_tokens", type=int, default=45, help="text tokens around the audio")
    parser.add_argument("--decode_steps", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the timed ones; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="directory for the results")
    return parser.parse_args()


def random_model(model_class, config, dtype: torch.dtype, device: str):
    """A model of random weights, made at its own precision: never a float32 copy of it."""
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(dtype).to_empty(device=device).eval()
    model.tie_weights()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            elif tensor.dtype in (torch.int8, torch.uint8):
                tensor.random_()
            else:
                tensor.zero_()
        for matrix in model.modules():
            if isinstance(matrix, QuantizedMatrix):
                matrix.scales.fill_(0.005)
    return model


def weights_by_module(model) -> dict[str, int]:
    """Bytes of parameters and buffers; tied matrices once."""
    sizes = {"embedding and head": 0}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary = {id(t) for m in (embedding, head) for t in [*m.parameters(), *m.buffers()]}
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            part = "embedding and head" if id(tensor) in vocabulary else name.removeprefix("model.").split(".")[0]
            sizes[part] = sizes.get(part, 0) + stored_bytes(tensor)
    return sizes


def stored_bytes(tensor: torch.Tensor) -> int:
    """
    Of a tensor, with the scales beside one of bitsandbytes' 4 bits; or of those that one of torchao's kind is made of,
    which itself claims those of its precision.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    scales = tensor.quant_state.as_dict().values() if hasattr(tensor, "quant_state") else ()
    return tensor.nbytes + sum(scale.nbytes for scale in scales if isinstance(scale, torch.Tensor))


class Memory:
    """Peak memory since `reset`, bytes: of the CUDA device, or else of the process."""

    def __init__(self, device: str):
        self.on_cuda = device.startswith("cuda")

    def reset(self):
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            # Linux: the resident peak starts again from what is resident.
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.on_cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.exists():
            return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Bench:
    """One model, its feature extractor and its prompt."""

    def __init__(self, model, prompt_tokens: int):
        self.model, self.config, self.device = model, model.config, model.device
        self.prompt_tokens = prompt_tokens
        self.extractor = self.make_extractor()
        self.speech = np.concatenate([load_audio(str(file)) for file in sorted(RECORDINGS.glob("*.flac"))])

    def make_extractor(self) -> SalmonnFeatureExtractor:
        return SalmonnFeatureExtractor(
            feature_size=self.config.audio_config.num_mel_bins,
            pad_to_30_seconds=self.config.pad_to_30_seconds,
            return_input_values=self.config.sound_config is not None,
        )

    def clip(self, seconds: float) -> np.ndarray:
        return np.resize(self.speech, int(seconds * 16000))

    def features(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        return self.extractor(clips, return_tensors="pt").to(self.device)

    def mark(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def audio_tokens(self, clip: np.ndarray) -> int:
        frames = self.extractor([clip], return_tensors="pt")["input_features_mask"][:, ::2].sum(-1)
        return int(self.model.connector.num_windows(frames)) * self.config.queries_per_window

    def input_ids(self, num_tokens: int, clips: int = 1) -> torch.Tensor:
        """The prompt with its audio in the middle; `(clips, tokens)`."""
        ids = torch.full((clips, self.prompt_tokens + num_tokens), self.config.audio_token_id)
        half = self.prompt_tokens // 2
        text = torch.arange(self.prompt_tokens) % 50 + self.config.audio_token_id + 1
        ids[:, :half], ids[:, half + num_tokens :] = text[:half], text[half:]
        return ids.to(self.device)

    def prompt_cache(self) -> DynamicCache:
        """Keys and values of the text ahead of the audio, which is the same for every clip."""
        cache = DynamicCache(config=self.config.text_config)
        with torch.inference_mode():
            ids = self.input_ids(0)[:, : self.prompt_tokens // 2]
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def embed_prompt(self, clip: np.ndarray, marks: list[float]) -> torch.Tensor:
        """The prompt's embeddings, the clip's among them; `marks` gets the time at the end of each of its parts."""
        model = self.model
        features = self.features([clip])
        marks.append(self.mark())
        frames = model.encode_speech(features["input_features"], features["input_features_mask"])
        marks.append(self.mark())
        if self.config.sound_config is not None:
            frames |= model.encode_sound(features["input_values"], features["input_values_mask"])
        marks.append(self.mark())
        audio_embeds, num_tokens = model.connect_audio(**frames)
        marks.append(self.mark())
        ids = self.input_ids(int(num_tokens))
        return model.embed_prompt(ids, audio_embeds=audio_embeds, num_tokens=num_tokens)["inputs_embeds"]

    @torch.inference_mode()
    def round(
        self, clip: np.ndarray, decode_steps: int = 0, cache: DynamicCache | None = None
    ) -> tuple[dict[str, float], list[float]]:
        """Seconds of each part up to the first token, and of each further token; `cache`: see `prompt_cache`."""
        model, marks = self.model, [self.mark()]
        embeds = self.embed_prompt(clip, marks)
        cached = 0 if cache is None else cache.get_seq_length()
        output = model(inputs_embeds=embeds[:, cached:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        marks.append(self.mark())
        for _ in range(decode_steps):
            output = model(input_ids=token.clamp(min=self.config.audio_token_id + 1),
                           past_key_values=output.past_key_values, use_cache=True)  # fmt: skip
            token = output.logits[:, -1:].argmax(-1)
            marks.append(self.mark())
        if cached:
            cache.crop(cached - cache.get_seq_length())
        seconds = np.diff(marks).tolist()
        return dict(zip(PARTS, seconds, strict=False)), seconds[len(PARTS) :]

    def latency(self, seconds: float, rounds: int, warmup: int, decode_steps: int, cache=None) -> dict:
        clip = self.clip(seconds)
        for _ in range(warmup):
            self.round(clip, min(decode_steps, 2), cache)
        timed = [self.round(clip, decode_steps, cache) for _ in range(rounds)]
        first = [sum(parts.values()) for parts, _ in timed]
        steps = [step for _, steps in timed for step in steps]
        result = {
            "seconds_of_audio": seconds,
            "ttft": percentiles(first),
            "ttft_by_part": {part: float(np.median([parts[part] for parts, _ in timed])) for part in PARTS},
        }
        if steps:
            result["tpot"] = percentiles(steps)
            total = result["ttft"]["p50"] + len(steps) / rounds * result["tpot"]["p50"]
            result["real_time_factor"] = total / seconds
        return result

    @torch.inference_mode()
    def throughput(self, seconds: float, batch_size: int, decode_steps: int) -> float:
        """Clips a second, features included, each with `decode_steps` tokens."""
        clips = [self.clip(seconds) for _ in range(batch_size)]
        input_ids = self.input_ids(self.audio_tokens(clips[0]), batch_size)

        def transcribe():
            features = self.features(clips)
            return self.model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), **features, do_sample=False,
                min_new_tokens=decode_steps, max_new_tokens=decode_steps,
            )  # fmt: skip

        transcribe()
        start = self.mark()
        transcribe()
        return batch_size / (self.mark() - start)


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))}


class GraniteBench(Bench):
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
    """Granite Speech with the language model of `config`, an encoder of its size, and its Q-Former's width."""
    encoder, qformer = config.audio_config, config.qformer_config
    return GraniteSpeechConfig(
        text_config=config.text_config,
        encoder_config={
            "hidden_dim": encoder.d_model,
            "num_layers": encoder.encoder_layers,
            "num_heads": encoder.encoder_attention_heads,
            "feedforward_mult": encoder.encoder_ffn_dim // encoder.d_model,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": qformer.hidden_size,
            "num_hidden_layers": qformer.num_hidden_layers,
            "num_attention_heads": qformer.num_attention_heads,
            "intermediate_size": qformer.intermediate_size,
            "encoder_hidden_size": encoder.d_model,
            "cross_attention_frequency": 1,
        },
        audio_token_index=config.audio_token_id,
        tie_word_embeddings=config.text_config.tie_word_embeddings,
        has_lora_adapter=False,
    )


def measure(bench: Bench, arguments, memory: Memory, load_peak: int) -> dict:
    model = bench.model
    memory.reset()
    rounds = {"rounds": arguments.rounds, "warmup": arguments.warmup}
    protocol = bench.latency(arguments.seconds, decode_steps=arguments.decode_steps, **rounds)
    peak = memory.peak()
    cached = bench.latency(arguments.seconds, decode_steps=0, cache=bench.prompt_cache(), **rounds)
    return {
        "dtype": str(model.dtype),
        "prompt_cache_ttft": cached["ttft"],
        "audio_tokens": bench.audio_tokens(bench.clip(arguments.seconds)),
        "quantization": getattr(model.config, "quantization", None),
        "weights": weights_by_module(model),
        "peak_memory": peak,
        "load_peak_memory": load_peak,
        "protocol": protocol,
        "lengths": [
            bench.latency(seconds, max(arguments.rounds // 4, 1), 1, arguments.decode_steps)
            for seconds in arguments.lengths
        ],
        "throughput": {
            str(size): bench.throughput(arguments.seconds, size, arguments.decode_steps)
            for size in arguments.batch_sizes
        },
    }


def table(results: dict[str, dict]) -> str:
    """The published systems' columns, then the parts of the first token and the weights."""
    lines = ["| system | weights GB | peak memory GB | TTFT s | TPOT s | p95 TTFT / TPOT | real-time factor |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, result in results.items():
        protocol = result["protocol"]
        ttft, tpot = protocol["ttft"], protocol["tpot"]
        lines.append(
            f"| {name} | {sum(result['weights'].values()) / 1e9:.3f} | {result['peak_memory'] / 1e9:.2f} | "
            f"{ttft['p50']:.3f} | {tpot['p50']:.4f} | {ttft['p95']:.3f} / {tpot['p95']:.4f} | "
            f"{protocol['real_time_factor']:.3f} |"
        )
    lines += [
        "",
        f"| TTFT s of | {' | '.join(PARTS)} | all, the prompt's start cached |",
        "|---" * (len(PARTS) + 2) + "|",
    ]
    for name, result in results.items():
        parts = result["protocol"]["ttft_by_part"]
        times = " | ".join(f"{parts[part]:.4f}" for part in PARTS)
        lines.append(f"| {name} | {times} | {result['prompt_cache_ttft']['p50']:.4f} |")
    for name, result in results.items():
        lines += ["", f"| weights of {name} | MB |", "|---|---|"]
        lines += [f"| {part} | {size / 1e6:.1f} |" for part, size in result["weights"].items()]
        lines += ["", "| clip s | TTFT s | TPOT s | real-time factor |", "|---|---|---|---|"]
        lines += [
            f"| {r['seconds_of_audio']:g} | {r['ttft']['p50']:.3f} | {r['tpot']['p50']:.4f} | "
            f"{r['real_time_factor']:.3f} |"
            for r in result["lengths"]
        ]
        lines += ["", "| batch size | clips a second |", "|---|---|"]
        lines += [f"| {size} | {rate:.2f} |" for size, rate in result["throughput"].items()]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict], file: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bottom = np.zeros(len(results))
    for part in PARTS:
        heights = [result["protocol"]["ttft_by_part"][part] for result in results.values()]
        left.bar(list(results), heights, bottom=bottom, label=part)
        bottom += heights
    left.set(ylabel="s", title="time to the first token, by part")
    left.legend()
    for name, result in results.items():
        points = [(r["seconds_of_audio"], r["ttft"]["p50"]) for r in result["lengths"]]
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    right.set(xlabel="s of audio", ylabel="s", title="time to the first token, by length")
    right.set_ylim(bottom=0)
    right.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    arguments = parse_arguments()
    memory, dtype = Memory(arguments.device), getattr(torch, arguments.dtype)
    if arguments.model:
        if arguments.quantization or arguments.own_length:
            raise ValueError("--quantization and --own_length are for --shapes; a checkpoint has its own.")
        name = Path(arguments.model).name
        model = SalmonnForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
        if adapted_parts(model.config) and not model.config.quantization:
            model.merge_lora()
        config = model.config
    else:
        name = arguments.shapes
        config = SalmonnConfig.from_pretrained(NANO) if name == "nano" else published_config(SHAPES[name])
        config.lora = config.audio_lora = config.base_parts = None
        config.quantization = arguments.quantization
        config.pad_to_30_seconds = config.pad_to_30_seconds and not arguments.own_length
        model = random_model(SalmonnForConditionalGeneration, config, dtype, arguments.device)
    results = {name: measure(Bench(model.eval(), arguments.prompt_tokens), arguments, memory, memory.peak())}
    if arguments.reference:
        settings = config.to_dict() | REFERENCE | dict.fromkeys(("quantization", "base_parts", *LORA_FIELDS.values()))
        del model
        reference = SalmonnConfig.from_dict(settings)
        model = random_model(SalmonnForConditionalGeneration, reference, torch.float32, arguments.device)
        bench = Bench(model, arguments.prompt_tokens)
        results[f"{name}, the published way"] = measure(bench, arguments, memory, memory.peak())
    if arguments.peer:
        del model
        model = random_model(GraniteSpeechForConditionalGeneration, granite_config(config), dtype, arguments.device)
        bench = GraniteBench(model, arguments.prompt_tokens)
        results[f"{arguments.peer}, of {name}'s sizes"] = measure(bench, arguments, memory, memory.peak())
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {"model": arguments.model or arguments.shapes, "rounds": arguments.rounds, "warmup": arguments.warmup}
    machine = {"device": arguments.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    efficiency = {"settings": settings, "machine": machine, "systems": results}
    write_atomically(arguments.output / "efficiency.json", json.dumps(efficiency, indent=2) + "\n")
    (arguments.output / "table.md").write_text(table(results))
    plot(results, arguments.output / "latency.png")
    print(table(results))


if __name__ == "__main__":
    main()
