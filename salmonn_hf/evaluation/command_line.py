"""What the evaluation scripts share: their arguments, and the way from clips to a written result."""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from .clips import Clip
from .engine import predict
from .results import write_result


def model_parser(description: str, data: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub name")
    if data:
        parser.add_argument("--data", required=True, nargs="+", help="Parquet files, or .csv, .tsv or .jsonl lists")
    parser.add_argument("--dtype", help="default: the checkpoint's, or float32 on CPUs without bfloat16")
    parser.add_argument("--device", help="default: the GPU, where there is one")
    parser.add_argument("--max_clips", type=int, help="the first of them only")
    return parser


def argument_parser(description: str, needs_output: bool = True, data: bool = True) -> argparse.ArgumentParser:
    parser = model_parser(description, data)
    parser.add_argument("--output", type=Path, required=needs_output, help="results; a killed run goes on there")
    parser.add_argument("--batch_size", type=int, default=16, help="clips at once; default: %(default)s")
    parser.add_argument("--note", default="", help="what a reader must know of the data; stands beside every figure")
    return parser


def evaluate(
    arguments: argparse.Namespace,
    task: str,
    clips: list[Clip],
    load_model: Callable[..., Callable],
    score: Callable[[list[dict]], tuple[dict, list[dict]]],
    **settings,
) -> dict | None:
    """
    Predict, score and write the result.

    Args:
        task (`str`): "asr", "aac" or "qa".
        load_model: from the model's name, dtype and device to what `engine.predict` takes.
        score: from predictions to the scores of the whole and of each clip, see `scoring`.
        settings: what else the predictions depend on, or what is to be noted in place of an argument.

    Returns:
        What is in `result.json`; `None` in all processes but the main one.
    """
    named = {name: getattr(arguments, name, None) for name in ("model", "data", "dtype", "note")}
    settings = {"task": task, **named, "model_digest": model_digest(arguments.model), **settings}

    def make_model():
        return load_model(arguments.model, arguments.dtype, arguments.device)

    predictions = predict(clips[: arguments.max_clips], make_model, arguments.output, settings, arguments.batch_size)
    return None if predictions is None else write_result(arguments.output, predictions, *score(predictions))


def model_digest(model: str) -> str:
    """Tells one state of a local checkpoint from another, by its weight files' sizes and times; "" for a hub name."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16] if files else ""


def format_metric(metric: dict) -> str:
    """A score with its 95 % interval."""
    return f"{metric['value']:.4f} ({metric['low']:.4f} to {metric['high']:.4f})"
