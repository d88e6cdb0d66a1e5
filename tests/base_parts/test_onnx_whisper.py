"""Whisper from 8-bit ONNX: the conversion keeps the model's outputs and its tokens."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from salmonn_hf.base_parts.ggml import SpecialTokens, bpe_merges, byte_level
from salmonn_hf.base_parts.onnx_whisper import convert_whisper_onnx

onnx = pytest.importorskip("onnx")
VOCAB_SIZE = 51865
ALIGNMENT_HEADS = [[1, 0], [1, 1]]


def tiny_whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 8, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 10}
    config = WhisperConfig(vocab_size=VOCAB_SIZE, max_target_positions=12, pad_token_id=50257, **sizes)
    return WhisperForConditionalGeneration(config).half().float().eval()


def round_to_8_bits(weight, dtype):
    """As onnxruntime does: values, step and zero point. The values take the whole range of 255 steps."""
    limits = np.iinfo(dtype)
    low, high = min(weight.min(), 0), max(weight.max(), 0)
    step = np.float32((high - low) / 255)
    zero_point = np.array(round(limits.min - low / step), dtype)
    return np.clip(np.round(weight / step) + zero_point, limits.min, limits.max).astype(dtype), step, zero_point


def graph(nodes, initializers=()):
    return onnx.helper.make_graph(nodes, "graph", [], [], list(initializers))


def export(model, directory, left_out=(), per_channel=False):
    """
    Write a Whisper as `optimum-cli export onnx` and transformers.js' quantisation do, as far as weights and their
    places go. `model` is left with the rounded weights.
    """
    directory.mkdir()
    files = {"encoder_model_quantized.onnx": ("model.encoder.", np.uint8, "")}
    files |= {"decoder_model_merged_quantized.onnx": ("model.decoder.", np.int8, "_merged_0")}
    for file, (part, dtype, suffix) in files.items():
        tensors, nodes, numbers = {"onnx::constant": np.float32(3)}, [], iter(range(1000, 2000))
        for key, weight in model.named_parameters():
            if not key.startswith(part) or key in left_out:
                continue
            name = key if suffix else key.removeprefix(part)
            if weight.ndim == 1 or "embed_positions" in name:
                tensors[f"{name}{suffix}"] = weight.detach().numpy()
                continue
            values, step, zero_point = round_to_8_bits(weight.detach().numpy(), dtype)
            weight.data = torch.tensor((values.astype(np.float32) - np.float32(zero_point)) * step)
            base = f"{name}{suffix}"
            if "conv" not in name and "embed" not in name:  # a linear layer
                base, values = f"onnx::MatMul_{next(numbers)}{suffix}", values.T
                node = "/" + re.sub(r"\.(?!\d)", "/", name.removesuffix(".weight")) + "/MatMul_quant"
                inputs = ["x_quantized", f"{base}_quantized", "x_zero_point", f"{base}_zero_point"]
                nodes.append(onnx.helper.make_node("MatMulInteger", inputs, ["y"], node))
            tensors[f"{base}_scale"] = np.full(len(values), step) if per_channel else step
            tensors |= {f"{base}_zero_point": zero_point, f"{base}_quantized": np.ascontiguousarray(values)}
        # The product of queries and keys has no weight.
        nodes.append(onnx.helper.make_node("MatMulInteger", ["q", "k"], ["y"], "/layers.0/self_attn/MatMul_quant"))
        if suffix:  # two graphs, one for the first token; their weights lie outside them
            cross = [
                node for node in nodes if "encoder_attn/k_proj" in node.name or "encoder_attn/v_proj" in node.name
            ]
            branches = {"else_branch": nodes, "then_branch": [node for node in nodes if node not in cross]}
            branches = {name: graph(branch) for name, branch in branches.items()}
            nodes = [onnx.helper.make_node("If", ["use_cache_branch"], ["logits"], "optimum::if", **branches)]
            # And one of them had a tensor of the name of another's.
            clash = next(name for name in tensors if name.startswith("onnx::MatMul_1001"))
            clash = clash.removesuffix("_scale")
            renamed = clash.replace("1001_merged_0", "1000_merged_1")
            tensors = {name.replace(clash, renamed): value for name, value in tensors.items()}
            for branch in (attribute.g for attribute in nodes[0].attribute):
                for node in branch.node:
                    node.input[:] = [name.replace(clash, renamed) for name in node.input]
        initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
        onnx.save(onnx.helper.make_model(graph(nodes, initializers)), directory / file)
    write_settings(directory, model.config)
    return directory


def write_settings(directory, config, **changed):
    """The rest of the package: of the vocabulary every pair of bytes."""
    vocabulary = [bytes([byte]) for byte in range(256)]
    vocabulary += [bytes([index // 256, index % 256]) for index in range(50000)] + [b""]
    vocab = {byte_level(token): index for index, token in enumerate(vocabulary)} | {"<|endoftext|>": 50257}
    merges = [" ".join(pair) for pair in bpe_merges(vocabulary)]
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": merges}}))
    (directory / "config.json").write_text(
        json.dumps(config.to_dict() | {"forced_decoder_ids": [[1, 50259]]} | changed)
    )
    generation = {"alignment_heads": ALIGNMENT_HEADS, "forced_decoder_ids": [[1, None], [2, 50359]]}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "normalizer.json").write_text(json.dumps({"colour": "color"}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model with rounded weights, the package it was exported to, and what the package was converted to."""
    model, directory = tiny_whisper(), tmp_path_factory.mktemp("onnx")
    export(model, directory / "package")
    return model, directory / "package", convert_whisper_onnx(directory / "package", directory / "converted")


