"""Adapter checkpoints: the file holds what was trained; the frozen base parts are named, and fetched at loading."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, WhisperConfig
from transformers.utils import cached_file

from .base_part_resolver import resolve_base_part
from .configuration_salmonn import SalmonnConfig
from .quantized_layers import QuantizedMatrix

# The names that an encoder's weights may have in a checkpoint of its own, with and without a head.
ENCODER_PREFIXES = {"audio_tower": ("model.encoder.", "encoder."), "sound_tower": ("beats.",)}


def is_base_key(key: str, config) -> bool:
    """Whether a state-dict key belongs to a frozen base part; LoRA weights inside one do not."""
    return key.startswith(tuple(f"{part}." for part in config.base_parts or {})) and ".lora_" not in key


def without_base_parts(state_dict: dict, config) -> dict:
    """The entries of `state_dict` that an adapter checkpoint holds; all of them if the config names no base parts."""
    return {key: value for key, value in state_dict.items() if not is_base_key(key, config)}


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's weight file or shards, memory-mapped."""
    if files := sorted(directory.glob("model*.safetensors")):
        return {key: value for file in files for key, value in load_file(file).items()}
    files = sorted(directory.glob("pytorch_model*.bin"))  # Vicuna, SALMONN's own language model, comes as these alone
    if not files:
        raise OSError(f"{directory} holds no model*.safetensors; save the part there with save_pretrained.")
    shards = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    return {key: value for shard in shards for key, value in shard.items()}


def check_weight_files(directory: str | Path):
    """
    Raises:
        OSError: for a safetensors file of a directory that was cut off, naming it.
    """
    for path in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{path} is not a complete safetensors file ({error}). Fetch or save it again.") from error


def check_loaded(name_or_path: str, report: dict):
    """
    Raises:
        ValueError: naming what the files of a full checkpoint lack, which `from_pretrained` would fill at random.
    """
    if missing := sorted(report["missing_keys"]):
        lacking = f"{missing[0]} and {len(missing) - 1} other tensors of its config"
        raise ValueError(f"{name_or_path} lacks {lacking}. Fetch or save it again.")


def part_keys(part: str, state_dict: dict, prefixes: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """A base part's own tensors under the names that they have inside SALMONN (before LoRA)."""
    for prefix in ENCODER_PREFIXES.get(part, ()) if prefixes is None else prefixes:
        if any(key.startswith(prefix) for key in state_dict):
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            break
    return {f"{part}.{key}": value for key, value in state_dict.items()}


def quantized_matrices(model) -> dict[str, QuantizedMatrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}


def round_matrices(state_dict: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """Tensors in floating point, with the matrices that are quantised in `model` rounded to their nearest values."""
    for name, matrix in quantized_matrices(model).items():
        if f"{name}.weight" in state_dict:
            rounded = QuantizedMatrix(matrix.rows, matrix.columns, matrix.bits, matrix.group_size)
            rounded.quantize(state_dict[f"{name}.weight"])
            state_dict |= rounded.state_dict(prefix=f"{name}.")
    return state_dict


def base_state_dict(model, **hub_kwargs) -> dict[str, torch.Tensor]:
    """
    The tensors of `model.config.base_parts`, under the keys of `SalmonnModel`; matrices of `config.quantized_parts`
    rounded to their nearest values, the same whenever they are loaded.

    Args:
        model (`SalmonnModel`): of the same config, on the meta device: the shapes that the tensors must have.
        hub_kwargs: `token`, `cache_dir` and `local_files_only`, as for [`resolve_base_part`].

    Raises:
        OSError: if a part cannot be had.
        ValueError: if a part's tensors have other shapes than the config says, naming both.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes |= {f"{name}.weight": (matrix.rows, matrix.columns) for name, matrix in quantized_matrices(model).items()}
    # LoRA moves a Linear's weight to `base_layer`.
    renamed = {key.replace(".base_layer.", "."): key for key in shapes}
    of_projector = {f"projector.{name}": prefixes for name, prefixes in model.projector.base_part_prefixes.items()}
    state_dict = {}
    for part, name in model.config.base_parts.items():
        weights = read_weights(resolve_base_part(name, **hub_kwargs))
        for key, value in part_keys(part, weights, of_projector.get(part)).items():
            key = renamed.get(key, key)
            if key in shapes and shapes[key] != tuple(value.shape):
                raise ValueError(
                    f"Base part '{name}' does not fit: its {key} has shape {tuple(value.shape)}, the checkpoint was "
                    f"made with {shapes[key]}."
                )
            state_dict[key] = value
    return round_matrices(state_dict, model)


def checkpoint_weights(name_or_path: str, variant: str | None = None, **hub_kwargs) -> dict[str, torch.Tensor]:
    """
    All tensors in the safetensors file of a checkpoint, or in its shards.

    Raises:
        OSError: if a file is missing or not a complete safetensors file.
    """
    suffix = f".{variant}" if variant else ""
    try:
        files = [cached_file(name_or_path, f"model{suffix}.safetensors", **hub_kwargs)]
    except OSError as missing:
        try:
            index = cached_file(name_or_path, f"model.safetensors.index{suffix}.json", **hub_kwargs)
        except OSError:
            raise missing from None
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        files = [cached_file(name_or_path, shard, **hub_kwargs) for shard in shards]
    state_dict = {}
    for file in files:
        try:
            state_dict |= load_file(file)
        except Exception as error:
            raise OSError(f"{file} is not a complete safetensors file ({error}). Fetch or save it again.") from error
    return state_dict


def adapter_state_dict(name_or_path: str, model, **file_kwargs) -> dict[str, torch.Tensor]:
    """
    The trained tensors of an adapter checkpoint for `model`, all of which must be there.

    Args:
        file_kwargs: as for [`checkpoint_weights`].

    Raises:
        OSError: if a file is missing or not a complete safetensors file.
        ValueError: if tensors are missing or left over, naming them.
    """
    state_dict = checkpoint_weights(name_or_path, **file_kwargs)
    tied = model.all_tied_weights_keys  # a head that is the embeddings is not in the file
    expected = {key for key in model.state_dict() if not is_base_key(key, model.config) and key not in tied}
    missing, left_over = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or left_over:
        raise ValueError(
            f"The weights of {name_or_path} do not fit its config: missing {missing[:5]}, left over {left_over[:5]}."
        )
    return state_dict


def config_from_base_parts(
    audio_tower: str, language_model: str, projector_config=None, sound_tower: str | None = None, **kwargs
):
    """
    A `SalmonnConfig` around its base parts, e.g. `config_from_base_parts("openai/whisper-base.en",
    "HuggingFaceTB/SmolLM2-135M-Instruct", {"window_frames": 17}, ...)`; `sound_tower` is the directory of a converted
    BEATs.
    """
    audio_config = WhisperConfig.from_pretrained(resolve_base_part(audio_tower))
    text_config = AutoConfig.from_pretrained(resolve_base_part(language_model))
    text_config.name_or_path = language_model  # not the directory on this machine
    base_parts = {"audio_tower": audio_tower, "language_model": language_model}
    sound_config = None
    if sound_tower is not None:
        sound_config = AutoConfig.from_pretrained(resolve_base_part(sound_tower))
        base_parts["sound_tower"] = sound_tower
    parts = {"audio_config": audio_config, "sound_config": sound_config, "text_config": text_config}
    config = SalmonnConfig(**parts, projector_config=projector_config, **kwargs)
    base_parts |= {f"projector.{name}": audio_tower for name in config.projector_config.base_parts}
    config.base_parts = base_parts
    return config
