"""The command that quantises a trained model, and the calibration behind it."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from test_sources import embedded, flac, write
from transformers import AutoModel, pipeline

from salmonn_hf import SalmonnForConditionalGeneration, SalmonnModel
from salmonn_hf.data.joined_clips import speech_dataset
from salmonn_hf.model.quantized_layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    linears,
    quantize_parts,
    quantized_module,
)
from salmonn_hf.quantization.gptq import (
    layer_inputs,
    quantize_layers,
    quantize_tied_vocabulary,
    solve,
    weighted_scales,
)

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "training" / "quantize.py"))
SENTENCE = "A sentence that belongs to nobody else."
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with LoRA, and a Parquet file of speech to calibrate on."""
    directory = tmp_path_factory.mktemp("trained")
    # bitsandbytes takes rows by 32 on CPUs with AVX-512 bf16, which two heads of keys of 16 features are.
    text_config = tiny_text_config(hidden_size=64, head_dim=16, tie_word_embeddings=True)
    tiny_model(tiny_config(text_config=text_config, lora=LORA)).save_pretrained(directory / "model")
    tiny_processor().save_pretrained(directory / "model")
    rows = [(noise(0.5 + 0.1 * n, seed=n), f"{n}.flac", SENTENCE) for n in range(4)]
    speech_dataset(rows).to_parquet(str(directory / "train.parquet"))
    captions = [embedded(flac(0.5), f"{n}.flac", text=["a bell", "a dog barks", "the dog barks"]) for n in range(4)]
    write(directory / "captions.parquet", captions)
    return directory


def quantize(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, arguments)])
    SCRIPT["main"]()


@pytest.mark.parametrize("merge_lora", ["true", "false"])
def test_command_writes_a_checkpoint_that_the_pipeline_loads(trained, merge_lora, tmp_path, monkeypatch):
    output = tmp_path / "quantised"
    quantize(
        monkeypatch, "--model_name_or_path", trained / "model", "--output_dir", output, "--method", "nearest",
        "--group_size", "32", "--merge_lora", merge_lora,
    )  # fmt: skip
    model = AutoModel.from_pretrained(output)
    assert model.config.quantized_parts["language_model"] == {"bits": 4, "group_size": 32}
    assert all(isinstance(linear, QuantizedLinear) for linear in linears(model.language_model).values())
    assert (model.config.lora is None) == (merge_lora == "true")
    assert isinstance(pipeline("automatic-speech-recognition", model=str(output))(noise(0.5))["text"], str)
    assert not (tmp_path / "quantised.unfinished").exists()
    card = (output / "README.md").read_text()
    assert "# quantised" in card and "language_model 4" in card.split("Bits per weight: ")[1].split(".")[0]
    assert "unfinished" not in card and str(tmp_path) not in card
    # No weight of a quantised part is left in floating point.
    sizes = {key: value.numel() for key, value in model.state_dict().items() if value.dtype == torch.bfloat16}
    assert not [key for key in sizes if key.endswith("_proj.weight")]


@pytest.mark.parametrize(
    ("method", "merge_lora"),
    [("nf4", True), ("nf4", False), ("int8", True), ("torchao-int8", True), ("torchao-int8", False)],
)
def test_other_libraries_formats(trained, method, merge_lora, tmp_path, monkeypatch):
    library = pytest.importorskip(SCRIPT["LIBRARIES"][method], reason="needs the extra `quant`")
    output, written = tmp_path / "quantised", []
    save = SCRIPT["save"]
    monkeypatch.setitem(save.__globals__, "save", lambda model, *a: (written.append(model), save(model, *a)))
    quantize(
        monkeypatch, "--model_name_or_path", trained / "model", "--output_dir", output, "--method", method,
        "--merge_lora", str(merge_lora).lower(),
    )  # fmt: skip
    model = AutoModel.from_pretrained(output)
    for linear in linears(model.language_model).values():
        holder = linear if method != "torchao-int8" else linear.weight
        assert type(holder).__module__.startswith(library.__name__)
    lora = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert len(lora) == (0 if merge_lora else 8) and all(type(p) is torch.nn.Parameter for p in lora)
    assert all(isinstance(linear, QuantizedLinear) for linear in linears(model.audio_tower).values())
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    assert torch.equal(model(**inputs).logits, written[0](**inputs).logits)
    assert isinstance(pipeline("automatic-speech-recognition", model=str(output))(noise(0.5))["text"], str)
    assert library.__name__ in (output / "README.md").read_text()
    assert not [file for file in output.iterdir() if "/tmp" in file.read_text(errors="ignore")]