def test_onnx_whisper_keeps_its_outputs(exported):
    from safetensors.torch import load_file
    from transformers import AutoFeatureExtractor, WhisperForConditionalGeneration

    original, _, directory = exported
    converted = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    assert converted.dtype == torch.float32
    assert {value.dtype for value in load_file(directory / "model.safetensors").values()} == {torch.float16}
    for name, weight in original.named_parameters():
        # Float16 against a step of 8 bits: a wrong scale, zero point or order costs far more.
        step = (weight.max() - weight.min()).item() / 255
        torch.testing.assert_close(converted.get_parameter(name), weight, rtol=0, atol=step / 7)
    mel, ids = torch.randn(2, 80, 20), torch.tensor([[50258, 5, 6], [50258, 7, 8]])
    with torch.no_grad():
        expected = original(input_features=mel, decoder_input_ids=ids).logits
        found = converted(input_features=mel, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * expected.abs().max().item())
    assert AutoFeatureExtractor.from_pretrained(directory).feature_size == 80


def test_it_gets_its_tokens_and_forces_none(exported):
    from transformers import AutoTokenizer, GenerationConfig, WhisperConfig

    directory = exported[2]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == VOCAB_SIZE
    for token, index in {"<|endoftext|>": 50257, "<|en|>": 50259, "<|0.00|>": 50364, "<|30.00|>": 51864}.items():
        assert tokenizer.convert_tokens_to_ids(token) == index
    assert tokenizer.decode(tokenizer("héllo wörld").input_ids, skip_special_tokens=True) == "héllo wörld"
    assert tokenizer.decode(tokenizer("My colour").input_ids, skip_special_tokens=True, normalize=True) == "my color"
    generation, tokens = GenerationConfig.from_pretrained(directory), SpecialTokens(VOCAB_SIZE)
    assert (generation.lang_to_id, generation.task_to_id) == (tokens.languages, tokens.tasks)
    assert generation.alignment_heads == ALIGNMENT_HEADS
    assert getattr(generation, "forced_decoder_ids", None) is None
    assert getattr(WhisperConfig.from_pretrained(directory), "forced_decoder_ids", None) is None


def test_unusable_onnx_files_are_refused(exported, tmp_path):
    model, package, _ = exported
    lacking = "model.decoder.layers.1.fc1.bias"
    with pytest.raises(ValueError, match=f"not a whole Whisper model: missing .*{lacking}"):
        convert_whisper_onnx(export(tiny_whisper(), tmp_path / "lacking", left_out=[lacking]), tmp_path / "out")
    with pytest.raises(ValueError, match="has 8.* scales; only one a tensor converts"):
        convert_whisper_onnx(export(tiny_whisper(), tmp_path / "channels", per_channel=True), tmp_path / "out")
    for file in package.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_settings(tmp_path, model.config, max_target_positions=13)
    with pytest.raises(ValueError, match=r"embed_positions.weight has shape \(12, 8\), config.json says \(13, 8\)"):
        convert_whisper_onnx(tmp_path, tmp_path / "out")
    write_settings(tmp_path, model.config, model_type="moonshine")
    with pytest.raises(ValueError, match="'moonshine' model, not 'whisper'"):
        convert_whisper_onnx(tmp_path, tmp_path / "out")
    write_settings(tmp_path, model.config)
    whole = (tmp_path / "encoder_model_quantized.onnx").read_bytes()
    (tmp_path / "encoder_model_quantized.onnx").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="encoder_model_quantized.onnx is not an ONNX file, or ends early"):
        convert_whisper_onnx(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_library_the_error_names_it(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        convert_whisper_onnx(exported[1], tmp_path / "out")
