"""What an evaluation leaves in its directory, written and read back; the files are listed in `docs/evaluation.md`."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ..files import write_atomically

TASKS = {"asr": "speech recognition", "aac": "captioning", "qa": "questions"}


def as_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(file: Path) -> list[dict]:
    """The records of a JSONL file, none if there is none; a last line without its end, cut off by a kill, is none."""
    if not file.exists():
        return []
    complete, _, _ = file.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in complete.split(b"\n") if line]


def write_result(output: Path, predictions: list[dict], result: dict, scores: list[dict]) -> dict:
    """
    Write `scores.jsonl` and `result.json`, and name every broken or truncated clip on the error stream.

    Args:
        predictions (`list[dict]`): of `engine.predict`.
        result (`dict`), scores (`list[dict]`): of the whole and of each clip, by one of the functions of `scoring`.
    """
    broken = [f"{line['id']}: {line['error']}" for line in predictions if "error" in line]
    long = [line for line in predictions if "truncated_to" in line]
    cut = [f"{line['id']}: {line['truncated_to']} of {line['seconds']} s" for line in long]
    for problem, clips in (("broken clip", broken), ("clip longer than the model's input", cut)):
        for clip in clips:
            print(f"{problem}, {clip}", file=sys.stderr)
    settings = json.loads((output / "run.json").read_text())
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__}
    seconds = round(sum(line["seconds"] for line in predictions), 1)
    whole = {"clips": len(predictions), "audio_seconds": seconds, "broken_clips": broken, "cut_clips": cut}
    result = whole | result | {"settings": settings}
    rows = [{"row": line["row"], "id": line["id"], **score} for line, score in zip(predictions, scores, strict=True)]
    write_atomically(output / "scores.jsonl", "".join(as_line(finite(row)) for row in rows))
    write_atomically(output / "result.json", json.dumps(finite(result), indent=2, ensure_ascii=False) + "\n")
    return result


def finite(value):
    """With null for what JSON has no number for: the error rate of no words at all is infinite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Run:
    """What one directory holds: the result of an evaluation with its clips, or that of `eval/run_efficiency.py`."""

    directory: Path
    result: dict | None
    efficiency: dict | None
    speed: dict | None
    clips: list[dict]

    @property
    def model(self) -> str:
        return (self.efficiency if self.result is None else self.result)["settings"]["model"]

    @property
    def task(self) -> str:
        return "" if self.result is None else self.result["settings"]["task"]

    @property
    def files(self) -> list[str]:
        return self.result["settings"]["data"]

    @property
    def data(self) -> str:
        return ", ".join(Path(file).name for file in self.files)

    @property
    def note(self) -> str:
        return self.result["settings"].get("note", "")

    @property
    def title(self) -> str:
        return f"{Path(self.model).name}: {TASKS[self.task]}, {self.data}"


def read_run(directory: Path) -> Run:
    """
    Raises:
        ValueError: if the directory holds no result.
    """
    files = [directory / f"{name}.json" for name in ("result", "efficiency", "speed")]
    result, efficiency, speed = (json.loads(file.read_text()) if file.exists() else None for file in files)
    if result is None and efficiency is None:
        missing = f"{directory} holds neither result.json nor efficiency.json"
        raise ValueError(f"{missing}; give the --output of a finished evaluation.")
    predictions, scores = (read_lines(directory / f"{name}.jsonl") for name in ("predictions", "scores"))
    clips = [prediction | score for prediction, score in zip(predictions, scores, strict=True)]
    return Run(directory, result, efficiency, speed, clips)


def timings(run: Run) -> dict[str, dict]:
    """
    What `eval/run_efficiency.py` measured of each system, the run's own model first: gigabytes, median seconds to the
    first token, by part as well, and per further token, and how they were measured. Empty without such a file.
    """
    if run.efficiency is None:
        return {}
    settings, machine = run.efficiency["settings"], run.efficiency["machine"]
    conditions = f"{machine['device']}, {machine['threads']} threads, median of {settings['rounds']} rounds"
    found = {}
    for name, system in run.efficiency["systems"].items():
        protocol = system["protocol"]
        found[name] = {
            "memory_gb": system["peak_memory"] / 1e9,
            "ttft_seconds": protocol["ttft"]["p50"],
            "tpot_seconds": protocol["tpot"]["p50"],
            "parts_seconds": protocol["ttft_by_part"],
            "file": f"{run.directory}/efficiency.json",
            "protocol": f"batch 1, {protocol['seconds_of_audio']:g} s of speech, {system['audio_tokens']} audio "
            f"tokens, {system['dtype'].removeprefix('torch.')}, {conditions}",
        }
    return found
