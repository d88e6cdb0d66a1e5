"""Scales of a quantised language model, tuned to the unquantised one."""

import copy

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from torch.nn import functional as F

from salmonn_hf.model.quantized_layers import QuantizedMatrix, quantize_parts, quantized_linear
from salmonn_hf.quantization.scale_tuning import divergence, tune_scales

FOUR = {"bits": 4, "group_size": 32}
SENTENCES = ["Read the card.", "It is a long way from here to the bridge.", "Yes.", "Open the second door."]


def models(tie: bool = True):
    """A model of 4 bits, and what it was made of, its weights large enough to tell tokens apart."""
    text_config = tiny_text_config(hidden_size=64, intermediate_size=64, tie_word_embeddings=tie)
    teacher = tiny_model(tiny_config(text_config=text_config)).eval()
    for parameter in teacher.language_model.parameters():
        parameter.data *= 2
    model = copy.deepcopy(teacher)
    quantize_parts(model, {"language_model": FOUR, "embedding": FOUR})
    return model, teacher


def texts(processor) -> list[str]:
    prompt = processor.apply_chat_template(
        processor.transcription_messages(), add_generation_prompt=True, tokenize=False
    )
    return [prompt + sentence for sentence in SENTENCES]


def batches(count: int, seed: int = 0) -> list[dict]:
    processor = tiny_processor()
    made = []
    for number in range(count):
        clips = [noise(0.4 + 0.3 * place, seed=seed + 10 * number + place) for place in range(4)]
        made.append(dict(processor(text=texts(processor), audio=clips)))
    return made


@pytest.mark.parametrize("bits, scales_shape", [(4, (8, 2)), (8, (8,))])
def test_gradient_of_scales(bits, scales_shape):
    """By hand: of the widened weight's gradient, what each scale's own integers make of it."""
    torch.manual_seed(0)
    linear = quantized_linear(torch.nn.Linear(64, 8), bits, 32)
    inputs, upstream = torch.randn(5, 64), torch.randn(5, 8)
    linear.scales = linear.scales.detach().clone().requires_grad_(True)
    linear(inputs).backward(upstream)
    integers = linear.dequantize().detach().view(*scales_shape, -1) / linear.scales.detach()[..., None]
    expected = ((upstream.T @ inputs).view(*scales_shape, -1) * integers).sum(-1)
    torch.testing.assert_close(linear.scales.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_tuned_scales_bring_the_model_nearer(tie):
    model, teacher = models(tie)
    matrices = [module for module in model.language_model.modules() if isinstance(module, QuantizedMatrix)]
    integers = [matrix.weight.clone() for matrix in matrices]
    held_out = batches(2, seed=1000)
    with torch.no_grad():
        before = sum(float(divergence(model, teacher, batch)) for batch in held_out)
    assert before > 0.01
    told = tune_scales(model, teacher, batches(40), learning_rate=5e-3)
    with torch.no_grad():
        after = sum(float(divergence(model, teacher, batch)) for batch in held_out)
    assert after < 0.7 * before and told < before / 2
    for matrix, before_tuning in zip(matrices, integers, strict=True):
        assert torch.equal(matrix.weight, before_tuning)
        assert not matrix.scales.requires_grad and matrix.scales.is_leaf


def test_scales_made_in_inference_mode_are_tuned():
    """As gptqmodel leaves them."""
    model, teacher = models()
    with torch.inference_mode():
        for module in model.language_model.modules():
            if isinstance(module, QuantizedMatrix):
                module.scales = module.scales.clone()
    assert tune_scales(model, teacher, batches(2)) > 0


def test_divergence_is_that_of_the_tokens_behind_the_audio():
    """Row by row without padding, by the definition of the divergence."""
    model, teacher = models()
    processor = tiny_processor()
    clips = [noise(0.4 + 0.3 * place, seed=place) for place in range(4)]
    with torch.no_grad():
        told = divergence(model, teacher, dict(processor(text=texts(processor), audio=clips)))
        each = []
        for text, clip in zip(texts(processor), clips, strict=True):
            inputs = processor(text=[text], audio=[clip])
            last = int((inputs["input_ids"][0] == processor.audio_token_id).nonzero()[-1])
            p, q = (F.log_softmax(m(**inputs).logits[0, last + 1 : -1], dim=-1) for m in (teacher, model))
            each.append((p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(told, torch.cat(each).mean(), rtol=1e-3, atol=1e-6)
