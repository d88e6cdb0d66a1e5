"""Adapter checkpoints of this package to original SALMONN checkpoints."""

from pathlib import Path

from ..model.checkpoint import read_weights
from ..model.configuration_salmonn import SalmonnConfig
from .original_checkpoint import save_original_checkpoint
from .salmonn import ENCODER_FRAMES, ENCODER_SECONDS
from .salmonn_keys import to_original_key


def export_salmonn(directory: str | Path, out: str | Path) -> str:
    r"""
    Write a checkpoint directory of this package as an original SALMONN `.pth` file, in the tensors' own dtype, for the
    original's code. Language models other than Gemma go by the names of the Llama trainer.

    Args:
        directory: a local checkpoint directory; its base parts are not needed.
        out: the file to write.

    Returns:
        The report: what was left out, and how the original's result will differ.

    Raises:
        OSError: if the directory holds no whole checkpoint.
        ValueError: if the model has parts that the original does not know, naming their tensors; if `out` exists.
    """
    directory, out = Path(directory), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; name a new file, or remove it first.")
    config = SalmonnConfig.from_pretrained(directory)
    tensors, foreign, reported = {}, [], set()
    left_out = {
        "projector.ctc_head": "a training aid that the original does not have",
        "sound_tower": "the original reads BEATs from a file of its own",
        "language_model": "the original reads its language model from a directory of its own",
    }
    for key, tensor in read_weights(directory).items():
        part = next((name for name in left_out if key.startswith(f"{name}.")), None)
        if part is not None and ".lora_" not in key:
            reported.add(part)
        elif (original := to_original_key(key, config.text_config)) == key:
            foreign.append(key)
        else:
            tensors[original] = tensor
    if foreign:
        raise ValueError(f"The original has no place for {foreign}: {directory} cannot be written in its layout.")
    if not config.lora and "language_model" not in (config.base_parts or {}):
        raise ValueError(
            f"{directory} holds a language model of its own (LoRA merged?); export the adapter checkpoint."
        )
    report = [f"{directory} -> {out}", *(f"left out, {left_out[part]}: {part}" for part in sorted(reported))]
    projector = config.projector_config
    if not projector.pad_to_30_seconds:
        report.append("the original will pad every clip to 30 s and drop its last window; this model does not")

    settings = {
        "window_level_Qformer": True,
        "num_speech_query_token": projector.queries_per_window,
        "second_per_window": projector.window_frames * ENCODER_SECONDS / ENCODER_FRAMES,
        "second_stride": projector.window_stride * ENCODER_SECONDS / ENCODER_FRAMES,
        "qformer_heads": projector.qformer_config.num_attention_heads,
        "lora": config.lora is not None,
    }
    if lora := config.lora:
        settings |= {"lora_rank": lora["r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": lora["lora_dropout"]}
    save_original_checkpoint({"model": tensors, "config": {"model": settings}, "epoch": 0}, out)
    return "\n".join([*report, f"written: {len(tensors)} tensors"])
