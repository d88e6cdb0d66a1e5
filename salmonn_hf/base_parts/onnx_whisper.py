"""Convert a multilingual Whisper in transformers.js' 8-bit ONNX files into a directory that transformers loads."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers  # whose classes are imported when they are first named
from safetensors.torch import save_file

from .ggml import SpecialTokens, whisper_config, whisper_generation_config, whisper_tokenizer

# Each file, and where its names lie in WhisperForConditionalGeneration.
ONNX_FILES = {"encoder_model_quantized.onnx": "model.encoder.", "decoder_model_merged_quantized.onnx": ""}
# Names of a ggml header, which `whisper_config` takes, and of config.json.
SIZES = {
    "n_vocab": "vocab_size",
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


def convert_whisper_onnx(source: str | Path, destination: str | Path) -> Path:
    """
    Write the Whisper in the directory `source` as a transformers directory at `destination` (made if missing).

    `source` holds the two ONNX files (`ONNX_FILES`), config.json, generation_config.json, tokenizer.json and
    normalizer.json. Weights are stored in float16 (`as_stored` says why that is near enough); config.json asks for
    float32, which is how the hub's copies of these models load.

    Raises:
        ValueError: a file is no ONNX, ends early or lacks tensors; another architecture, vocabulary or quantisation.
        ImportError: the `onnx` package is not installed.
    """
    source, destination = Path(source), Path(destination)
    settings, generation, tokenizer_file = (
        json.loads((source / name).read_text()) for name in ("config.json", "generation_config.json", "tokenizer.json")
    )
    if settings["model_type"] != "whisper":
        raise ValueError(f"{source} holds a {settings['model_type']!r} model, not 'whisper'")
    tokens = SpecialTokens(settings["vocab_size"])
    config = whisper_config({name: settings[of_config] for name, of_config in SIZES.items()}, tokens)
    state_dict = whisper_state_dict(source, config)
    bpe = tokenizer_file["model"]
    vocab = {token: index for token, index in bpe["vocab"].items() if index < tokens.end}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in bpe["merges"]]
    tokenizer = whisper_tokenizer(vocab, merges, tokens)
    generation_config = whisper_generation_config(config, tokens)
    generation_config.alignment_heads = generation["alignment_heads"]

    destination.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, destination / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(destination)
    generation_config.save_pretrained(destination)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    shutil.copy(source / "normalizer.json", destination)  # for `decode(…, normalize=True)`
    return destination


def whisper_state_dict(source: Path, config) -> dict[str, torch.Tensor]:
    """The tensors of both files under WhisperForConditionalGeneration's names and shapes; the output head is tied."""
    with torch.device("meta"):
        expected = transformers.WhisperForConditionalGeneration(config).state_dict()
    del expected["proj_out.weight"]
    state_dict = {}
    for file, prefix in ONNX_FILES.items():
        for name, array, scale in read_weights(source / file):
            if f"{prefix}{name}" in expected:  # the rest are constants of the graphs
                state_dict[f"{prefix}{name}"] = as_stored(array, scale)
    if missing := sorted(expected.keys() - state_dict.keys()):
        raise ValueError(f"{source} holds not a whole Whisper model: missing {missing}")
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, config.json says {tuple(expected[name].shape)}"
            raise ValueError(f"{source}: tensor {name} has shape {shapes}")
    return state_dict


def read_weights(path: Path) -> Iterator[tuple[str, np.ndarray, float | None]]:
    """
    Yield name, values and, of what was rounded to 8 bits, the step between two values, for each weight of a file.

    The weight of a convolution or embedding, NAME, is the tensors NAME_quantized, NAME_scale and NAME_zero_point. That
    of a linear layer has a number for a name; it is an input of the layer's MatMulInteger node, [inputs, outputs].
    Optimum's merged decoder adds `_merged_0` to names, or `_merged_1` where its two graphs had different tensors of
    one name.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError("converting an ONNX file needs the onnx package: pip install onnx") from error
    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX file, or ends early: {error}") from error
    graphs = list(graphs_in(model.graph))
    tensors = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}

    def dequantized(name: str) -> tuple[np.ndarray, float]:
        parts = (f"{name}_quantized", f"{name}_scale", f"{name}_zero_point")
        if missing := [part for part in parts if part not in tensors]:
            raise ValueError(f"{path} lacks the tensors {missing}")
        values, scale, zero_point = (onnx.numpy_helper.to_array(tensors[part]) for part in parts)
        if scale.size != 1:
            raise ValueError(f"{path}: {name} has {scale.size} scales; only one a tensor converts")
        return (values.astype(np.float32) - zero_point.astype(np.float32)) * scale, float(scale)

    for name, tensor in tensors.items():
        base = name.removesuffix("_quantized")
        if base != name:
            yield re.sub(r"_merged_\d+$", "", base), *dequantized(base)
        elif not name.endswith(("_scale", "_zero_point")):
            yield re.sub(r"_merged_\d+$", "", name), onnx.numpy_helper.to_array(tensor), None
    linear = {}
    for node in (node for graph in graphs for node in graph.node if node.op_type == "MatMulInteger"):
        if node.input[1] in tensors:
            linear[node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")] = node.input[1]
    for name, quantized in linear.items():
        values, step = dequantized(quantized.removesuffix("_quantized"))
        yield f"{name}.weight", values.T, step


def graphs_in(graph) -> Iterator:
    """A graph and those inside its nodes, as the branches of the merged decoder are."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_in(attribute.g)


def as_stored(array: np.ndarray, step: float | None) -> torch.Tensor:
    """
    An array in float16 if that is exact, or near enough: else in float32.

    A value that was rounded to 8 bits is a multiple of `step`, 255 at most, so that float16 moves it by 1/8 of a step
    at most, and the typical one by far less; rounding moved it by up to 1/2 before that. Float32 would take twice the
    disk to be no nearer to the original weights, which are float16 themselves.
    """
    tensor = torch.from_numpy(np.array(array, order="C"))
    half = tensor.to(torch.float16)
    furthest = (half.float() - tensor).abs().max().item()
    return half if furthest <= (step or 0) / 8 else tensor
