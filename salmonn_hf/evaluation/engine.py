"""
The engine of every evaluation: clips in batches of like length, over any number of processes, each batch written as
soon as it is done. A run that was killed goes on where it was, and its results are those of a run left alone: which
clips share a batch follows from the data and the batch size alone.

    output/run.json            what was asked; a second run with other settings is refused
    output/parts/*.jsonl       what each process has done so far
    output/predictions.jsonl   one line a clip, in the order of the data, once all are done
    output/scores.jsonl        each clip's own scores
    output/result.json         scores of the whole, with intervals and breakdowns
    output/speed.json          how long the last start took
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from ..data.clip_audio import clip_seconds_or_nan, read_clip
from ..data.clip_parquet import parquet_rows
from ..data.corpora import annotation
from ..data.skipped_clips import UnusableClip
from ..files import write_atomically
from ..model.audio import SAMPLING_RATE, AudioError, load_audio

GROUP_COLUMNS = ("source", "kind", "speaker", "label", "task")


@dataclass
class Clip:
    """
    Args:
        id (`str`): names the clip in messages and results.
        audio (`dict`): the row's audio, which `read` turns into a waveform at 16 kHz.
        references (`list[str]`): accepted transcripts, captions or answers; none where they are not known.
        prompt (`str`): what is asked of it; "" for the model's own transcription prompt.
        groups (`dict[str, str]`): what scores are broken down by, e.g. its source.
    """

    id: str
    audio: dict
    references: list[str]
    prompt: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    read: Callable[[dict], np.ndarray] = load_audio


def parquet_clips(files: list[str], references: str, prompt: str = "", question: str | None = None) -> "list[Clip]":
    """
    Clips of Parquet files with an `audio` column, as `datasets` writes it.

    Args:
        references (`str`): the column of the accepted texts, a string or a list of them.
        prompt (`str`): asked of every clip.
        question (`str`, *optional*): the column of a question of each clip's own, asked instead.

    Raises:
        ValueError: for a file without one of the columns, naming what it has.
    """
    data = parquet_rows(files, *filter(None, (references, question)))
    texts = data.remove_columns("audio")
    clips = []
    for row, columns in enumerate(texts):
        accepted = columns[references]
        clips.append(
            Clip(
                id=str(columns.get("clip_id") or row),
                audio=RowAudio(data, row),
                references=[accepted or ""] if isinstance(accepted, str | None) else list(accepted),
                prompt=columns[question] if question else prompt,
                groups={name: str(columns[name]) for name in GROUP_COLUMNS if columns.get(name)},
                read=lambda audio: load_audio(audio.get()),
            )
        )
    return clips


@dataclass
class RowAudio:
    """The audio of one row, which stays in its file until it is needed."""

    data: object
    row: int

    def get(self) -> dict:
        return self.data[self.row]["audio"]


def annotation_clips(path: str, prefix: str, prompts: dict[str, str]) -> list[Clip]:
    """
    Clips of a SALMONN annotation file, named by their `testset_id` where they have one; `prompts` by task.

    Raises:
        ValueError: for an entry of a task that has no prompt.
        CorpusError: for a file that is not in that form.
    """
    clips = []
    for row, entry in enumerate(annotation.read_examples(path, prefix)):
        if entry["task"] not in prompts:
            raise ValueError(f"{path}: entry {row} is of task {entry['task']!r}; expected {', '.join(prompts)}.")
        text = entry["text"]
        clips.append(
            Clip(
                id=str(entry.get("testset_id", row)),
                audio=entry,
                references=[text] if isinstance(text, str) else [],
                prompt=prompts[entry["task"]],
                groups={"source": entry["source"]},
                read=read_clip,
            )
        )
    return clips


def header_seconds(audio) -> float:
    """A clip's length by its file's header, 0 where that tells none: enough to put like beside like."""
    seconds = clip_seconds_or_nan({"audio": audio.get()} if isinstance(audio, RowAudio) else audio)
    return 0.0 if math.isnan(seconds) else seconds


# Predicting


def plan_batches(clips: list[Clip], batch_size: int) -> list[list[int]]:
    """Rows by length, so that batches hold little padding; the longest first, so that a batch too large for the memory
    fails at once."""
    seconds = [header_seconds(clip.audio) for clip in clips]
    rows = sorted(range(len(clips)), key=lambda row: (-seconds[row], row))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def predict(
    clips: list[Clip], make_model: Callable[[], Callable], output: Path, settings: dict, batch_size: int = 16
) -> list[dict] | None:
    """
    What a model says to each clip, in the order of `clips`: `{"row", "id", "seconds", "references", "hypothesis",
    "groups"}`, with "prompt" where one was asked; "error" and an empty hypothesis for a clip that cannot be read;
    "heard_seconds" for a clip longer than the model hears.

    Args:
        make_model: gives the model, a function of waveforms and prompts with `max_seconds`, `device` and `dtype` (see
            `inference.py`); called if there is anything left to do.
        output (`Path`): directory, see above.
        settings (`dict`): what the results depend on. They are written down, and compared when the run goes on.

    Returns:
        The predictions in the main process, `None` in the others.

    Raises:
        ValueError: if `output` holds a run with other settings, naming them.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    settings = settings | {"clips": len(clips), "batch_size": batch_size, "data_digest": digest(clips)}
    if state.is_main_process:
        begin(output, settings)
    state.wait_for_everyone()
    if not (output / "predictions.jsonl").exists():
        fill_part(clips, make_model, output / "parts", plan_batches(clips, batch_size), state)
        state.wait_for_everyone()
        if state.is_main_process:
            join_parts(output, len(clips))
    state.wait_for_everyone()
    return read_lines(output / "predictions.jsonl") if state.is_main_process else None


