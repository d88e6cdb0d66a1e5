"""Whisper from ggml: the conversion keeps the model's outputs and gives its tokens."""

import struct

import numpy as np
import pytest
import torch

from salmonn_hf.base_parts.ggml import GGML_MAGIC, NAMES, bpe_merges, convert_whisper_ggml, read_ggml_whisper


def write_ggml(path, model, multilingual, ftype=1, left_out="proj_out.weight"):
    """Write a WhisperForConditionalGeneration as a ggml file, with a made-up vocabulary of byte pairs."""
    from transformers import WhisperFeatureExtractor

    config = model.config
    audio = (config.max_source_positions, config.d_model, config.encoder_attention_heads, config.encoder_layers)
    text = (config.max_target_positions, config.d_model, config.decoder_attention_heads, config.decoder_layers)
    filters = np.asarray(WhisperFeatureExtractor(feature_size=config.num_mel_bins).mel_filters, np.float32).T
    vocabulary = [bytes([byte]) for byte in range(256)]
    vocabulary += [bytes([index // 256, index % 256]) for index in range(50000)]
    vocabulary += [b"" if multilingual else b"<|endoftext|>"]
    with open(path, "wb") as file:
        file.write(struct.pack("<I11i", GGML_MAGIC, config.vocab_size, *audio, *text, config.num_mel_bins, 1))
        file.write(struct.pack("<2i", *filters.shape) + np.ascontiguousarray(filters).tobytes())
        file.write(struct.pack("<i", len(vocabulary)))
        file.writelines(struct.pack("<i", len(token)) + token for token in vocabulary)
        for name, tensor in model.state_dict().items():
            if name in ("proj_out.weight", left_out):
                continue
            name = openai_name(name).encode()
            bias_or_norm = tensor.ndim == 1
            shape = (len(tensor), 1) if name.endswith((b"conv1.bias", b"conv2.bias")) else tuple(tensor.shape)
            file.write(struct.pack("<3i", len(shape), len(name), 0 if bias_or_norm else ftype))
            file.write(struct.pack(f"<{len(shape)}i", *reversed(shape)) + name)
            file.write(tensor.numpy().astype(np.float32 if bias_or_norm else np.float16).tobytes())
    return path


def openai_name(name):
    name = name.removeprefix("model.")
    if name.startswith(("encoder.layer_norm", "decoder.layer_norm")):
        return name.replace("encoder.layer_norm", "encoder.ln_post").replace("decoder.layer_norm", "decoder.ln")
    for openai, ours in NAMES["tensors"].items():
        if ours not in ("encoder.layer_norm.", "decoder.layer_norm."):
            name = name.replace(ours, openai)
    return name


def tiny_whisper(vocab_size):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 8, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 10}
    config = WhisperConfig(vocab_size=vocab_size, max_target_positions=12, pad_token_id=50256, **sizes)
    # The values of an official checkpoint are float16 ones.
    return WhisperForConditionalGeneration(config).half().float().eval()


@pytest.mark.parametrize("multilingual", [False, True])
def test_ggml_whisper_keeps_its_outputs_and_gets_its_tokens(tmp_path, multilingual):
    from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

    original = tiny_whisper(51865 if multilingual else 51864)
    convert_whisper_ggml(write_ggml(tmp_path / "model.bin", original, multilingual), tmp_path / "out")

    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert converted.dtype == torch.float32
    mel, ids = torch.randn(2, 80, 20), torch.tensor([[50257, 5, 6], [50257, 7, 8]])
    with torch.no_grad():
        expected = original(input_features=mel, decoder_input_ids=ids).logits
        torch.testing.assert_close(converted(input_features=mel, decoder_input_ids=ids).logits, expected)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").feature_size == 80

    # openai-whisper's ids: English <|endoftext|> is 50256, and every special token of the multilingual one is 1 later.
    tokenizer, shift = AutoTokenizer.from_pretrained(tmp_path / "out"), int(multilingual)
    english = {"<|endoftext|>": 50256, "<|startoftranscript|>": 50257, "<|en|>": 50258, "<|su|>": 50356}
    english |= {"<|transcribe|>": 50358, "<|notimestamps|>": 50362, "<|0.00|>": 50363, "<|30.00|>": 51863}
    for token, index in english.items():
        assert tokenizer.convert_tokens_to_ids(token) == index + shift
    assert len(tokenizer) == original.config.vocab_size
    assert tokenizer.decode(tokenizer("héllo wörld").input_ids, skip_special_tokens=True) == "héllo wörld"
    generation = converted.generation_config
    assert (generation.eos_token_id, generation.decoder_start_token_id) == (50256 + shift, 50257 + shift)
    assert (generation.no_timestamps_token_id, generation.is_multilingual) == (50362 + shift, multilingual)


def test_bpe_merges_are_those_that_byte_pair_encoding_needs():
    vocabulary = [b"a", b"b", b"n", b"an", b"ban", b"ana", b"banana"]
    assert bpe_merges(vocabulary) == [("a", "n"), ("b", "an"), ("an", "a"), ("ban", "ana")]
    with pytest.raises(ValueError, match="not made of two earlier tokens"):
        bpe_merges([b"a", b"b", b"n", b"ban"])


def test_unusable_ggml_files_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="not a ggml file"):
        read_ggml_whisper(path)
    write_ggml(path, tiny_whisper(51864), multilingual=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="ends early"):
        read_ggml_whisper(path)
    write_ggml(path, tiny_whisper(51864), multilingual=False, ftype=2)
    with pytest.raises(ValueError, match="has ggml type 2"):
        read_ggml_whisper(path)
    write_ggml(path, tiny_whisper(51864), multilingual=False, left_out="model.decoder.layers.1.fc1.bias")
    with pytest.raises(ValueError, match=r"(?s)not a whole Whisper model.*decoder.layers.1.fc1.bias"):
        convert_whisper_ggml(path, tmp_path / "out")