def test_unusable_recipes_are_named(trained, monkeypatch, tmp_path):
    common = ["--model_name_or_path", trained / "model", "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="train_files"):
        quantize(monkeypatch, *common)
    with pytest.raises(ValueError, match="'gptq' or 'nearest'"):
        quantize(monkeypatch, *common, "--method", "awq")
    with pytest.raises(ValueError, match="group_size 48 does not divide"):
        quantize(monkeypatch, *common, "--method", "nearest", "--group_size", "48")
    assert not (tmp_path / "out").exists()


def test_parts_are_those_that_a_model_has():
    arguments = SCRIPT["QuantizeArguments"](model_name_or_path="a", output_dir="b", method="nearest", encoder_bits=0)
    qformer = {
        "projector": {"bits": 8},
        "language_model": {"bits": 4, "group_size": 64},
        "embedding": {"bits": 8},
    }
    assert arguments.parts(tiny_config()) == qformer
    assert arguments.parts(tiny_config(num_layers=1)) == qformer | {"projector.speech_tokens": {"bits": 8}}


def test_calibration_sees_audio_and_answers(trained):
    processor = tiny_processor()
    arguments = SCRIPT["QuantizeArguments"](
        "model", "out", train_files=[str(trained / "train.parquet")], calibration_clips=3
    )
    batches = SCRIPT["calibration_batches"](arguments, processor)
    assert len(batches) == 3 and len({batch["input_features"].shape for batch in batches}) > 1
    for batch in batches:
        text = processor.tokenizer.decode(batch["input_ids"][0])
        assert text.endswith(SENTENCE + "<|im_end|>") and "Transcribe the speech." in text
    captions = {"path": str(trained / "captions.parquet"), "task": "audiocaption", "typical_text": True, "weight": 2}
    with_captions = SCRIPT["QuantizeArguments"](
        "model", "out", train_files=arguments.train_files, sources=[captions], calibration_clips=6
    )
    texts = [
        processor.tokenizer.decode(batch["input_ids"][0])
        for batch in SCRIPT["calibration_batches"](with_captions, processor)
    ]
    assert sum("Transcribe the speech." in text for text in texts) == 2
    assert [text.endswith("a dog barks<|im_end|>") for text in texts] == [False] * 2 + [True] * 4


def test_layer_inputs_are_those_of_the_layer():
    model, inputs = tiny_model(), tiny_processor().apply_transcription_request([noise(0.5)])
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        ((args, kwargs),) = layer_inputs(model, model.language_model.model.layers[0], [inputs])
        hidden_states = args[0]
        assert torch.equal(hidden_states, expected.hidden_states[0])
        for layer in model.language_model.model.layers:
            hidden_states = layer(hidden_states, **kwargs)
        logits = model.language_model.lm_head(model.language_model.model.norm(hidden_states))
    torch.testing.assert_close(logits, expected.logits)


def test_scales_fit_the_columns_that_matter():
    """Seven values of a grid of steps of 0.1, beside a larger one: whose scale it is depends on what counts."""
    rows = torch.tensor([[0.1, -0.2, 0.3, 0.5, -0.6, 0.7, 0.2, 1.0]])
    unimportant = torch.tensor([1.0] * 7 + [1e-6])
    assert weighted_scales(rows, unimportant).item() == pytest.approx(0.1, rel=0.03)
    important = torch.tensor([1e-6] * 7 + [1.0])
    scale = weighted_scales(rows, important)
    assert ((rows / scale).round().clamp(-8, 7) * scale - rows)[0, 7].abs() < 0.01


def test_gptq_beats_rounding_on_what_it_was_calibrated_on():
    pytest.importorskip("gptqmodel", reason="needs the extra `quant`")
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) * torch.logspace(0, -2, 64)[:, None]  # inputs of unequal and correlated features
    inputs = [torch.randn(1, 200, 64) @ mixing for _ in range(4)]
    layer = torch.nn.Linear(64, 128, bias=False)
    weight, x = layer.weight.detach().clone(), torch.cat(inputs, 1)
    expected = x @ weight.T
    rounded = quantized_module(layer, 4, 32).dequantize()
    solved = solve(layer, inputs, 4, 32)
    assert torch.equal(solved.dequantize(), layer.weight)  # every value of the solution is one of the grid
    errors = [(x @ w.T - expected).pow(2).mean() for w in (solved.dequantize(), rounded)]
    assert errors[0] < 0.7 * errors[1]


