"""Model cards, made from a checkpoint, its recipe, the state of its training and the results of its evaluation."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.task_prompts import TEST_PROMPTS
from ..evaluation.report import metrics_table, remarks
from ..evaluation.results import Run, read_run, timings
from ..evaluation.tables import markdown_table
from ..files import write_atomically
from ..model.configuration_salmonn import SalmonnConfig
from ..model.lora import LORA_FIELDS, adapted_parts
from ..model.modeling_salmonn import SalmonnForConditionalGeneration

TEMPLATE = Path(__file__).with_name("model_card_template.md")
# As the base parts' own pages give them, by the beginning of a part's name; the longest that fits counts.
LICENCES = json.loads(Path(__file__).with_name("licences.json").read_text())
TASKS = {
    "asr": ("automatic-speech-recognition", "Speech recognition"),
    "aac": ("audio-text-to-text", "Audio captioning"),
    "qa": ("audio-text-to-text", "Audio question answering"),
}
PERCENT = ("wer", "wer_raw", "cer", "cer_raw", "accuracy", "loops")


def licence_of(part: str) -> str:
    names = sorted((name for name in LICENCES if part.startswith(name)), key=len)
    return LICENCES[names[-1]] if names else "see its own page"


def count_parts(config: SalmonnConfig) -> dict[str, int]:
    """Parameters of each part of the architecture, without any weight in memory."""
    with torch.device("meta"):
        model = SalmonnForConditionalGeneration(config)
    from_whisper = tuple(f"projector.{name}." for name in config.projector_config.base_parts)
    counts = Counter()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if ".lora_" in name:
            part = f"LoRA in {part}"
        elif name.startswith(from_whisper):
            part = "audio_tower"
        counts[part] += parameter.numel()
    return counts


def parts_table(config: SalmonnConfig, bases: dict[str, str], licence: str) -> str:
    counts = count_parts(config)
    rows = [["part", "from", "parameters", "licence"]]
    kinds = {"audio_tower": "speech encoder", "sound_tower": "sound encoder", "language_model": "language model"}
    configs = {"audio_tower": config.audio_config, "language_model": config.text_config}
    for part, kind in kinds.items():
        if part in counts:
            # `weights` is in the config of a part whose weights were not quite the official ones.
            origin = getattr(configs.get(part), "weights", bases.get(part))
            origin, terms = (origin, licence_of(origin)) if origin else ("in this checkpoint", licence)
            rows.append([kind, origin, f"{counts[part] / 1e6:.1f} M", terms])
    projector = config.projector_config.description
    projector += ", CTC head" if config.projector_config.ctc_vocab_size else ""
    rows.append([f"projector: {projector}", "trained", f"{counts['projector'] / 1e6:.1f} M", licence])
    for part in adapted_parts(config):
        count, rank = counts[f"LoRA in {part}"], getattr(config, LORA_FIELDS[part])["r"]
        rows.append([f"LoRA in the {kinds[part]}, rank {rank}", "trained", f"{count / 1e6:.1f} M", licence])
    table = markdown_table(rows)
    if not config.quantized_parts:
        return table
    bits = ", ".join(f"{part} {settings['bits']}" for part, settings in config.quantized_parts.items())
    note = f"{table}\n\nBits per weight: {bits}. Everything else is in bfloat16."
    if (library := config.library_quantization) is not None:
        note += f" But the language model's layers: they are in a format of {library['quant_method']}, which it needs."
    return note


def data_table(files: list[str]) -> str:
    """Clips, hours, sources and licences of the training files that are here; the names of those that are not."""
    import pyarrow.parquet

    rows = [["file", "clips", "hours", "source", "licence"]]
    for file in map(Path, dict.fromkeys(files)):  # a file at several speeds is as many sources
        if file.suffix != ".parquet" or not file.exists():  # audio in a directory, or an annotation, is not counted
            rows.append([file.name, "—", "—", "—" if file.exists() else "not at hand when the card was made", "—"])
            continue
        clips = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in ("seconds", "source", "license") if name in clips.schema_arrow.names]
        table = clips.read(columns).to_pydict()
        hours = f"{sum(table['seconds']) / 3600:.2f}" if "seconds" in table else "—"
        origins = [", ".join(sorted(set(filter(None, table.get(name, []))))) for name in ("source", "license")]
        rows.append([file.name, str(clips.metadata.num_rows), hours, *(origin or "—" for origin in origins)])
    return markdown_table(rows)


def training_state(checkpoint: Path) -> str:
    """Steps and losses by the last `trainer_state.json` under a training's output directory; "" if there is none."""
    files = [checkpoint / "trainer_state.json", *checkpoint.glob("checkpoint-*/trainer_state.json")]
    states = [json.loads(file.read_text()) for file in files if file.exists()]
    if not states:
        return ""
    state = max(states, key=lambda state: state["global_step"])
    losses = [f"{entry['loss']:.3f} at step {entry['step']}" for entry in state["log_history"] if "loss" in entry]
    rates = [f"{100 * e['eval_wer']:.1f} % at step {e['step']}" for e in state["log_history"] if "eval_wer" in e]
    text = f"Trained for {state['global_step']} steps ({state['epoch']:.2f} epochs)."
    text += f" Training loss {losses[0]}, {losses[-1]}." if losses else ""
    return text + (f" Word error rate on held-out clips while training: {', '.join(rates)}." if rates else "")


