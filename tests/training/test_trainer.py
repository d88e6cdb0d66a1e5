"""The trainer itself: what it sets up, and what it refuses."""

import torch
from conftest import tiny_config, tiny_model

from salmonn_hf.training.arguments import SalmonnTrainingArguments
from salmonn_hf.training.trainer import SalmonnTrainer


def test_training_leaves_cudnns_attention_out(tmp_path):
    """Its backward pass gives NaN for masked sequences of 64 tokens where all scores of a row are low."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    arguments = SalmonnTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    SalmonnTrainer(model=tiny_model(tiny_config()), args=arguments)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    if torch.cuda.is_available():
        query, key, value = torch.randn(3, 1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
        query[..., 0], key[..., 0] = 1.0, -960.0
        mask = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril()[None, None]
        heard = torch.nn.functional.scaled_dot_product_attention(query.requires_grad_(), key, value, attn_mask=mask)
        heard.sum().backward()
        assert query.grad.isfinite().all()
