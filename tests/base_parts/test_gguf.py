"""Llama from GGUF: the conversion keeps the model's outputs and its tokenizer."""

import sys

import numpy as np
import pytest
import torch

from salmonn_hf.base_parts.gguf import convert_llama_gguf

CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path, model, architecture="llama", left_out=()):
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    config = model.config
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", "Ġ", "a", "1", "2", "ĊĊ", "12"]
    writer.add_token_list(tokens + [f"x{index}" for index in range(config.vocab_size - len(tokens))])
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["Ċ Ċ", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in model.state_dict().items():
        weight, pieces = tensor.numpy(), name.split(".")
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            gguf_name = {"embed_tokens": "token_embd", "norm": "output_norm"}[pieces[1]] + ".weight"
        elif name == "lm_head.weight" or name in left_out:
            continue
        else:
            gguf_name = f"blk.{pieces[2]}.{parts[pieces[-2]]}.weight"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(pieces[-2])
        if heads is not None:  # GGUF keeps rotary pairs side by side
            rows, columns = weight.shape
            weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        weight = np.ascontiguousarray(weight)
        if weight.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, rope_parameters=rope, **sizes)).eval()


def test_gguf_llama_keeps_its_outputs_and_tokenizer_and_reloads_without_gguf(tmp_path, monkeypatch, tiny_llama):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert_llama_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert converted.dtype == torch.bfloat16
    assert converted.config.rope_parameters["rope_theta"] == 50000.0
    assert converted.config.rms_norm_eps == 1e-6
    assert converted.generation_config.eos_token_id == 2

    ids = torch.arange(20)[None] + 3
    with torch.no_grad():
        expected, found = tiny_llama(ids).logits, converted.float()(ids).logits
    # 8-bit weights and bfloat16 cost about 1 %; a wrong order of the rotary rows costs far more.
    assert (found - expected).norm() < 0.03 * expected.norm()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]  # numbers are split into digits before merging
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=True)
    assert chat["input_ids"] == [1, 5, 2]
    assert tokenizer.decode([1, 5, 2], skip_special_tokens=True) == "a"


def test_unusable_gguf_files_are_refused(tmp_path, tiny_llama):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="'falcon' model, not 'llama'"):
        convert_llama_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama, "falcon"), tmp_path / "out")
    lacking = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"not a whole Llama model: missing .*{lacking}"):
        convert_llama_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama, left_out=[lacking]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