def data_name(run: Run) -> str:
    return ", ".join(Path(file).stem for file in run.files)


def model_index(runs: list[Run]) -> list[EvalResult]:
    """The metrics as the hub's `model-index` has them: error rates and accuracy in percent, intervals in `args`."""
    results = []
    for run in runs:
        about = dict(zip(("task_type", "task_name"), TASKS[run.task], strict=True))
        about |= {"dataset_type": data_name(run), "dataset_name": data_name(run), "dataset_config": run.task}
        about["dataset_args"] = {"clips": run.result["clips"]} | ({"note": run.note} if run.note else {})
        for metric, found in run.result["metrics"].items():
            factor, unit = (100, " (%)") if metric in PERCENT else (1, "")
            value, *interval = (
                None if found[bound] is None else round(factor * found[bound], 4) for bound in ("value", "low", "high")
            )
            if value is not None:
                about |= {"metric_type": metric.lower(), "metric_name": f"{metric}{unit}"}
                about |= {"metric_value": value, "metric_args": {"interval_95": interval}}
                results.append(EvalResult(**about))
    return results


def worst_parts(run: Run) -> Iterator[tuple[str, str, dict]]:
    """Metric, breakdown and the part of the data with the worst score, of parts with five clips or more."""
    for metric, breakdowns in run.result["breakdowns"].items():
        for key, parts in breakdowns.items():
            parts = [part for part in parts if part["clips"] >= 5 and part["value"] is not None]
            if len(parts) > 1:
                yield metric, key, max(parts, key=lambda part: part["value"] * (1 if metric == "wer" else -1))


def make_card(
    checkpoint: Path,
    results: list[Path],
    recipe: Path | None = None,
    name: str | None = None,
    licence: str = "apache-2.0",
    languages: tuple[str, ...] = ("en",),
    merged_parts: dict[str, str] | None = None,
) -> ModelCard:
    """
    The card of a checkpoint directory.

    Args:
        results (`list[Path]`): directories of finished evaluations of this checkpoint, and of an `efficiency.json`.
        recipe (`Path`, *optional*): the YAML that it was trained with; its training files are looked at.
        merged_parts (`dict`, *optional*): names of the base parts that a full checkpoint was made of, as
            `config.base_parts` of an adapter checkpoint has them.

    Raises:
        ValueError: for results of another model, naming both.
    """
    config = SalmonnConfig.from_pretrained(checkpoint)
    name = name or checkpoint.resolve().name
    runs = [read_run(directory) for directory in results]
    for run in runs:
        if Path(run.model).name != checkpoint.resolve().name:
            raise ValueError(f"{run.directory} holds results of {run.model}, the card is of {checkpoint}.")
    evaluated = [run for run in runs if run.result is not None]
    settings = yaml.safe_load(recipe.read_text()) if recipe else {}
    files = settings.get("train_files", []) + [source["path"] for source in settings.get("sources", [])]
    bases = config.base_parts or merged_parts or {}
    data = ModelCardData(
        model_name=name,
        license=licence,
        language=list(languages),
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        base_model=[part for part in dict.fromkeys(bases.values()) if not Path(part).exists()] or None,
        tags=["salmonn", "audio-language-model"],
        eval_results=model_index(evaluated) or None,
    )
    encoders = [bases.get("audio_tower", "a Whisper encoder")]
    encoders += [bases.get("sound_tower", "a sound encoder")] if config.sound_config is not None else []
    summary = (
        f"An audio language model: {' and '.join(encoders)}, {config.projector_config.description} and "
        f"{bases.get('language_model', config.text_config.model_type)}{' with LoRA' if config.lora else ''}."
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        location=name if checkpoint.is_absolute() else str(checkpoint),  # no path of this machine
        summary=summary,
        prompt=TEST_PROMPTS["audiocaption"],
        base_parts=" and ".join(dict.fromkeys((config.base_parts or {}).values())),
        parts=parts_table(config, bases, licence),
        data=data_table(files) if files else "",
        recipe=recipe.read_text().strip() if recipe else "",
        state=training_state(checkpoint),
        runs=evaluated,
        tasks={task: title for task, (_, title) in TASKS.items()},
        timings=[system for run in runs for system in timings(run).items()],
        speeds=[run for run in evaluated if run.speed and run.speed["real_time_factor"]],
        **{f.__name__: f for f in (data_name, markdown_table, metrics_table, remarks, worst_parts)},
    )


def write_card(card: ModelCard, checkpoint: Path):
    """As the checkpoint's README.md, which goes to the hub with it."""
    write_atomically(checkpoint / "README.md", str(card).strip() + "\n")
