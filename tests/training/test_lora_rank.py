"""LoRA in the language model, cut to a smaller rank."""

import pytest
import torch
from conftest import noise, tiny_processor
from peft.tuners.lora import LoraLayer

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.training.lora_rank import cut_lora_rank


def lora_layers(model):
    return [layer for layer in model.language_model.modules() if isinstance(layer, LoraLayer)]


def test_kept_is_the_best_approximation(lora_model):
    """Against the singular value decomposition of the whole product."""
    before = [layer.get_delta_weight("default") for layer in lora_layers(lora_model)]
    cut_lora_rank(lora_model, 3)
    assert before
    for layer, product in zip(lora_layers(lora_model), before, strict=True):
        left, values, right = torch.linalg.svd(product, full_matrices=False)
        best = left[:, :3] * values[:3] @ right[:3]
        torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(best, product, atol=1e-3)


def test_own_rank_changes_nothing_but_the_factors(lora_model):
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    with torch.no_grad():
        before = lora_model(**inputs).logits
        cut_lora_rank(lora_model, 4)
        torch.testing.assert_close(lora_model(**inputs).logits, before, rtol=1e-3, atol=1e-4)


def test_checkpoint_of_a_cut_adapter_reloads(lora_model, tmp_path):
    inputs = tiny_processor().apply_transcription_request([noise(0.5)])
    cut_lora_rank(lora_model, 2)
    lora_model.save_pretrained(tmp_path)
    loaded = SalmonnForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.lora["r"] == 2 and loaded.config.lora["lora_alpha"] == 4
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, lora_model(**inputs).logits)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_cannot_be_is_named(lora_model, rank):
    with pytest.raises(ValueError, match=f"rank 4.* not to {rank}"):
        cut_lora_rank(lora_model, rank)
