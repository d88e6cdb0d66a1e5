"""Batched answers."""

import numpy as np
import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from transformers import AutoModel

from salmonn_hf.inference import Answerer, Transcriber, default_dtype


def test_answers_are_those_of_generate_alone_and_in_a_batch(tiny_checkpoint):
    answerer = Answerer(str(tiny_checkpoint), dtype="float32", device="cpu", max_new_tokens=6)
    clips, prompts = [noise(0.5), noise(1.3, 1), noise(0.9, 2)], ["Which?", "Is anyone speaking?", "What is it?"]
    together = answerer(clips, prompts)
    assert len(set(together)) > 1
    for clip, prompt, answer in zip(clips, prompts, together, strict=True):
        messages = [{"role": "user", "content": [{"type": "audio", "audio": clip}, {"type": "text", "text": prompt}]}]
        inputs = answerer.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        output = answerer.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone = answerer.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == alone[0].strip()


def test_the_guard_ends_generation(tiny_checkpoint):
    """A model whose every next token is the same goes on to its limit, but for the guard."""
    answerer = Answerer(str(tiny_checkpoint), dtype="float32", device="cpu", max_new_tokens=60)
    head = answerer.model.get_output_embeddings()
    steps = []

    def same_token(module, inputs, logits):
        steps.append(1)
        logits = torch.full_like(logits, -1.0)
        logits[..., 70] = 1.0
        return logits

    hook = head.register_forward_hook(same_token)
    answer = answerer([noise(0.5)], ["What?"])[0]
    hook.remove()
    assert len(steps) == 8
    assert answer == answerer.processor.batch_decode([[70]])[0].strip()


def test_transcriber_gives_what_the_pipeline_gives(tiny_checkpoint):
    transcriber = Transcriber(str(tiny_checkpoint), dtype="float32", device="cpu")
    clips = [noise(0.6), noise(1.1, 1)]
    alone = [transcriber.pipeline(np.array(clip))["text"].strip() for clip in clips]
    assert transcriber(clips) == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_is_merged_where_that_changes_nothing(tmp_path, dtype):
    tiny_model(tiny_config(lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]})).save_pretrained(
        tmp_path
    )
    tiny_processor().save_pretrained(tmp_path)
    model = Transcriber(str(tmp_path), dtype=dtype, device="cpu").model
    assert (model.config.lora is None) == (dtype == "float32")
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    written_out = {"text_config": "eager"}  # as bfloat16 on a CPU has it
    before = AutoModel.from_pretrained(tmp_path, dtype=dtype, attn_implementation=written_out)(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-4, rtol=1e-4)


def test_no_product_of_many_features_has_a_single_row(tmp_path, monkeypatch):
    """In bfloat16 on a CPU; the others, and those of one row in float32, are as they were."""
    monkeypatch.setattr("salmonn_hf.inference.SINGLE_ROW_FEATURES", 48)  # of the tiny model down_proj alone has more
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    linear, rows = torch.nn.functional.linear, []
    for dtype, expected in (("bfloat16", {2}), ("float32", {1})):
        model = Transcriber(str(tmp_path), dtype=dtype, device="cpu").model
        layers = model.language_model.model.layers
        rows.clear()
        assert (model.language_model.config._attn_implementation == "eager") == (dtype == "bfloat16")
        alone = torch.randn(1, 1, 64).to(model.dtype)
        for layer in layers:
            product = torch.nn.functional.linear(alone, layer.mlp.down_proj.weight)
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "linear", lambda x, *w: rows.append(x.shape[-2]) or linear(x, *w))
                found = layer.mlp.down_proj(alone)
            torch.testing.assert_close(found, product, atol=1e-2, rtol=1e-2)
        assert set(rows) == expected
        assert layers[0].mlp.down_proj(torch.randn(2, 3, 64).to(model.dtype)).shape == (2, 3, 32)


@pytest.mark.parametrize(
    "device, has_gpu, has_bfloat16, expected",
    [
        (None, False, True, "auto"),
        (None, False, False, "float32"),
        (None, True, False, "auto"),
        ("cpu", True, False, "float32"),
        ("cuda:1", True, False, "auto"),
    ],
)
def test_bfloat16_only_where_it_is_fast(monkeypatch, device, has_gpu, has_bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    assert default_dtype(device) == expected