def test_scales_of_embeddings_follow_what_the_head_gets(trained):
    """Where a few features of the last hidden state are large, the head's columns for them are rounded with care."""
    model = SalmonnForConditionalGeneration.from_pretrained(trained / "model", dtype=torch.float32).merge_lora()
    language_model = model.language_model
    language_model.model.norm.weight.data[::16] *= 50
    matrix = language_model.get_input_embeddings().weight.detach().clone()
    batches = [tiny_processor().apply_transcription_request([noise(0.6, seed=seed)]) for seed in range(4)]
    with torch.no_grad():
        states = torch.cat([SalmonnModel.forward(model, **batch).last_hidden_state[0] for batch in batches])
    quantize_tied_vocabulary(model, batches, group_size=32)
    assert language_model.get_output_embeddings().embedding is language_model.get_input_embeddings()
    weighted = language_model.get_input_embeddings().dequantize()
    nearest = QuantizedEmbedding(*matrix.shape, 4, 32).quantize(matrix).dequantize()
    errors = [(states @ (rounded - matrix).T).square().mean() for rounded in (weighted, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_gptq_checkpoint_holds_nothing_of_the_calibration(trained, tmp_path, monkeypatch):
    pytest.importorskip("gptqmodel", reason="needs the extra `quant`")
    output = tmp_path / "quantised"
    quantize(
        monkeypatch, "--model_name_or_path", trained / "model", "--output_dir", output, "--group_size", "32",
        "--train_files", trained / "train.parquet", "--calibration_clips", "4",
    )  # fmt: skip
    assert AutoModel.from_pretrained(output).config.quantized_parts["language_model"]["bits"] == 4
    for file in output.iterdir():
        content = file.read_bytes()
        for secret in (SENTENCE, str(trained), str(tmp_path)):
            assert secret.encode() not in content, file.name


def test_gptq_follows_a_model_better_than_rounding(trained):
    pytest.importorskip("gptqmodel", reason="needs the extra `quant`")
    clips = [noise(0.6, seed=seed) for seed in range(6)]
    batches = [tiny_processor().apply_transcription_request([clip]) for clip in clips]
    models = [
        SalmonnForConditionalGeneration.from_pretrained(trained / "model", dtype=torch.float32).merge_lora()
        for _ in range(3)
    ]
    quantize_layers(models[1], models[1].language_model.model.layers, batches, bits=4, group_size=32)
    quantize_parts(models[2].language_model, {"model": {"bits": 4, "group_size": 32}})
    with torch.no_grad():
        exact, solved, rounded = (torch.cat([model(**batch).logits[0] for batch in batches]) for model in models)
    assert (solved - exact).pow(2).mean() < 0.8 * (rounded - exact).pow(2).mean()
