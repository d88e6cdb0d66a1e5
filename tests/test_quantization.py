"""Weights of 4 and 8 bits: exact values, gradients, checkpoints, and calibration."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LANGUAGE_MODELS, noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel, pipeline

import salmonn_hf
from salmonn_hf.quantization import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix, quantize_parts

QUANTIZATION = {
    "audio_tower": {"bits": 8},
    "connector": {"bits": 8},
    "language_model": {"bits": 4, "group_size": 16},
    "embedding": {"bits": 8},
}


def quantized_tiny_model(model_type="llama", quantization=QUANTIZATION, **kwargs):
    config = tiny_config(text_config=tiny_text_config(model_type, tie_word_embeddings=True), **kwargs)
    model = tiny_model(config)
    quantize_parts(model, quantization)
    model.config.quantization = quantization
    return model


def linear(rows=128, columns=64, bits=4, group_size=32, dtype=torch.bfloat16):
    torch.manual_seed(0)
    layer = QuantizedLinear(columns, rows, False, bits, group_size)
    layer.quantize(torch.randn(rows, columns, dtype=dtype))
    return layer


def test_values_by_hand():
    four = QuantizedMatrix(1, 4, 4, group_size=2).quantize(torch.tensor([[7.0, -3.2, 0.0, 14.0]]))
    assert four.scales.tolist() == [[1.0, 2.0]]
    assert four.weight.tolist() == [[(8 + 7) | (8 - 3) << 4, 8 | (8 + 7) << 4]]
    assert four.dequantize().tolist() == [[7.0, -3.0, 0.0, 14.0]]
    eight = QuantizedMatrix(2, 2, 8).quantize(torch.tensor([[127.0, -1.4], [0.5, 254.0]]))
    assert eight.weight.tolist() == [[127, -1], [0, 127]] and eight.scales.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 5, 40, 200])
def test_kernels_compute_the_product(bits, rows):
    layer = linear(bits=bits)
    x = torch.randn(rows, 64).bfloat16()
    expected = x.float() @ layer.dequantize(torch.float32).T
    with torch.no_grad():
        torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 12])
def test_weights_mapped_from_a_file_at_an_odd_address(rows):
    layer, x = linear(bits=8), torch.randn(rows, 64).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        for name in ("weight", "scales"):
            tensor = getattr(layer, name)
            shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
            setattr(layer, name, shifted.copy_(tensor))
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("matrix", [QuantizedLinear(64, 192, False, 4, 32), QuantizedEmbedding(192, 64, 4, 32)])
def test_packing_keeps_every_value(matrix):
    torch.manual_seed(1)
    matrix.quantize(torch.randn(192, 64, dtype=torch.bfloat16))
    state = {key: value.clone() for key, value in matrix.state_dict().items()}
    weights, ids = matrix.dequantize(), torch.randint(192, (3, 7))
    rows = matrix.select(ids)
    assert torch.equal(rows, weights[ids])
    matrix.pack()
    assert not torch.equal(matrix.weight.view(192, 32), state["weight"])  # it is another layout
    assert torch.equal(matrix.dequantize(), weights)
    assert torch.equal(matrix.select(ids), rows)
    for key, value in matrix.state_dict().items():
        assert torch.equal(value, state[key])
    exact = matrix.dequantize(torch.float32)
    matrix.float()
    assert torch.equal(matrix.weight, state["weight"]) and torch.equal(matrix.dequantize(), exact)


def test_gradient_after_an_evaluation_pass():
    layer = linear()
    x, upstream = torch.randn(3, 64).bfloat16(), torch.randn(3, 128).bfloat16()
    with torch.inference_mode():
        layer(x)
    assert layer.packed_scales is not None
    x.requires_grad_()
    layer(x).backward(upstream)
    expected = upstream.float() @ layer.dequantize(torch.float32)
    assert torch.nn.functional.cosine_similarity(x.grad.float().flatten(), expected.flatten(), dim=0) > 0.9999


def test_lora_trains_on_a_quantised_language_model():
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    model = salmonn_hf.SalmonnForConditionalGeneration(tiny_config(quantization=QUANTIZATION, lora=lora))
    inputs = tiny_processor().apply_transcription_request([noise(1.0)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
    model.eval()
    with torch.no_grad():
        model(**inputs)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 4 and all(g.abs().sum() > 0 for g in gradients)
    with pytest.raises(ValueError, match="before quantising"):
        model.merge_lora()


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_gives_the_same_after_a_forward(model_type, dtype, tmp_path):
    quantized_tiny_model(model_type).to(dtype).save_pretrained(tmp_path / "first")
    model = AutoModel.from_pretrained(tmp_path / "first")
    inputs = tiny_processor().apply_transcription_request([noise(1.0), noise(0.4)])
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "second")
    loaded = AutoModel.from_pretrained(tmp_path / "second")
    assert loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    weights = load_file(tmp_path / "second" / "model.safetensors")
    assert weights[f"language_model.{linears_of(model)[0]}.weight"].dtype == torch.uint8
    assert sum(value.shape[0] == 300 and value.ndim == 2 for value in weights.values()) == 1  # the head is not saved


def linears_of(model):
    return [n for n, m in model.language_model.named_modules() if isinstance(m, QuantizedLinear)]


def test_quantised_model_is_near_the_model():
    inputs = tiny_processor().apply_transcription_request([noise(1.0)])
    with torch.no_grad():
        expected = tiny_model(tiny_config(text_config=tiny_text_config(tie_word_embeddings=True)))(**inputs).logits
        eight = dict.fromkeys(QUANTIZATION, {"bits": 8})
        logits = quantized_tiny_model(quantization=eight)(**inputs).logits
    assert torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.99


def test_gemma_scales_quantised_embeddings():
    model = quantized_tiny_model("gemma2", {"embedding": {"bits": 8}})
    embedding = model.get_input_embeddings()
    ids = torch.tensor([[5, 9]])
    torch.testing.assert_close(embedding(ids), embedding.dequantize()[ids] * 32**0.5)


def test_untied_head_is_quantised_on_its_own():
    model = tiny_model()
    quantize_parts(model, {"embedding": {"bits": 8}})
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)


def test_wrong_recipes_are_named():
    with pytest.raises(ValueError, match="no part 'encoder'.*audio_tower"):
        quantize_parts(tiny_model(), {"encoder": {"bits": 8}})
    with pytest.raises(ValueError, match="q_proj.*group_size 48 does not divide 32"):
        quantize_parts(tiny_model(), {"language_model": {"bits": 4, "group_size": 48}})


@pytest.fixture()
def quantized_checkpoint(tmp_path):
    quantized_tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    return tmp_path


def test_missing_tensor_is_refused_by_name(quantized_checkpoint):
    file = quantized_checkpoint / "model.safetensors"
    weights = load(file.read_bytes())  # load_file maps the file that is about to be written
    name = "language_model.model.layers.1.mlp.up_proj.scales"
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {name}"):
        AutoModel.from_pretrained(quantized_checkpoint)


@pytest.mark.parametrize("left", [4, 100, -1])
def test_truncated_file_is_refused_by_name(quantized_checkpoint, left):
    file = quantized_checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:left])
    with pytest.raises(OSError, match=r"model\.safetensors is not a whole"):
        AutoModel.from_pretrained(quantized_checkpoint)


def test_truncated_tensor_is_refused_by_name(quantized_checkpoint):
    file = quantized_checkpoint / "model.safetensors"
    header_length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_length])
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{last} and 0 other"):
        AutoModel.from_pretrained(quantized_checkpoint)


def test_directory_works_in_a_process_without_the_package(quantized_checkpoint, tmp_path_factory):
    clip = noise(0.5)
    expected = pipeline("automatic-speech-recognition", model=str(quantized_checkpoint))(clip)["text"]
    script = (
        "import sys, numpy; from transformers import pipeline; assert 'salmonn_hf' not in sys.modules\n"
        "transcriber = pipeline('automatic-speech-recognition', model=sys.argv[1], trust_remote_code=True)\n"
        "print(repr(transcriber(numpy.load(sys.argv[2]))['text']))"
    )
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    np.save(elsewhere / "clip.npy", clip)
    run = subprocess.run(
        [sys.executable, "-c", script, str(quantized_checkpoint), str(elsewhere / "clip.npy")],
        capture_output=True, text=True, cwd=elsewhere,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().splitlines()[-1] == repr(expected)
