"""Convert a GGUF Llama file into a directory that transformers loads without the `gguf` package."""

import re
from pathlib import Path

import torch

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3


def convert_llama_gguf(source: str | Path, destination: str | Path) -> Path:
    """Write `source`, a GGUF Llama file of any quantisation, as a bfloat16 directory at `destination`.

    transformers' own GGUF path keeps the weights packed and cannot save them, hence this one.

    Raises:
        ValueError: another architecture, another tokenizer than SmolLM's byte-level BPE, or tensors missing.
        ImportError: the `gguf` package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("converting a GGUF file needs the gguf package: pip install gguf") from error
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{source} holds a {fields['general.architecture']!r} model, not 'llama'")

    config = llama_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    tokenizer = byte_level_tokenizer(fields)
    save_file(llama_state_dict(reader.tensors, config), destination / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(destination)
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return destination


def llama_config(fields: dict, tied: bool):
    """The LlamaConfig for GGUF metadata; `tied` when the file has no output matrix of its own."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        # The file's float32 of 1e-5 reads 9.9999997e-06 as a Python float.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=tied,
    )


def llama_state_dict(tensors: list, config) -> dict[str, torch.Tensor]:
    """GGUF tensors dequantised to bfloat16 under LlamaForCausalLM's names, shapes checked against `config`."""
    from gguf.quants import dequantize
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state_dict = {}
    for tensor in tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if layer is None:
            name = TOP_NAMES.get(tensor.name, tensor.name)
        else:
            number, part = layer.groups()
            name = f"model.layers.{number}.{LAYER_NAMES.get(part, part)}.weight"
            if part in heads:
                weight = unpermute(weight, heads[part])
        state_dict[name] = weight.to(torch.bfloat16).contiguous()
    missing, unknown = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(f"not a whole Llama model: missing {sorted(missing)}, unknown {sorted(unknown)}")
    for name, weight in state_dict.items():
        if weight.shape != expected[name].shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}, the metadata says {tuple(expected[name].shape)}")
    return state_dict


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a (heads * head_dim, in) rotary projection from GGUF's interleaved order to transformers' halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def byte_level_tokenizer(fields: dict):
    """The SmolLM tokenizer held in GGUF metadata, with its chat template.

    Built here because transformers' GGUF path leaves out this vocabulary's split at digits, and so takes two
    newlines before a number (every numbered list has them) for two tokens where the model knows one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AddedToken, PreTrainedTokenizerFast

    model, pre = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (model, pre) != ("gpt2", "smollm"):
        raise ValueError(f"only the gpt2/smollm tokenizer converts, this file has {model}/{pre}")
    names = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(names, fields["tokenizer.ggml.token_type"], strict=True)
    control = [name for name, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])

    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {
        f"{role}_token": names[fields[f"tokenizer.ggml.{key}_token_id"]]
        for key, role in roles.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast
