"""The published SALMONN systems at full size: to convert their checkpoints into, or to measure with random weights."""

from copy import deepcopy

from ..model.configuration_salmonn import SalmonnConfig

# Each from the config.json of the repository named, on https://huggingface.co.
WHISPER_LARGE_V2 = {  # openai/whisper-large-v2
    "model_type": "whisper",
    "vocab_size": 51865,
    "num_mel_bins": 80,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_layers": 32,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "bos_token_id": 50257,
    "eos_token_id": 50257,
    "pad_token_id": 50257,
    "decoder_start_token_id": 50258,
    "begin_suppress_tokens": [220, 50257],
}
WHISPER_LARGE_V3_TURBO = WHISPER_LARGE_V2 | {  # openai/whisper-large-v3-turbo
    "vocab_size": 51866,
    "num_mel_bins": 128,
    "decoder_layers": 4,
}
VICUNA_7B = {  # lmsys/vicuna-7b-v1.5, which the authors name as the language model of SALMONN-7B
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3_2_3B = {  # meta-llama/Llama-3.2-3B-Instruct
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
GEMMA_2_2B = {  # google/gemma-2-2b-it
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 107],
    "pad_token_id": 0,
}
QWEN_2_5_0_5B = {  # Qwen/Qwen2.5-0.5B-Instruct
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# What all have in common. The window Q-Former: https://arxiv.org/abs/2310.13289, section 4.1.
SALMONN = {
    "sound_config": {"model_type": "beats"},
    "projector_config": {
        "model_type": "salmonn_window_qformer",
        "qformer_config": {
            "hidden_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "cross_attention_frequency": 1,
        },
        "window_frames": 17,
        "window_stride": 17,
        "queries_per_window": 1,
        "pad_to_30_seconds": True,
    },
    "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
}
# The audio token is one that the tokenizer has and text does not use.
PUBLISHED_SYSTEMS = {
    "salmonn-7b": {"audio_config": WHISPER_LARGE_V2, "text_config": VICUNA_7B, "audio_token_id": 0},  # <unk>
    "nota": {
        "audio_config": WHISPER_LARGE_V2,
        "text_config": LLAMA_3_2_3B,
        "audio_token_id": 128002,  # <|reserved_special_token_0|>
    },
    "seed": {"audio_config": WHISPER_LARGE_V3_TURBO, "text_config": GEMMA_2_2B, "audio_token_id": 7},  # <unused0>
    "nlp-07": {
        "audio_config": WHISPER_LARGE_V3_TURBO,
        "text_config": QWEN_2_5_0_5B,
        "audio_token_id": 151662,  # <|fim_pad|>
    },
}


def published_config(name: str, **kwargs) -> SalmonnConfig:
    """
    The config of a published SALMONN system at full size. Nothing is fetched; `SalmonnForConditionalGeneration` makes
    the system of it, with random weights.

    All have SALMONN's Q-Former (two layers, one query per window of 17 frames or 0.34 s) over the features of Whisper
    and BEATs, pad every clip to 30 s, and have LoRA of rank 8 and α 32 in the language model's query and value
    projections.

    Args:
        name (`str`): `"salmonn-7b"` (Vicuna-7B v1.5, Whisper large-v2), `"nota"` (Llama-3.2-3B-Instruct, Whisper
            large-v2), `"seed"` (Gemma-2-2B-it, Whisper large-v3-turbo; its language model was quantised to 4 bits,
            here it is not) or `"nlp-07"` (Qwen2.5-0.5B-Instruct, Whisper large-v3-turbo; its sound encoder was
            CED-small, here it is BEATs, and its adapter's sizes are taken to be those of the others).
        kwargs: fields of [`SalmonnConfig`] to change; those of `projector_config` one by one, e.g.
            `projector_config={"pad_to_30_seconds": False}`.

    Raises:
        ValueError: if there is no system of this name; the message lists those there are.
    """
    if name not in PUBLISHED_SYSTEMS:
        raise ValueError(f"There is no published system '{name}'; choose one of {', '.join(PUBLISHED_SYSTEMS)}.")
    fields = deepcopy(SALMONN | PUBLISHED_SYSTEMS[name])
    fields["projector_config"] |= kwargs.pop("projector_config", {})
    return SalmonnConfig(**fields | kwargs)
