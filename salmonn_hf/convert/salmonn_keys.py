"""Names of tensors in original SALMONN checkpoints, and here."""

import re

# Original module name -> ours. The language model's and its projection's names vary, see `LANGUAGE_MODEL`.
MODULES = {
    "speech_query_tokens": "projector.query_tokens",
    "speech_Qformer.bert.embeddings.LayerNorm": "projector.qformer.layernorm",
    "speech_Qformer.bert.encoder": "projector.qformer.encoder",
    "ln_speech": "projector.audio_norm",
    "ln_audio": "projector.sound_norm",
    "speech_encoder": "audio_tower",
    "beats": "sound_tower",
}
LANGUAGE_MODEL = re.compile(r"^[a-z0-9]+_model\.(base_model\.model\.)?")
PROJECTION = re.compile(r"^speech_[a-z0-9]+_proj\.")


def from_original_key(key: str) -> str:
    """The name here of a tensor of an original checkpoint; a name that is not SALMONN's comes back unchanged."""
    if PROJECTION.match(key):
        return PROJECTION.sub("projector.proj.", key)
    if LANGUAGE_MODEL.match(key):
        return LANGUAGE_MODEL.sub("language_model.", key)
    for original, ours in MODULES.items():
        if key == original or key.startswith(f"{original}."):
            return re.sub(r"attention\.self\.", "attention.attention.", ours + key.removeprefix(original))
    return key


def to_original_key(key: str, text_config) -> str:
    """The inverse of `from_original_key`. Trainers for Gemma say `gemma` for the language model, others `llama`."""
    name = "gemma" if text_config.model_type.startswith("gemma") else "llama"
    if key.startswith("language_model."):
        return f"{name}_model.base_model.model.{key.removeprefix('language_model.')}"
    if key.startswith("projector.proj."):
        return f"speech_{name}_proj.{key.removeprefix('projector.proj.')}"
    for original, ours in MODULES.items():
        if key == ours or key.startswith(f"{ours}."):
            return original + re.sub(r"attention\.attention\.", "attention.self.", key.removeprefix(ours))
    return key
