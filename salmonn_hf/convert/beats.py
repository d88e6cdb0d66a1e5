"""Checkpoints of the original BEATs (github.com/microsoft/unilm, beats) to transformers' layout, and back."""

import json
import re
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..model.configuration_beats import BeatsConfig
from ..model.feature_extraction_beats import BeatsFeatureExtractor
from ..model.modeling_beats import BeatsForAudioClassification, BeatsModel
from .original_checkpoint import (
    check_is_free,
    check_tensors,
    load_original_checkpoint,
    save_original_checkpoint,
    written_whole,
)

# "settings": entries of the original's `cfg`, their names in BeatsConfig, and their values where `cfg` lacks them.
# "activations": the original's "glu" halves what it projects to; no published model has it.
# "tensors", "layer_tensors": beginnings of names, the original's and ours.
NAMES = json.loads(Path(__file__).with_name("beats_names.json").read_text())
SETTINGS, ACTIVATIONS = NAMES["settings"], NAMES["activations"]
LAYER, OUR_LAYER = "encoder.layers.", "layers."
SHARED_BIAS = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight")
SHARED_BIAS_KEY = "encoder.layers.{}.self_attn.relative_attention_bias.weight"


def renamed(key: str, names: list[tuple[str, str]]) -> str | None:
    """`key` with the first prefix of `names` that it has replaced; `None` if it has none of them."""
    return next((new + key.removeprefix(prefix) for prefix, new in names if key.startswith(prefix)), None)


def from_original_key(key: str) -> str | None:
    """The name of an original BEATs tensor in `BeatsModel` (the classifier's is its own); `None` if it has none."""
    name = renamed(key, NAMES["tensors"].items())
    if name is None and key.startswith(LAYER):
        index, _, rest = key.removeprefix(LAYER).partition(".")
        name = renamed(rest, NAMES["layer_tensors"].items())
        name = None if name is None else f"{OUR_LAYER}{index}.{name}"
    return name


def to_original_key(key: str) -> str:
    """The inverse of `from_original_key`, for a tensor of `BeatsModel` or `BeatsForAudioClassification`."""
    key = key.removeprefix("beats.")
    if key.startswith(OUR_LAYER):
        index, _, rest = key.removeprefix(OUR_LAYER).partition(".")
        return f"{LAYER}{index}.{renamed(rest, [(ours, theirs) for theirs, ours in NAMES['layer_tensors'].items()])}"
    return renamed(key, [(ours, theirs) for theirs, ours in NAMES["tensors"].items()])


def config_from_original(cfg: dict, label_dict: dict | None = None) -> BeatsConfig:
    r"""
    Args:
        cfg (`dict`): the entry `cfg` of an original checkpoint. Entries that the original never reads are left out.
        label_dict (`dict`, *optional*): class number to label, of a fine-tuned checkpoint.

    Raises:
        ValueError: for a setting that is missing, not supported, or does not fit the others, naming it.
    """
    settings = {name: cfg.get(key, default) for key, (name, default) in SETTINGS.items()}
    if settings["patch_size"] is None:
        raise ValueError("cfg has no input_patch_size (16 in the published models).")
    activation = settings["hidden_act"]
    if activation not in list(ACTIVATIONS):
        raise ValueError(f"cfg['activation_fn'] is {activation!r}; supported are {', '.join(ACTIVATIONS)}.")
    settings["hidden_act"] = ACTIVATIONS[activation]
    finetuned = cfg.get("finetuned_model", False)
    num_labels = settings.pop("num_labels")
    if not finetuned and "predictor_class" not in cfg:
        num_labels = 2  # transformers' default, which a config.json need not spell out
    if label_dict is not None:
        if sorted(label_dict) != list(range(num_labels)):
            raise ValueError(
                f"label_dict has {len(label_dict)} entries; cfg['predictor_class'] asks for 0 to {num_labels - 1}."
            )
        labels = {index: label_dict[index] for index in range(num_labels)}
        settings |= {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    else:
        settings["num_labels"] = num_labels
    try:
        return BeatsConfig(
            **settings,
            problem_type="multi_label_classification" if finetuned else None,
            architectures=["BeatsForAudioClassification" if finetuned else "BeatsModel"],
        )
    except StrictDataclassError as error:
        raise ValueError(f"cfg holds a value of the wrong type: {error}") from error


def original_cfg(config: BeatsConfig) -> dict:
    """The inverse of `config_from_original`: every setting of the original, spelt out."""
    cfg = {key: getattr(config, name) for key, (name, _) in SETTINGS.items()}
    cfg["activation_fn"] = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.hidden_act)
    return cfg | {"finetuned_model": is_finetuned(config)}


def is_finetuned(config: BeatsConfig) -> bool:
    return "BeatsForAudioClassification" in (config.architectures or [])


def read_beats_checkpoint(path: str | Path) -> tuple[BeatsConfig, dict[str, torch.Tensor]]:
    r"""
    Read an original BEATs checkpoint, `{"cfg", "model"}` with `"label_dict"` where it is fine-tuned.

    Returns:
        The config, and the tensors under the keys of [`BeatsModel`]; of a fine-tuned checkpoint under those of
        [`BeatsForAudioClassification`] (see `encoder_tensors`). `config.architectures` tells which.

    Raises:
        OSError: if there is no such file, or it is cut short or no torch file.
        ValueError: if the file holds code; for a setting that is missing, not supported or does not fit; for tensors
            that are missing, left over or of the wrong shape, naming them.
    """
    config, tensors, _ = read_with_report(path)
    return config, tensors


