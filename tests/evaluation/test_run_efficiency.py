"""The efficiency benchmark: what it counts, what it writes, and that its way through the model is the model's own."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_text_config
from torch.testing._internal.two_tensor import TwoTensor
from transformers import GraniteSpeechForConditionalGeneration

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.evaluation.efficiency import PARTS, Benchmark, random_model, stored_bytes, weights_by_module
from salmonn_hf.evaluation.report import write_report
from salmonn_hf.hub.model_card import make_card
from salmonn_hf.model.quantized_layers import quantize_parts

ROOT = Path(__file__).resolve().parents[2]
SPEECH = noise(2.0)
SCRIPT = runpy.run_path(str(ROOT / "eval" / "run_efficiency.py"))


def test_the_timed_parts_are_the_whole_model():
    model = tiny_model()
    bench = Benchmark(model, SPEECH, prompt_tokens=9)
    clip, logits = noise(0.7), []
    model.language_model.register_forward_hook(lambda *args: logits.append(args[-1].logits[:, -1]))
    parts, steps = bench.round(clip, decode_steps=3)
    assert list(parts) == list(PARTS) and len(steps) == 3 and min(*parts.values(), *steps) >= 0
    features = bench.extractor([clip], return_tensors="pt")
    num_tokens = len(model.get_audio_features(**features).pooler_output)
    with torch.no_grad():
        expected = model(bench.input_ids(num_tokens), **features).logits[:, -1]
    torch.testing.assert_close(logits[0], expected)


def test_a_cached_start_of_the_prompt_changes_nothing_but_the_time():
    model = tiny_model()
    bench = Benchmark(model, SPEECH, prompt_tokens=9)
    clip, logits = noise(0.7), []
    cache = bench.prompt_cache()
    model.language_model.register_forward_hook(lambda *args: logits.append(args[-1].logits[:, -1]))
    bench.round(clip, decode_steps=2)
    for _ in range(2):  # the second round finds the cache as the first did
        bench.round(clip, decode_steps=2, cache=cache)
    assert cache.get_seq_length() == 4
    for step in range(3):
        torch.testing.assert_close(logits[3 + step], logits[step])
        torch.testing.assert_close(logits[6 + step], logits[step])


def test_the_parts_of_a_peer_are_transformers_own_model():
    config = tiny_config(text_config=tiny_text_config(tie_word_embeddings=True))
    torch.manual_seed(0)
    model = GraniteSpeechForConditionalGeneration(SCRIPT["granite_config"](config)).eval()
    bench = SCRIPT["GraniteBenchmark"](model, SPEECH, prompt_tokens=9)
    clip, logits = noise(0.9), []
    model.lm_head.register_forward_hook(lambda *args: logits.append(args[-1][:, -1]))
    parts, steps = bench.round(clip, decode_steps=3)
    assert parts["sound encoder"] == 0 and min(parts["whisper"], parts["projector"]) > 0 and len(steps) == 3
    with torch.no_grad():
        expected = model(bench.input_ids(bench.audio_tokens(clip)), **bench.features([clip])).logits[:, -1]
    torch.testing.assert_close(logits[0], expected)
    assert model.model.language_model.config.to_dict() == config.text_config.to_dict()
    assert len(model.model.encoder.layers) == config.audio_config.encoder_layers


def test_weights_count_tied_and_quantised_matrices_once():
    model = tiny_model(tiny_config(text_config=tiny_text_config(tie_word_embeddings=True)))
    sizes = weights_by_module(model)
    assert sizes["embedding and head"] == 300 * 32 * 4
    state = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    rotary = sum(t.nbytes for n, t in model.named_buffers() if "inv_freq" in n)
    assert sum(sizes.values()) == sum(state.values()) + rotary
    quantize_parts(model, {"embedding": {"bits": 8}})
    assert weights_by_module(model)["embedding and head"] == 300 * 32 + 300 * 4


def test_weights_of_a_tensor_made_of_others_are_those():
    inner = torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int8)
    model = tiny_model()
    before = weights_by_module(model)["projector"]
    model.projector.audio_norm.register_buffer("quantised", TwoTensor(*inner))
    assert weights_by_module(model)["projector"] == before + 32


def test_weights_of_bitsandbytes_are_counted_with_their_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e .[quant]")
    linear = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    stored = [tensor.nbytes for name, tensor in linear.state_dict().items() if "quant_state" not in name]
    assert len(stored) > 1 and stored_bytes(linear.weight) == sum(stored)


@pytest.mark.parametrize("sounds", [{}, {"sound_layers": [1], "sound_summary_size": 8}])
def test_the_published_way_of_a_projector_of_whispers_decoder_is_a_qformer(sounds, tmp_path, monkeypatch):
    projector = {"num_layers": 1, "frame_mlp_size": 8, "ctc_vocab_size": 20}
    tiny_model(tiny_config(**projector, **sounds)).save_pretrained(tmp_path / "tiny")
    arguments = ["--model", tmp_path / "tiny", "--rounds", 1, "--warmup", 1, "--seconds", 1, "--lengths", 0.5,
                 "--batch_sizes", 1, "--decode_steps", 2, "--reference", "--output", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["run_efficiency.py", *map(str, arguments)])
    SCRIPT["main"]()
    systems = json.loads((tmp_path / "out" / "efficiency.json").read_text())["systems"]
    assert systems["tiny, the published way"]["audio_tokens"] == 88


def test_lora_in_the_encoder_is_merged_and_not_in_the_published_way(tmp_path, monkeypatch):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    tiny_model(tiny_config(audio_lora=lora)).save_pretrained(tmp_path / "tiny")
    arguments = ["--model", tmp_path / "tiny", "--rounds", 1, "--warmup", 1, "--seconds", 1, "--lengths", 0.5,
                 "--batch_sizes", 1, "--decode_steps", 2, "--reference", "--dtype", "float32",
                 "--output", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["run_efficiency.py", *map(str, arguments)])
    SCRIPT["main"]()
    plain = weights_by_module(tiny_model())["audio_tower"]
    systems = json.loads((tmp_path / "out" / "efficiency.json").read_text())["systems"]
    assert [system["weights"]["audio_tower"] for system in systems.values()] == [plain, plain]


@pytest.mark.parametrize("others", [[], ["the published way"], ["the published way", "granite-speech"]])
def test_command_writes_json_table_and_plot(others, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "tiny")
    output = tmp_path / "out"
    arguments = ["--model", tmp_path / "tiny", "--rounds", 2, "--warmup", 1, "--seconds", 1, "--lengths", 0.5,
                 "--batch_sizes", 2, "--decode_steps", 2, "--device", "cpu", "--output", output]  # fmt: skip
    arguments += ["--reference"] * ("the published way" in others)
    arguments += ["--peer", "granite-speech"] * ("granite-speech" in others)
    monkeypatch.setattr(sys, "argv", ["run_efficiency.py", *map(str, arguments)])
    SCRIPT["main"]()
    systems = json.loads((output / "efficiency.json").read_text())["systems"]
    names = ["tiny", "tiny, the published way", "granite-speech, of tiny's sizes"]
    assert list(systems) == names[: 1 + len(others)]
    for system in systems.values():
        assert system["protocol"]["ttft"]["p50"] <= system["protocol"]["ttft"]["p95"]
        assert set(system["throughput"]) == {"2"}
        assert system["peak_memory"] > sum(system["weights"].values())
    if others:
        assert systems["tiny, the published way"]["audio_tokens"] == 88
        assert systems["tiny, the published way"]["dtype"] == "torch.float32"
    assert "| TTFT s of | features |" in (output / "table.md").read_text()
    assert (output / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_and_the_card_take_what_it_writes(tiny_checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "out"
    arguments = ["--model", tiny_checkpoint, "--rounds", 1, "--warmup", 1, "--seconds", 1, "--lengths", 0.5, "--dtype",
                 "float32", "--batch_sizes", 1, "--decode_steps", 2, "--reference", "--output", output]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["run_efficiency.py", *map(str, arguments)])
    SCRIPT["main"]()
    write_report([output], tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    card = str(make_card(tiny_checkpoint, [output]))
    systems = json.loads((output / "efficiency.json").read_text())["systems"]
    assert len(systems) == 2
    for name, system in systems.items():
        memory, ttft = f"{system['peak_memory'] / 1e9:.2f}", f"{system['protocol']['ttft']['p50']:.3f}"
        tpot = system["protocol"]["tpot"]["p50"]
        assert f"| {name} | — | — | {memory} | {ttft} | {tpot:.3f} | measured" in report
        assert f"- {name}: {memory} GB peak memory, {ttft} s to the first token, {tpot:.4f} s a token" in card
        assert f"{system['audio_tokens']} audio tokens, float32, cpu, {torch.get_num_threads()} threads" in card
        assert name in (tmp_path / "report" / "plots" / "0.svg").read_text()


def test_random_weights_of_quantised_shapes_run():
    parts = {"language_model": {"bits": 4, "group_size": 16}, "embedding": {"bits": 8}}
    model = random_model(SalmonnForConditionalGeneration, tiny_config(), torch.bfloat16, "cpu", parts)
    _, steps = Benchmark(model, SPEECH, 9).round(noise(0.5), 2)
    assert len(steps) == 2 and model.config.quantized_parts == parts
    assert model.language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
