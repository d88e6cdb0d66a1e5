"""Tiny models of random weights: the package's own code is tested on these, in seconds, without a download."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test but the marked ones may reach for a hub

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, WhisperConfig

import salmonn_hf
from salmonn_hf import SalmonnConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
ENCODER_LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "out_proj", "fc1"]}
LANGUAGE_MODELS = ("llama", "gemma2", "qwen2", "gpt_neox")


def golden_path(name: str) -> Path:
    """A file of the original implementations' weights or numbers; skips where the clone does not hold it."""
    for directory in (ROOT / "tests" / "golden", SHARED / "golden"):
        if (directory / name).exists():
            return directory / name
    pytest.skip(f"{name} is in the full set of golden numbers alone: this check needs ../shared/golden")


def tiny_text_config(model_type="llama", **kwargs):
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if model_type == "gpt_neox":  # no grouped queries
        del sizes["num_key_value_heads"], sizes["head_dim"]
    return AutoConfig.for_model(model_type, **sizes | kwargs)


def tiny_config(model_type="llama", text_config=None, **kwargs):
    """
    `kwargs` are fields of the config or of its projector; with `num_layers` that is Whisper's decoder layers, with
    `num_end_frames` Whisper's whole decoder.
    """
    audio_config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=100,
        num_mel_bins=80,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    window_qformer = {
        "qformer_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "cross_attention_frequency": 1,
        },
        "window_frames": 8,
        "window_stride": 8,
        "queries_per_window": 2,
        "window_position_embeddings": True,
        "output_norm": True,
    }
    whisper_projector = {
        "model_type": "salmonn_whisper_projector",
        "window_frames": 4,
        "window_context": 6,
        "frame_mlp_size": 16,
        "ctc_vocab_size": 7,
    }
    whisper_decoder_projector = {
        "model_type": "salmonn_whisper_decoder_projector",
        "prompt_ids": [91, 92],
        "end_id": 90,
        "no_speech_id": 99,
        "banned_ids": [7, 95],
        "banned_first_ids": [8, 90],
    }
    of_projector = {name: kwargs.pop(name) for name in list(kwargs) if name not in SalmonnConfig.__dataclass_fields__}
    projector = whisper_projector if "num_layers" in of_projector else window_qformer
    projector = whisper_decoder_projector if "num_end_frames" in of_projector else projector
    settings = {
        "audio_config": audio_config,
        "projector_config": projector | of_projector,
        "text_config": text_config or tiny_text_config(model_type),
        "audio_token_id": 3,
    }
    return SalmonnConfig(**settings | kwargs)


def randomise(model, seed=0):
    """Weights large enough for every part to change the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def tiny_tokenizer():
    """Bytes as tokens, with ChatML's special tokens and one for audio."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>", "<|audio|>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|audio|>"],
        chat_template=(
            "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
            "{{ '<|im_end|>\n' }}{%- endfor -%}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
        ),
    )


def tiny_processor(config=None):
    config = (config or tiny_config()).projector_config
    return salmonn_hf.SalmonnProcessor(
        salmonn_hf.SalmonnFeatureExtractor(),
        tiny_tokenizer(),
        window_frames=config.window_frames,
        window_stride=config.window_stride,
        queries_per_window=config.queries_per_window,
    )


def tiny_model(config=None, seed=0):
    torch.manual_seed(seed)
    return randomise(salmonn_hf.SalmonnForConditionalGeneration(config or tiny_config()).eval(), seed)


def randomise_lora(model, adapter="", seed=0):
    """Weights of LoRA large enough to change the output visibly, B too; of one adapter alone, or of all."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{adapter}" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def noise(seconds, seed=0):
    """A clip of noise with a slow swell, float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    samples = int(seconds * 16000)
    swell = 0.1 + 0.1 * np.sin(np.linspace(0, 3 * seconds, samples))
    return (rng.standard_normal(samples) * swell).astype(np.float32)


def background(kind, seconds, dbfs, rng):
    """Noise of one of four colours, mains hum, or chords: what has no words."""
    times = np.arange(int(seconds * 16000)) / 16000
    if kind == "hum":
        waveform = sum(np.sin(2 * np.pi * 50 * k * times + rng.uniform(0, 6)) / k for k in range(1, 9))
    elif kind == "chords":
        root = rng.uniform(110, 440) * 2 ** (np.floor(times) / 12)
        tones = [ratio * k for ratio in (1, 1.25, 1.5) for k in range(1, 5)]
        waveform = sum(np.sin(2 * np.pi * np.cumsum(root * tone) / 16000) / tone for tone in tones)
    else:
        power = {"white": 0, "pink": 1, "brown": 2, "blue": -1}[kind]
        frequencies = np.maximum(np.fft.rfftfreq(len(times), 1 / 16000), 20)
        waveform = np.fft.irfft(np.fft.rfft(rng.standard_normal(len(times))) / frequencies ** (power / 2), len(times))
    return (waveform / waveform.std() * 10 ** (dbfs / 20)).astype(np.float32)


def efficiency_result(model, **systems):
    """An `efficiency.json` with chosen (bytes, TTFT, TPOT) of each system: as much of one as is read of it."""
    return {
        "settings": {"model": model, "rounds": 20},
        "machine": {"device": "cpu", "threads": 2},
        "systems": {
            name: {
                "dtype": "torch.bfloat16",
                "audio_tokens": 50,
                "peak_memory": memory,
                "protocol": {
                    "seconds_of_audio": 10.0,
                    "ttft": {"p50": ttft},
                    "ttft_by_part": {"whisper": ttft / 2, "prefill": ttft / 2},
                    "tpot": {"p50": tpot},
                },
            }
            for name, (memory, ttft, tpot) in systems.items()
        },
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A directory with a tiny random model and its processor, as save_pretrained writes them."""
    directory = tmp_path_factory.mktemp("tiny-salmonn")
    tiny_model().save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


@pytest.fixture
def lora_model():
    """With LoRA in its language model that changes the output."""
    return randomise_lora(tiny_model(tiny_config(lora=LORA)))


@pytest.fixture
def lora_in_both(lora_model):
    """With LoRA in its speech encoder, too, of another rank."""
    lora_model.add_lora(ENCODER_LORA, "audio_tower")
    return randomise_lora(lora_model)


@pytest.fixture(scope="module")
def online():
    """Base parts may be fetched from a hub, too."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield


@pytest.fixture(scope="session")
def shared_data():
    """Recordings that ship beside the repository, not in it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared recordings are not here: this check needs ../shared/data")
    return SHARED / "data"
