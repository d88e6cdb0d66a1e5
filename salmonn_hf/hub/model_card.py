"""Model cards, made from a checkpoint, its recipe, the state of its training and the results of its evaluation."""

import json
from collections import Counter
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
LICENCES = {
    "openai/whisper": "MIT",
    "HuggingFaceTB/SmolLM2": "Apache-2.0",
    "Qwen/Qwen2.5": "Apache-2.0",
    "google/gemma": "Gemma Terms of Use",
    "meta-llama/Llama-3.2": "Llama 3.2 Community License",
    "lmsys/vicuna": "Llama 2 Community License",
    "microsoft/BEATs": "MIT",
}
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
    for part, kind in kinds.items():
        if part in counts:
            origin = bases.get(part, "in this checkpoint")
            terms = licence_of(origin) if part in bases else licence
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
    for file in map(Path, files):
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
    losses = [entry for entry in state["log_history"] if "loss" in entry]
    errors = [entry for entry in state["log_history"] if "eval_wer" in entry]
    lines = [f"Trained for {state['global_step']} steps ({state['epoch']:.2f} epochs)."]
    if losses:
        first, last = (f"{entry['loss']:.3f} at step {entry['step']}" for entry in (losses[0], losses[-1]))
        lines.append(f"Training loss {first}, {last}.")
    if errors:
        rates = ", ".join(f"{100 * entry['eval_wer']:.1f} % at step {entry['step']}" for entry in errors)
        lines.append(f"Word error rate on held-out clips while training: {rates}.")
    return " ".join(lines)


def data_name(run: Run) -> str:
    return ", ".join(Path(file).stem for file in run.result["settings"]["data"])


def model_index(runs: list[Run]) -> list[EvalResult]:
    """The metrics as the hub's `model-index` has them: error rates and accuracy in percent, intervals in `args`."""
    results = []
    for run in runs:
        task, name = TASKS[run.task]
        note = run.result["settings"].get("note")
        about = {
            "task_type": task,
            "task_name": name,
            "dataset_type": data_name(run),
            "dataset_name": data_name(run),
            "dataset_config": run.task,
            "dataset_args": {"clips": run.result["clips"]} | ({"note": note} if note else {}),
        }
        for metric, found in run.result["metrics"].items():
            if found["value"] is None:
                continue
            factor, unit = (100, " (%)") if metric in PERCENT else (1, "")
            low, high = (None if b is None else round(factor * b, 4) for b in (found["low"], found["high"]))
            about |= {"metric_type": metric.lower(), "metric_name": f"{metric}{unit}"}
            about |= {"metric_value": round(factor * found["value"], 4), "metric_args": {"interval_95": [low, high]}}
            results.append(EvalResult(**about))
    return results


def run_section(run: Run) -> str:
    lines = [f"### {TASKS[run.task][1]}: {data_name(run)}", ""]
    lines += [f"{run.result['clips']} clips, {run.result['audio_seconds']} s, greedy.", ""]
    lines += [f"- {remark}" for remark in remarks(run)]
    return "\n".join([*lines, "", markdown_table(metrics_table(run))])


def efficiency_lines(runs: list[Run]) -> list[str]:
    lines = []
    for run in runs:
        for name, found in timings(run).items():
            lines.append(
                f"{name}: {found['memory_gb']:.2f} GB peak memory, {found['ttft_seconds']:.3f} s to the first token, "
                f"{found['tpot_seconds']:.4f} s a token ({found['protocol']})"
            )
        speed = run.directory / "speed.json"
        if run.result is not None and speed.exists():
            found = json.loads(speed.read_text())
            if found["real_time_factor"]:
                lines.append(
                    f"real-time factor {found['real_time_factor']} on {data_name(run)}, in batches of "
                    f"{run.result['settings']['batch_size']} ({found['device']}, {found['dtype']}, "
                    f"{found['processes']} processes)"
                )
    return lines or ["not measured"]


def limits(config: SalmonnConfig, runs: list[Run]) -> list[str]:
    """Errors that the results show: their types, loops, the parts of the data with the worst scores."""
    lines = []
    for run in runs:
        metrics, name = run.result["metrics"], data_name(run)
        if run.task == "asr":
            wer = metrics["wer"]
            errors = {kind: wer[kind] for kind in ("substitutions", "deletions", "insertions")}
            kinds = ", ".join(f"{count} {kind}" for kind, count in errors.items())
            lines.append(f"{name}: {sum(errors.values())} errors in {wer['words']} words ({kinds}).")
            lines.append(f"{name}: {metrics['loops']['value']:.1%} of the transcripts repeat a phrase endlessly.")
        for metric, breakdowns in run.result["breakdowns"].items():
            for key, parts in breakdowns.items():
                parts = [part for part in parts if part["clips"] >= 5 and part["value"] is not None]
                if len(parts) > 1:
                    worst = max(parts, key=lambda part: part["value"] * (1 if metric == "wer" else -1))
                    lines.append(
                        f"{name}: worst by {key}: {worst['part'] or '(none)'}, {metric} {worst['value']:.3f} on "
                        f"{worst['clips']} clips ({metrics[metric]['value']:.3f} on all)."
                    )
        if run.result["broken_clips"]:
            lines.append(f"{name}: {len(run.result['broken_clips'])} clips could not be read and count as errors.")
    missing = [name for task, (_, name) in TASKS.items() if task not in {run.task for run in runs}]
    lines += [f"{name} was not evaluated." for name in missing]
    lines.append("The encoder takes 30 s at once; `pipeline()` cuts longer audio at pauses.")
    return lines


def intended_use(runs: list[Run], languages: list[str]) -> list[str]:
    lines = [f"{TASKS[run.task][1]}, measured below on {data_name(run)}." for run in runs] or ["Nothing was measured."]
    lines.append(f"Languages: {', '.join(languages)}.")
    return lines + ["Not for transcripts or descriptions that anybody relies on unread: see the error rates below."]


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
    files = list(dict.fromkeys(files))  # a file at several speeds is as many sources
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
        intended_use=intended_use(evaluated, list(languages)),
        parts=parts_table(config, bases, licence),
        data=data_table(files) if files else "",
        recipe=recipe.read_text().strip() if recipe else "",
        state=training_state(checkpoint),
        runs=[run_section(run) for run in evaluated],
        efficiency=efficiency_lines(runs),
        limits=limits(config, evaluated),
    )


def write_card(card: ModelCard, checkpoint: Path):
    """As the checkpoint's README.md, which goes to the hub with it."""
    write_atomically(checkpoint / "README.md", str(card).strip() + "\n")
