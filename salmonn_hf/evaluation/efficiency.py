"""Memory and latency of a model: weights, peak of memory, times of the first and of further tokens, throughput."""

import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from ..model.feature_extraction_salmonn import SalmonnFeatureExtractor
from ..model.quantized_layers import QuantizedMatrix
from ..model.quantizer_salmonn import quantize_in_place

PARTS = ("features", "whisper", "sound encoder", "projector", "prefill")


def random_model(model_class, config, dtype: torch.dtype, device: str, quantization: dict | None = None):
    """A model of random weights, made at its own precision: never a float32 copy of it."""
    with torch.device("meta"):
        model = model_class(config)
        if quantization:
            quantize_in_place(model, quantization)
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
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary = {id(t) for m in (embedding, head) for t in [*m.parameters(), *m.buffers()]}
    sizes = Counter({"embedding and head": 0})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        part = "embedding and head" if id(tensor) in vocabulary else name.removeprefix("model.").split(".")[0]
        sizes[part] += stored_bytes(tensor)
    return dict(sizes)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor with the scales of bitsandbytes' 4 bits, or of the tensors that one of torchao's is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    scales = tensor.quant_state.as_dict().values() if hasattr(tensor, "quant_state") else ()
    return tensor.nbytes + sum(scale.nbytes for scale in scales if isinstance(scale, torch.Tensor))


def reset_peak_memory(device: str):
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif (references := Path("/proc/self/clear_refs")).exists():  # Linux: the peak starts again from what is resident
        references.write_text("5")


def peak_memory(device: str) -> int:
    """Bytes since the last `reset_peak_memory`: of the CUDA device, or else resident bytes of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Benchmark:
    """
    Times of one model, its feature extractor among it.

    Args:
        speech (`np.ndarray` of shape `(samples,)`): the clips are cut from it, at 16 kHz.
        prompt_tokens (`int`): text tokens around the audio.
    """

    def __init__(self, model, speech: np.ndarray, prompt_tokens: int = 45):
        self.model, self.config, self.device = model.eval(), model.config, model.device
        self.speech, self.prompt_tokens = speech, prompt_tokens
        self.extractor = self.make_extractor()

    def make_extractor(self) -> SalmonnFeatureExtractor:
        return SalmonnFeatureExtractor(
            feature_size=self.config.audio_config.num_mel_bins,
            pad_to_30_seconds=self.config.projector_config.pad_to_30_seconds,
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
        return int(self.config.projector_config.num_audio_tokens(frames))

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
        audio = model.project_audio(**frames)
        marks.append(self.mark())
        return model.embed_prompt(self.input_ids(len(audio.states)), audio=audio)["inputs_embeds"]

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
            token = token.clamp(min=self.config.audio_token_id + 1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
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
        steps = [step for _, steps in timed for step in steps]
        result = {
            "seconds_of_audio": seconds,
            "ttft": percentiles([sum(parts.values()) for parts, _ in timed]),
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
        clips = [self.clip(seconds)] * batch_size
        input_ids = self.input_ids(self.audio_tokens(clips[0]), batch_size)
        settings = {"do_sample": False, "min_new_tokens": decode_steps, "max_new_tokens": decode_steps}
        settings["attention_mask"] = torch.ones_like(input_ids)
        for _ in range(2):  # the first to warm up
            start = self.mark()
            self.model.generate(input_ids, **self.features(clips), **settings)
        return batch_size / (self.mark() - start)


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))}