def encoder_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `read_beats_checkpoint` gave, under the keys of `BeatsModel` also where it is fine-tuned."""
    return {key.removeprefix("beats."): value for key, value in tensors.items() if not key.startswith("classifier.")}


def model_class(config: BeatsConfig) -> type[BeatsModel | BeatsForAudioClassification]:
    return BeatsForAudioClassification if is_finetuned(config) else BeatsModel


def read_with_report(path: str | Path) -> tuple[BeatsConfig, dict[str, torch.Tensor], list[str]]:
    """As `read_beats_checkpoint`, and a line for each thing of the checkpoint that is not taken over."""
    checkpoint = load_original_checkpoint(path)
    for entry in ("cfg", "model"):
        if not isinstance(checkpoint.get(entry), dict):
            raise ValueError(
                f"{path} has no dict '{entry}', so is not a BEATs checkpoint; it holds {sorted(map(str, checkpoint))}."
            )
    cfg, originals = checkpoint["cfg"], checkpoint["model"]
    try:
        config = config_from_original(cfg, checkpoint.get("label_dict"))
    except ValueError as error:
        raise ValueError(f"{path}: {error} The file is damaged, or not a BEATs encoder.") from error
    unread = sorted(map(str, set(cfg) - set(SETTINGS) - {"finetuned_model"}))
    report = [f"left out, BEATs has no such setting: cfg[{key!r}] = {cfg[key]!r}" for key in unread]

    prefix = "beats." if is_finetuned(config) else ""
    tensors, left_over = {}, []
    for key, tensor in originals.items():
        name = from_original_key(key)
        layer = SHARED_BIAS.fullmatch(key)
        if layer is not None and layer[1] != "0":
            # One table serves all layers; torch.save writes it once more for each.
            first = originals.get(SHARED_BIAS_KEY.format(0))
            if first is None or not torch.equal(tensor, first):
                raise ValueError(f"{path}: {key} differs from layer 0's, but BEATs has one table for all layers.")
            report.append(f"left out, the same as layer 0's: {key}")
        elif name is None or not isinstance(tensor, torch.Tensor):
            left_over.append(key)
        else:
            tensors[name if name.startswith("classifier.") else prefix + name] = tensor
    with torch.device("meta"):
        expected = model_class(config)(config).state_dict()
    check_tensors(tensors, expected, to_original_key, path, "its cfg", left_over)
    return config, {key: tensors[key] for key in expected}, report


def convert_beats(source: str | Path, out: str | Path) -> str:
    r"""
    Write an original BEATs checkpoint as a directory that `AutoModel.from_pretrained` loads, and of a fine-tuned one
    also `AutoModelForAudioClassification` and `pipeline("audio-classification")`.

    Args:
        source: the `.pt` file.
        out: the directory to write; made if missing.

    Returns:
        The report: sizes, and everything in the checkpoint that was not taken over, with the reason.

    Raises:
        OSError, ValueError: as `read_beats_checkpoint`; also if `out` is not empty. Nothing is left half-written.
    """
    out = Path(out)
    check_is_free(out)
    config, tensors, report = read_with_report(source)
    with torch.device("meta"):
        model = model_class(config)(config)
    model.load_state_dict(tensors, assign=True)
    with written_whole(out) as directory:
        model.save_pretrained(directory)
        BeatsFeatureExtractor().save_pretrained(directory)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    labels = f", {config.num_labels} labels" if is_finetuned(config) else ""
    return "\n".join([f"{source} -> {out}: {len(tensors)} tensors, {parameters:,} parameters{labels}", *report])


def export_beats(directory: str | Path, out: str | Path):
    r"""
    The inverse of `convert_beats`: write a model as a checkpoint that the original implementation loads.

    Args:
        directory: what `save_pretrained` wrote, of a `BeatsModel` or a `BeatsForAudioClassification`.
        out: the `.pt` file to write.

    Raises:
        OSError: if the directory holds no whole model.
        ValueError: if it holds another model, lacks tensors, or has settings that the original does not know.
    """
    config = AutoConfig.from_pretrained(directory)
    if not isinstance(config, BeatsConfig):
        raise ValueError(f"{directory} holds a '{config.model_type}' model; only BEATs has BEATs' original layout.")
    if config.hidden_act not in ACTIVATIONS.values():
        raise ValueError(f"The original has no activation {config.hidden_act!r}, only {', '.join(ACTIVATIONS)}.")
    model, loading = model_class(config).from_pretrained(directory, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(f"{directory} lacks the tensors {sorted(loading['missing_keys'])[:5]}; save the model again.")
    tensors = {to_original_key(key): tensor for key, tensor in model.state_dict().items()}
    if config.relative_position_bias:
        table = tensors[SHARED_BIAS_KEY.format(0)]
        tensors |= {SHARED_BIAS_KEY.format(layer): table for layer in range(1, config.num_hidden_layers)}
    checkpoint = {"cfg": original_cfg(config), "model": tensors}
    if is_finetuned(config):
        checkpoint["label_dict"] = dict(config.id2label)
    save_original_checkpoint(checkpoint, out)
