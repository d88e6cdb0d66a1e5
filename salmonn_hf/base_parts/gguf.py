"""Convert a GGUF Llama file into a directory that transformers loads without the `gguf` package."""

from pathlib import Path

import torch


def convert_llama_gguf(source: str | Path, destination: str | Path) -> Path:
    """Write `source`, a GGUF Llama file of any quantisation, as a bfloat16 directory at `destination`.

    Raises:
        ValueError: another architecture, another tokenizer than SmolLM's byte-level BPE, or tensors missing.
        ImportError: the `gguf` package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("converting a GGUF file needs the gguf package: pip install gguf") from error
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import GenerationConfig, GgufConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source, destination = Path(source), Path(destination)
    fields = {name: field.contents() for name, field in GGUFReader(source).fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{source} holds a {fields['general.architecture']!r} model, not 'llama'")
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"only the gpt2/smollm tokenizer converts, {source} has {'/'.join(kind)}")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        source.parent, gguf_file=source.name, model_max_length=fields["llama.context_length"]
    )
    # transformers leaves out this vocabulary's split at digits, and so takes two newlines before a number (every
    # numbered list has them) for two tokens where the model knows one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

    config = LlamaConfig.from_pretrained(source.parent, gguf_file=source.name)
    # The file's float32 of 1e-5 reads 9.9999997e-06 as a Python float.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    model, loading = LlamaForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        config=config,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        raise ValueError(f"{source} is not a whole Llama model: missing {sorted(loading['missing_keys'])}")
    state_dict = model.state_dict()
    if config.tie_word_embeddings:
        del state_dict["lm_head.weight"]

    # `save_pretrained` refuses a model that was read from GGUF.
    destination.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, destination / "model.safetensors", metadata={"format": "pt"})
    config.update({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    for name in ("_model_name_or_path", "unk_token_id"):  # of the file, but not of a LlamaConfig
        vars(config).pop(name, None)
    config.save_pretrained(destination)
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return destination
