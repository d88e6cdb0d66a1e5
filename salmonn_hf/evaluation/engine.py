"""
The engine of every evaluation: clips in batches of similar length, over any number of processes, each batch written as
soon as it is done (which files there are: `docs/evaluation.md`). A run that was killed continues, and its results are
those of an uninterrupted one: which clips share a batch follows from the data and the batch size alone.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..data.skipped_clips import UnusableClip
from ..files import write_atomically
from ..model.audio import SAMPLING_RATE
from .clips import Clip
from .results import as_line, read_lines


def plan_batches(clips: list[Clip], batch_size: int) -> list[list[int]]:
    """Rows by length, so that batches hold little padding; the longest first, so that a batch too large for the memory
    fails at once."""
    seconds = [clip.header_seconds() for clip in clips]
    rows = sorted(range(len(clips)), key=lambda row: (-seconds[row], row))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def predict(
    clips: list[Clip], make_model: Callable[[], Callable], output: Path, settings: dict, batch_size: int = 16
) -> list[dict] | None:
    """
    A model's answer to each clip, in the order of `clips`: `{"row", "id", "seconds", "references", "hypothesis",
    "groups"}`, with "prompt" where one was asked; "error" and an empty hypothesis for a clip that cannot be read;
    "truncated_to" seconds for a clip that is longer than the model's input.

    Args:
        make_model: gives the model, a function of waveforms and prompts with `max_seconds`, `device` and `dtype` (see
            `inference.py`); called if there is anything left to do.
        output (`Path`): directory of the run.
        settings (`dict`): what the results depend on. They are written down, and compared when the run goes on.

    Returns:
        The predictions in the main process, `None` in the others.

    Raises:
        ValueError: if `output` holds a run with other settings, naming them.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    asked = json.dumps([(clip.id, clip.references, clip.prompt) for clip in clips])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
    settings = settings | {"clips": len(clips), "batch_size": batch_size, "data_digest": digest}
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
            found = f"{output} holds a run with {name} {before.get(name)!r}; this one has {settings.get(name)!r}"
            raise ValueError(f"{found}. Go on with the same, or take another output directory.")


def fill_part(clips: list[Clip], make_model: Callable, parts: Path, batches: list[list[int]], state):
    """Do this process's share of the batches, less what is done."""
    parts.mkdir(exist_ok=True)
    done = {line["row"] for file in parts.glob("*.jsonl") for line in read_lines(file)}
    own = parts / f"{state.process_index}.jsonl"
    if own.exists():  # a line that was cut off by a kill goes
        write_atomically(own, "".join(map(as_line, read_lines(own))))
    todo = [batch for batch in batches[state.process_index :: state.num_processes] if not done.issuperset(batch)]
    if not todo:
        return
    model = make_model()
    start, audio_seconds = time.perf_counter(), 0.0
    progress = tqdm(total=sum(map(len, todo)), unit="clip", disable=not state.is_main_process)
    for batch in todo:
        lines = predict_batch(model, batch, clips)
        audio_seconds += sum(line["seconds"] for line in lines)
        # One write for the whole batch. Of a batch that was cut off in it, the rest is written when it is redone.
        with own.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(as_line(line) for line in lines if line["row"] not in done))
        progress.update(len(batch))
    seconds = time.perf_counter() - start
    if state.is_main_process:
        speed = {"clips": sum(map(len, todo)), "audio_seconds": round(audio_seconds, 1), "seconds": round(seconds, 1)}
        speed["real_time_factor"] = round(seconds / audio_seconds, 4) if audio_seconds else None
        speed |= {"processes": state.num_processes, "device": model.device, "dtype": model.dtype}
        write_atomically(parts.parent / "speed.json", json.dumps(speed, indent=2) + "\n")


def predict_batch(model: Callable, batch: list[int], clips: list[Clip]) -> list[dict]:
    lines, waveforms = [], {}
    for row in batch:
        clip = clips[row]
        line = {"row": row, "id": clip.id, "seconds": 0.0, "references": clip.references, "hypothesis": ""}
        line |= ({"prompt": clip.prompt} if clip.prompt else {}) | {"groups": clip.groups}
        try:
            waveform = clip.waveform()
        except (UnusableClip, OSError) as error:
            line["error"] = " ".join(str(error).split())
        else:
            line["seconds"] = round(len(waveform) / SAMPLING_RATE, 3)
            if line["seconds"] > model.max_seconds:
                waveform = waveform[: int(model.max_seconds * SAMPLING_RATE)]
                line["truncated_to"] = model.max_seconds
            waveforms[row] = waveform
        lines.append(line)
    prompts = [clips[row].prompt for row in waveforms]
    answers = dict(zip(waveforms, model(list(waveforms.values()), prompts), strict=True)) if waveforms else {}
    return [line | {"hypothesis": answers.get(line["row"], "")} for line in lines]


def join_parts(output: Path, clips: int):
    lines = {line["row"]: line for file in (output / "parts").glob("*.jsonl") for line in read_lines(file)}
    if missing := sorted(set(range(clips)) - set(lines)):
        raise ValueError(
            f"{output / 'parts'} lacks {len(missing)} clips, the first is row {missing[0]}; run it again."
        )
    write_atomically(output / "predictions.jsonl", "".join(as_line(lines[row]) for row in range(clips)))
    shutil.rmtree(output / "parts")
