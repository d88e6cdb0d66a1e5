"""Weights of 4 and 8 bits: exact values, gradients, checkpoints, and calibration."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LANGUAGE_MODELS, noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from safetensors.torch import load, load_file, save_file
from test_sound_summary import sound_model
from test_whisper_projector import fill_token_ids
from transformers import AutoModel, pipeline

from salmonn_hf.model import quantized_layers as quantization
from salmonn_hf.model.quantized_layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMatrix,
    dequantize_linears,
    kernel_layout,
    linears,
    quantize_parts,
)
from salmonn_hf.model.quantizer_salmonn import quantize_in_place

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]
QUANTIZATION = {
    "audio_tower": {"bits": 8},
    "projector": {"bits": 8},
    "language_model": {"bits": 4, "group_size": 16},
    "embedding": {"bits": 8},
}


def quantized_tiny_model(model_type="llama", quantization=QUANTIZATION, **kwargs):
    config = tiny_config(text_config=tiny_text_config(model_type, tie_word_embeddings=True), **kwargs)
    model = tiny_model(config)
    quantize_in_place(model, quantization)
    return model


def linear(rows=128, columns=64, bits=4, group_size=32, dtype=torch.bfloat16):
    torch.manual_seed(0)
    layer = QuantizedLinear(columns, rows, False, bits, group_size)
    layer.quantize(torch.randn(rows, columns, dtype=dtype))
    return layer


def test_values_by_hand():
    four = QuantizedMatrix(1, 4, 4, group_size=2).quantize(torch.tensor([[7.5, -3.2, 0.0, 15.0]]))
    assert four.scales.tolist() == [[1.0, 2.0]]
    assert four.weight.tolist() == [[(8 + 7) | (8 - 3) << 4, 8 | (8 + 7) << 4]]
    assert four.dequantize().tolist() == [[7.0, -3.0, 0.0, 14.0]]
    eight = QuantizedMatrix(2, 2, 8).quantize(torch.tensor([[127.0, -1.4], [0.5, 254.0]]))
    assert eight.weight.tolist() == [[127, -1], [0, 127]] and eight.scales.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 5, 40, 200])
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_compute_the_product(bits, rows, device):
    layer = linear(bits=bits).to(device)
    x = torch.randn(rows, 64, device=device).bfloat16()
    expected = x.float() @ layer.dequantize(torch.float32).T
    with torch.no_grad():
        torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=6e-2)
    assert (layer.packed_scales is not None) == (bits == 4 and rows <= 128)


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


def test_rows_are_packed_a_few_at_a_time(monkeypatch):
    """The kernel's layout is made of blocks of rows: packed one by one they are the whole."""
    matrix = QuantizedLinear(64, 320, False, 4, 32).quantize(torch.randn(320, 64, dtype=torch.bfloat16))
    whole = torch._convert_weight_to_int4pack_for_cpu(matrix.nibbles().to(torch.int32), 1)
    name, rows = "_convert_weight_to_int4pack_for_cpu", []
    convert = getattr(torch, name)
    monkeypatch.setattr(quantization, "PACKED_ROWS", 128)
    monkeypatch.setattr(torch, name, lambda part, tiles: rows.append(len(part)) or convert(part, tiles))
    matrix.pack()
    assert rows == [128, 128, 64] and torch.equal(matrix.weight.view_as(whole), whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_ids_select_no_rows(bits):
    matrix = QuantizedEmbedding(192, 64, bits, 32)
    assert matrix.select(torch.zeros(0, dtype=torch.int64)).shape == (0, 64)
    if bits == 4:
        matrix.quantize(torch.randn(192, 64, dtype=torch.bfloat16)).pack()
        assert matrix.select(torch.zeros(0, dtype=torch.int64)).shape == (0, 64)


@pytest.mark.parametrize("kind", [QuantizedLinear, QuantizedEmbedding])
@pytest.mark.parametrize("device", DEVICES)
def test_packing_keeps_every_value(kind, device):
    torch.manual_seed(1)
    matrix = kind(128, 192, False, 4, 32) if kind is QuantizedLinear else kind(192, 128, 4, 32)
    matrix = matrix.quantize(torch.randn(192, 128, dtype=torch.bfloat16)).to(device)
    state = {key: value.clone() for key, value in matrix.state_dict().items()}
    weights, ids = matrix.dequantize(), torch.randint(192, (3, 7), device=device)
    rows = matrix.select(ids)
    assert torch.equal(rows, weights[ids])
    matrix.pack()
    assert not torch.equal(matrix.weight.view(192, 64), state["weight"])  # it is another layout
    assert torch.equal(matrix.dequantize(), weights)
    assert torch.equal(matrix.select(ids), rows)
    for key, value in matrix.state_dict().items():
        assert torch.equal(value, state[key])
    exact = matrix.dequantize(torch.float32)
    matrix.float()
    assert torch.equal(matrix.weight, state["weight"]) and torch.equal(matrix.dequantize(), exact)


@pytest.fixture
def packing_in_blocks(request, monkeypatch):
    """torch's packing as another processor might do it: in a byte a row and the one half a block further on."""

    def pack(values, _):
        blocks = values.to(torch.uint8).view(-1, 2, request.param // 2, values.shape[1])
        return (blocks[:, 0] | blocks[:, 1] << 4).transpose(1, 2).reshape(len(values), -1)

    kernel_layout.cache_clear()
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", pack)
    yield
    kernel_layout.cache_clear()


@pytest.mark.parametrize("packing_in_blocks", [16, 32, 64], indirect=True)
def test_packing_of_any_processor_keeps_every_value(packing_in_blocks):
    test_packing_keeps_every_value(QuantizedEmbedding, "cpu")


def tiles_of_many_columns(monkeypatch):
    """A packing as on CUDA, where a tile has 8 rows and 64 columns."""
    layout = torch.randperm(512).view(8, 64)

    def pack(nibbles):
        tiles = nibbles.view(len(nibbles) // 8, 8, -1, 64).transpose(1, 2).flatten(2)
        packed = torch.empty_like(tiles)
        packed[..., layout.flatten()] = tiles
        return (packed[..., :256] | packed[..., 256:] << 4).view(len(nibbles), -1)

    monkeypatch.setattr(quantization, "pack_nibbles", pack)
    monkeypatch.setattr(quantization, "kernel_layout", lambda device: layout)


@pytest.mark.parametrize("kind", [QuantizedLinear, QuantizedEmbedding])
def test_tiles_of_many_columns_keep_every_value(kind, monkeypatch):
    tiles_of_many_columns(monkeypatch)
    test_packing_keeps_every_value(kind, "cpu")


@pytest.mark.parametrize("rows, columns, group_size", [(64, 128, 64), (8, 128, 64), (128, 64, 32)])
def test_weights_of_one_tile_stay_contiguous(rows, columns, group_size, monkeypatch):
    """Of rows or of columns; the kernels take no others, nor can rows be looked up in them."""
    if rows < 64:
        tiles_of_many_columns(monkeypatch)
    matrix = QuantizedEmbedding(rows, columns, 4, group_size).quantize(torch.randn(rows, columns).bfloat16())
    ids, weights = torch.tensor([[5]]), matrix.dequantize()
    matrix.pack()
    assert torch.equal(matrix.select(ids), weights[ids])
    matrix.unpack()
    assert matrix.weight.is_contiguous() and torch.equal(matrix.dequantize(), weights)


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("evaluated", [False, True])
def test_the_backward_pass_keeps_no_dequantized_weights(bits, evaluated):
    layer, x, kept = linear(bits=bits), torch.randn(200, 64).bfloat16().requires_grad_(), []
    if evaluated:
        with torch.no_grad():
            layer(x[:4])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        product = layer(x)
    assert sum(kept) < layer.rows * layer.columns
    (gradient,) = torch.autograd.grad(product, x, torch.ones_like(product))
    expected = layer.dequantize(torch.float32).sum(0).expand(200, -1)
    assert cosine(gradient, expected) > 0.9999


def test_loading_after_a_forward_keeps_the_values():
    """As the best checkpoint is loaded at the end of training, into weights that evaluation has packed."""
    layer, x = linear(), torch.randn(3, 64).bfloat16()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        expected = layer(x)
        assert layer.packed_scales is not None
        layer.load_state_dict(state)
        assert torch.equal(layer(x), expected)


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0)


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
QLORA = {"language_model": {"bits": 4, "group_size": 32}, "embedding": {"bits": 8}}


def qlora_model(dtype=torch.bfloat16, quantization=QLORA):
    """A model as run_stage2.py trains it, of sizes that torch's 4-bit kernel takes, with LoRA that does something."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    model = tiny_model(tiny_config(text_config=tiny_text_config(tie_word_embeddings=True, **sizes)))
    in_precision(model, dtype)
    quantize_in_place(model, quantization)
    model.add_lora(LORA)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    freeze_base_parts(model)
    return model


def freeze_base_parts(model):
    """Train LoRA and the projector, in float32, as the scripts do."""
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.startswith("projector."):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()


def in_precision(model, dtype):
    """As `from_pretrained` does it: `model.to` would round the frequencies of the position embeddings, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def gradients(model, inputs, autocast):
    """Of a training step; its dropout is the same each time."""
    torch.manual_seed(2)
    model.train()
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", ["nothing", "a forward", "generate"])
def test_gradients_are_those_of_the_dequantized_weights(dtype, then):
    """Of LoRA, projector and norms, before and after evaluation, which packs the weights for torch's kernel."""
    model, plain = qlora_model(dtype), qlora_model(dtype)
    dequantize_linears(plain.language_model)
    freeze_base_parts(plain)
    inputs = tiny_processor().apply_transcription_request([noise(1.0), noise(0.4)])
    model.eval()
    with torch.no_grad():
        if then == "a forward":
            model(**inputs)
        elif then == "generate":
            model.generate(**inputs, max_new_tokens=3)
    layers = linears(model.language_model).values()
    assert all(isinstance(layer, QuantizedLinear) for layer in layers) and len(layers) == 14
    packed = dtype == torch.bfloat16 and then != "nothing"
    assert all((layer.packed_scales is not None) == packed for layer in layers)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    autocast = dtype == torch.bfloat16
    ours, theirs = gradients(model, inputs, autocast), gradients(plain, inputs, autocast)
    assert ours.keys() == theirs.keys() and sum(".lora_" in name for name in ours) == 12
    flat = [torch.cat([g.float().flatten() for g in found.values()]) for found in (ours, theirs)]
    assert flat[1].norm() > 0 and (flat[0] - flat[1]).norm() < 1e-3 * flat[1].norm()
    for name in ours:
        assert cosine(ours[name], theirs[name]) > 0.999 or theirs[name].norm() < 1e-5 * flat[1].norm(), name
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_training_leaves_quantised_weights_as_they_are_and_the_checkpoint_reloads(tmp_path):
    model = qlora_model()
    inputs = tiny_processor().apply_transcription_request([noise(1.0), noise(0.4)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        gradients(model, inputs, True)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=2)
    after = in_precision(model, torch.bfloat16).state_dict()
    quantised = [key for key in after if key.endswith(".scales")]
    assert len(quantised) == 15
    for key in [*quantised, *(key.removesuffix("scales") + "weight" for key in quantised)]:
        assert torch.equal(before[key], after[key]), key
    key = "language_model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    assert not torch.equal(before[key].bfloat16(), after[key])
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(**inputs).logits, expected)
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


@pytest.mark.parametrize("bits", [8, 4])
def test_whispers_tokens_are_quantised_and_reloaded(bits, tmp_path):
    config = tiny_config(num_layers=1)
    model = fill_token_ids(tiny_model(config))
    inputs = tiny_processor(config).apply_transcription_request([noise(1.0), noise(0.4)])
    embedding = model.projector.speech_tokens.weight.detach().clone()
    quantization = {"projector.speech_tokens": {"bits": bits} | ({"group_size": 8} if bits == 4 else {})}
    quantize_in_place(model, quantization)
    step = embedding.abs().max() / (127 if bits == 8 else 7)
    assert (model.projector.speech_tokens.dequantize() - embedding).abs().max() <= step / 2 + 1e-6
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.projector.speech_tokens.weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys() and all(torch.equal(saved[name], found[name]) for name in saved)
    with torch.no_grad():
        # Not to the bit: of tensors that lie elsewhere in memory some processors add products in another order.
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_untied_head_is_quantised_on_its_own():
    model = tiny_model()
    quantize_parts(model, {"embedding": {"bits": 8}})
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)


def test_a_part_may_be_one_linear(tmp_path):
    model = tiny_model()
    quantize_in_place(model, {"projector.proj": {"bits": 8}})
    assert isinstance(model.projector.proj, QuantizedLinear)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.projector.proj.weight, model.projector.proj.weight)
    assert loaded.projector.proj.weight.dtype == torch.int8


def test_what_a_projector_excludes_stays_in_full_precision():
    """The CTC head of Whisper's projector, which has the blank."""
    model = sound_model()
    quantize_parts(model, {"projector": {"bits": 8}})
    projector = model.projector
    for linear in (projector.layers[0].fc1, projector.frame_mlp[1], projector.sound_summary.mlp[1]):
        assert isinstance(linear, QuantizedLinear)
    assert type(projector.ctc_head.blank) is type(projector.ctc_head.proj) is torch.nn.Linear


def test_wrong_recipes_are_named():
    with pytest.raises(ValueError, match="no part 'encoder'.*audio_tower"):
        quantize_parts(tiny_model(), {"encoder": {"bits": 8}})
    with pytest.raises(ValueError, match="no part 'projector.speech_tokens'"):  # of a model with a Q-Former
        quantize_parts(tiny_model(), {"projector.speech_tokens": {"bits": 8}})
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
    with pytest.raises(OSError, match=r"model\.safetensors is not a complete"):
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