def digest(clips: list[Clip]) -> str:
    asked = [(clip.id, clip.references, clip.prompt) for clip in clips]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def begin(output: Path, settings: dict):
    """Write the settings down, or compare them with those of the run that is to go on: one that has answers."""
    output.mkdir(parents=True, exist_ok=True)
    file, answers = output / "run.json", [output / "predictions.jsonl", *output.glob("parts/*.jsonl")]
    if not file.exists() or not any(map(read_lines, answers)):
        write_atomically(file, json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(file.read_text())
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{output} holds a run with {name} {before.get(name)!r}; this one has {settings.get(name)!r}. Go on "
                "with the same, or take another output directory."
            )


def fill_part(clips: list[Clip], make_model: Callable, parts: Path, batches: list[list[int]], state):
    """Do this process's share of the batches, less what is done."""
    parts.mkdir(exist_ok=True)
    done = {line["row"] for file in parts.glob("*.jsonl") for line in read_lines(file)}
    own = parts / f"{state.process_index}.jsonl"
    write_atomically(own, "".join(map(as_line, read_lines(own))))  # a line that was cut off by a kill goes
    todo = [batch for batch in batches[state.process_index :: state.num_processes] if not done.issuperset(batch)]
    if not todo:
        return
    model = make_model()
    start, heard = time.perf_counter(), 0.0
    progress = tqdm(total=sum(map(len, todo)), unit="clip", disable=not state.is_main_process)
    with own.open("a", encoding="utf-8") as file:
        for batch in todo:
            lines = predict_batch(model, batch, clips)
            heard += sum(line["seconds"] for line in lines)
            # One write for the whole batch. Of a batch that was cut off in it, the rest is written when it is redone.
            file.write("".join(as_line(line) for line in lines if line["row"] not in done))
            file.flush()
            progress.update(len(batch))
    seconds = time.perf_counter() - start
    if state.is_main_process:
        speed = {
            "clips": sum(map(len, todo)),
            "audio_seconds": round(heard, 1),
            "seconds": round(seconds, 1),
            "real_time_factor": round(seconds / heard, 4) if heard else None,
            "processes": state.num_processes,
            "device": model.device,
            "dtype": model.dtype,
        }
        write_atomically(parts.parent / "speed.json", json.dumps(speed, indent=2) + "\n")


