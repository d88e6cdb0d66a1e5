"""Checkpoints of salmonn_hf 0.1.0, adapter, merged or quantised, to the layout of today."""

import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ..model.configuration_salmonn import SalmonnConfig
from ..model.configuration_whisper_projector import WhisperProjectorConfig
from ..model.configuration_window_qformer import WindowQFormerConfig
from ..model.quantizer_salmonn import SalmonnQuantizationConfig
from ..model.remote_code import save_code
from .original_checkpoint import check_is_free

# Fields of the old config that are the projector's now, under another name there.
RENAMED_FIELDS = {"projector_norm": "output_norm", "speech_decoder_layers": "num_layers"}
# Modules that are the projector's now, beside what was called the connector.
MODULES = ("audio_norm.", "sound_norm.", "sound_summary.", "speech_tokens.", "ctc_head.")


def migrate_key(key: str) -> str:
    """The name today of a tensor of an old checkpoint."""
    return f"projector.{key}" if key.startswith(MODULES) else re.sub(r"^connector\.", "projector.", key)


def migrate_config(old: dict) -> dict:
    """The `config.json` of an old checkpoint as fields of today's [`SalmonnConfig`]."""
    config = {name: value for name, value in old.items() if name in SalmonnConfig.__dataclass_fields__}
    projector_class = WhisperProjectorConfig if old.get("speech_decoder_layers") else WindowQFormerConfig
    fields = {RENAMED_FIELDS.get(name, name): value for name, value in old.items()}
    own_fields = projector_class.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    projector = {name: value for name, value in fields.items() if name in own_fields}
    projector["model_type"] = projector_class.model_type
    if old.get("speech_decoder_layers"):
        projector["dropout"] = old["qformer_config"].get("hidden_dropout_prob", 0.1)
    projector["dtype"] = old.get("dtype")
    config["projector_config"] = projector
    if base_parts := old.get("base_parts"):
        config["base_parts"] = {migrate_key(f"{part}.")[:-1]: name for part, name in base_parts.items()}
    if old.get("quantization"):
        parts = {migrate_key(f"{part}.")[:-1]: settings for part, settings in old["quantization"].items()}
        if old.get("sound_summary_size") and "projector" in parts:
            # The connector had no summary in it; the projector has.
            parts |= dict.fromkeys(("projector.frame_mlp", "projector.layers"), parts.pop("projector"))
        config["quantization_config"] = SalmonnQuantizationConfig(parts, old.get("quantization_config"))
    return config


def migrate(source: str | Path, out: str | Path) -> str:
    r"""
    Write a checkpoint directory of salmonn_hf 0.1.0 as one that loads today. Tensors are the same, to the bit.

    Args:
        source: the old directory.
        out: the new one; made if missing.

    Returns:
        The report.

    Raises:
        ValueError: if `source` is not of that version, or `out` is not empty.
    """
    source, out = Path(source), Path(out)
    old = json.loads((source / "config.json").read_text())
    if old.get("model_type") != "salmonn" or "qformer_config" not in old:
        raise ValueError(f"{source} is no SALMONN checkpoint of salmonn_hf 0.1.0; others need no migration.")
    check_is_free(out)
    config = SalmonnConfig(**migrate_config(old))
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                renamed = {migrate_key(key): tensors.get_tensor(key) for key in tensors.keys()}
                save_file(renamed, out / file.name, metadata=tensors.metadata())
        elif file.name == "model.safetensors.index.json":
            index = json.loads(file.read_text())
            index["weight_map"] = {migrate_key(key): shard for key, shard in index["weight_map"].items()}
            (out / file.name).write_text(json.dumps(index, indent=2))
        elif file.suffix != ".py" and file.name != "config.json" and file.is_file():
            shutil.copy(file, out)
    for name in ("architectures", "auto_map"):
        setattr(config, name, old.get(name))
    config.save_pretrained(out)
    save_code(out)
    return f"{source} -> {out}"
