"""Adapter checkpoints: what was trained goes to the file, the frozen base parts are named and fetched at loading."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, WhisperConfig
from transformers.utils import cached_file

from .base_part_resolver import resolve_base_part
from .quantized_layers import QuantizedMatrix

# Where checkpoints keep the encoder, with and without a head.
ENCODER_PREFIXES = {
    "audio_tower": ("model.encoder.", "encoder."),
    "sound_tower": ("beats.",),
    "speech_tokens": ("model.decoder.embed_tokens.", "decoder.embed_tokens."),
}


def is_base_key(key: str, config) -> bool:
    """Whether a state-dict key belongs to a frozen base part; LoRA weights inside one do not."""
    return key.split(".")[0] in (config.base_parts or {}) and ".lora_" not in key


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
    Whether each safetensors file of a directory is as long as its header says.

    Raises:
        OSError: for a file that was cut off, naming it and the tensors that are not whole.
    """
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                raise OSError(f"{path} is not a whole safetensors file: it ends within its header. Save it again.")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        cut_off = sorted(name for name, entry in header.items() if 8 + length + entry["data_offsets"][1] > size)
        if cut_off:
            raise OSError(
                f"{path} is not a whole safetensors file: {cut_off[0]} and {len(cut_off) - 1} others are cut off. "
                "Fetch or save it again."
            )


def check_loaded(name_or_path: str, report: dict):
    """
    Refuse a full checkpoint that `from_pretrained` would complete with random weights.

    Raises:
        ValueError: naming the tensors that the files lack.
    """
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name_or_path} lacks {missing[0]} and {len(missing) - 1} other tensors of its config. Fetch or save it "
            "again."
        )


def part_keys(part: str, state_dict: dict) -> dict[str, torch.Tensor]:
    """A base part's own tensors under the names that they have inside SALMONN (before LoRA)."""
    for prefix in ENCODER_PREFIXES.get(part, ()):
        if any(key.startswith(prefix) for key in state_dict):
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            break
    return {f"{part}.{key}": value for key, value in state_dict.items()}


def base_state_dict(config) -> dict[str, torch.Tensor]:
    """
    The tensors of `config.base_parts`, under the keys of `SalmonnModel`; matrices of `config.quantization` rounded to
    their nearest values, the same whenever they are loaded.

    Raises:
        BasePartNotFoundError: if a part cannot be had.
        ValueError: if a part's tensors have other shapes than the config says, naming both.
    """
    from .modeling_salmonn import SalmonnForConditionalGeneration

    with torch.device("meta"):
        model = SalmonnForConditionalGeneration(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    matrices = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedMatrix)}
    shapes |= {key: (matrix.rows, matrix.columns) for key, matrix in matrices.items()}
    # LoRA moves a Linear's weight to `base_layer`.
    renamed = {key.replace(".base_layer.", "."): key for key in shapes}
    state_dict = {}
    for part, name in config.base_parts.items():
        for key, value in part_keys(part, read_weights(resolve_base_part(name))).items():
            key = renamed.get(key, key)
            if key in shapes and shapes[key] != tuple(value.shape):
                raise ValueError(
                    f"Base part '{name}' does not fit: its {key} has shape {tuple(value.shape)}, the checkpoint was "
                    f"made with {shapes[key]}."
                )
            if key in matrices:
                rounded = QuantizedMatrix(*shapes[key], matrices[key].bits, matrices[key].group_size).quantize(value)
                state_dict |= rounded.state_dict(prefix=key.removesuffix("weight"))
            else:
                state_dict[key] = value
    return state_dict


def adapter_state_dict(name_or_path: str, config, **hub_kwargs) -> dict[str, torch.Tensor]:
    """
    The trained tensors of an adapter checkpoint, all of which must be there.

    Raises:
        OSError: if the file is missing or not a whole safetensors file.
        ValueError: if tensors are missing or left over, naming them.
    """
    from .modeling_salmonn import SalmonnForConditionalGeneration

    file = cached_file(name_or_path, "model.safetensors", **hub_kwargs)
    try:
        state_dict = load_file(file)
    except Exception as error:
        raise OSError(f"{file} is not a whole safetensors file ({error}); fetch or save it again.") from error
    with torch.device("meta"):
        expected = {k for k in SalmonnForConditionalGeneration(config).state_dict() if not is_base_key(k, config)}
    missing, left_over = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or left_over:
        raise ValueError(f"{file} does not fit its config: missing {missing[:5]}, left over {left_over[:5]}.")
    return state_dict


def config_from_base_parts(audio_tower: str, language_model: str, sound_tower: str | None = None, **kwargs):
    """
    A `SalmonnConfig` around its base parts, e.g. `config_from_base_parts("openai/whisper-base.en",
    "HuggingFaceTB/SmolLM2-135M-Instruct", window_frames=17, ...)`; `sound_tower` is the directory of a converted
    BEATs. The Q-Former's encoder width is filled in.
    """
    from .configuration_salmonn import SalmonnConfig

    audio_config = WhisperConfig.from_pretrained(resolve_base_part(audio_tower))
    text_config = AutoConfig.from_pretrained(resolve_base_part(language_model))
    text_config.name_or_path = language_model  # not the directory on this machine
    base_parts = {"audio_tower": audio_tower, "language_model": language_model}
    sound_width, sound_config = 0, None
    if sound_tower is not None:
        sound_config = AutoConfig.from_pretrained(resolve_base_part(sound_tower))
        sound_width = sound_config.hidden_size
        base_parts["sound_tower"] = sound_tower
    elif kwargs.get("sound_layers") is not None:
        sound_width = audio_config.d_model
    width = audio_config.d_model + sound_width
    if kwargs.get("speech_decoder_layers"):
        width = audio_config.d_model  # sounds go past those layers, see SalmonnSoundSummary
        base_parts["speech_tokens"] = audio_tower
    qformer_config = {"num_hidden_layers": 2, "cross_attention_frequency": 1, "encoder_hidden_size": width}
    qformer_config |= kwargs.pop("qformer_config", {})
    return SalmonnConfig(
        audio_config=audio_config,
        sound_config=sound_config,
        text_config=text_config,
        qformer_config=qformer_config,
        base_parts=base_parts,
        **kwargs,
    )


def from_base_parts(config, **kwargs):
    """A model of `config`: base parts loaded, everything else freshly initialised (see `SalmonnConfig.base_parts`)."""
    from .modeling_salmonn import SalmonnForConditionalGeneration

    return SalmonnForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=base_state_dict(config), **kwargs
    )
