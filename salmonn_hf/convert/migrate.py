"""Checkpoints of salmonn_hf 0.1.0, adapter, merged or quantised, to the layout of today."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ..model.configuration_salmonn import SalmonnConfig
from ..model.quantizer_salmonn import SalmonnQuantizationConfig
from ..model.remote_code import save_code

# Fields of the old config that are the window Q-Former's now, under their names there.
QFORMER_FIELDS = {
    "qformer_config": "qformer_config",
    "window_frames": "window_frames",
    "window_stride": "window_stride",
    "queries_per_window": "queries_per_window",
    "pad_to_30_seconds": "pad_to_30_seconds",
    "window_position_embeddings": "window_position_embeddings",
    "frame_mlp_size": "frame_mlp_size",
    "projector_norm": "output_norm",
    "ctc_vocab_size": "ctc_vocab_size",
    "ctc_merges": "ctc_merges",
}
# And those of the projector made of Whisper's decoder layers.
WHISPER_FIELDS = {
    "speech_decoder_layers": "num_layers",
    "window_frames": "window_frames",
    "window_context": "window_context",
    "window_reach": "window_reach",
    "merged_windows": "merged_windows",
    "frame_mlp_size": "frame_mlp_size",
    "ctc_vocab_size": "ctc_vocab_size",
    "ctc_trained_size": "ctc_trained_size",
    "ctc_merges": "ctc_merges",
    "sound_summary_size": "sound_summary_size",
    "sound_kinds": "sound_kinds",
    "sound_name_size": "sound_name_size",
}
MODULES = {
    "connector.": "projector.",
    "audio_norm.": "projector.audio_norm.",
    "sound_norm.": "projector.sound_norm.",
    "sound_summary.": "projector.sound_summary.",
    "speech_tokens.": "projector.speech_tokens.",
    "ctc_head.": "projector.ctc_head.",
}


def migrate_key(key: str) -> str:
    """The name today of a tensor of an old checkpoint."""
    for old, new in MODULES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def migrate_config(old: dict) -> dict:
    """The `config.json` of an old checkpoint as fields of today's [`SalmonnConfig`]."""
    config = {name: value for name, value in old.items() if name in SalmonnConfig.__dataclass_fields__}
    if old.get("speech_decoder_layers"):
        fields, projector = WHISPER_FIELDS, {"model_type": "salmonn_whisper_projector"}
        projector["dropout"] = old["qformer_config"].get("hidden_dropout_prob", 0.1)
    else:
        fields, projector = QFORMER_FIELDS, {"model_type": "salmonn_window_qformer"}
    projector |= {new: old[name] for name, new in fields.items() if name in old}
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new directory, or remove it first.")
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