def predict_batch(model: Callable, batch: list[int], clips: list[Clip]) -> list[dict]:
    lines, waveforms = [], {}
    for row in batch:
        clip = clips[row]
        line = {"row": row, "id": clip.id, "seconds": 0.0, "references": clip.references, "hypothesis": ""}
        line |= {"prompt": clip.prompt} if clip.prompt else {}
        line |= {"groups": clip.groups}
        try:
            waveform = clip.read(clip.audio)
        except (AudioError, UnusableClip, OSError) as error:
            line["error"] = " ".join(str(error).split())
        else:
            line["seconds"] = round(len(waveform) / SAMPLING_RATE, 3)
            if line["seconds"] > model.max_seconds:
                waveform = waveform[: int(model.max_seconds * SAMPLING_RATE)]
                line["heard_seconds"] = model.max_seconds
            waveforms[row] = waveform
        lines.append(line)
    if waveforms:
        hypotheses = model(list(waveforms.values()), [clips[row].prompt for row in waveforms])
        answers = dict(zip(waveforms, hypotheses, strict=True))
        for line in lines:
            line["hypothesis"] = answers.get(line["row"], "")
    return lines


def join_parts(output: Path, clips: int):
    lines = {line["row"]: line for file in (output / "parts").glob("*.jsonl") for line in read_lines(file)}
    if sorted(lines) != list(range(clips)):
        missing = sorted(set(range(clips)) - set(lines))
        raise ValueError(
            f"{output / 'parts'} lacks {len(missing)} clips, the first is row {missing[0]}; run it again."
        )
    write_atomically(output / "predictions.jsonl", "".join(as_line(lines[row]) for row in range(clips)))
    shutil.rmtree(output / "parts")


def as_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(file: Path) -> list[dict]:
    """The records of a JSONL file, none if there is none; a last line without its end, cut off by a kill, is none."""
    if not file.exists():
        return []
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.split(b"\n") if line]


# Reporting


def finish(output: Path, predictions: list[dict], result: dict, scores: list[dict]):
    """Write `scores.jsonl` and `result.json`, and tell of every broken clip on the error stream."""
    broken = [f"{line['id']}: {line['error']}" for line in predictions if "error" in line]
    cut = [
        f"{line['id']}: {line['heard_seconds']} of {line['seconds']} s"
        for line in predictions
        if "heard_seconds" in line
    ]
    for problem in broken:
        print(f"broken clip, {problem}", file=sys.stderr)
    for problem in cut:
        print(f"clip longer than the model hears, {problem}", file=sys.stderr)
    settings = json.loads((output / "run.json").read_text())
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {
        "clips": len(predictions),
        "audio_seconds": round(sum(line["seconds"] for line in predictions), 1),
        "broken_clips": broken,
        "cut_clips": cut,
        **result,
        "settings": settings,
    }
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


def model_digest(model: str) -> str:
    """Tells one state of a local checkpoint from another, by its weight files' sizes and times; "" for a hub name."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16] if files else ""


def argument_parser(description: str, needs_output: bool = True) -> argparse.ArgumentParser:
    """The arguments that all evaluations share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub name")
    parser.add_argument(
        "--output", type=Path, required=needs_output, help="directory of the results; a killed run goes on"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="clips at once; default: %(default)s")
    parser.add_argument("--dtype", help="default: the checkpoint's, or float32 on CPUs without bfloat16")
    parser.add_argument("--max_clips", type=int, help="the first of them only")
    parser.add_argument("--note", default="", help="what a reader must know of the data; stands beside every figure")
    return parser


def run_settings(arguments: argparse.Namespace, task: str, data: list[str], model: str | None = None) -> dict:
    model = model or arguments.model
    return {
        "task": task,
        "model": model,
        "model_digest": model_digest(model),
        "data": data,
        "dtype": arguments.dtype,
        "note": arguments.note,
    }
