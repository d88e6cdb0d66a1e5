"""The table of SALMONN's compression challenge: what its teams published, and what was measured here."""

import json
from pathlib import Path

from .results import Run, timings
from .tables import format_number

COLUMNS = ("AAC (SPIDEr)", "ASR (WER)", "Memory (GB)", "TTFT (s)", "TPOT (s)")
DIGITS = (4, 4, 2, 3, 3)
METRICS = {"asr": ("wer", "WER"), "aac": ("SPIDEr", "captions")}
PUBLISHED = json.loads(Path(__file__).with_name("published_systems.json").read_text())  # figures by COLUMNS


def challenge_table(runs: list[Run]) -> tuple[list[list[str]], list[str]]:
    """The rows of the challenge's table, published systems first, and where each of our figures came from."""
    rows = [["system", *COLUMNS, "origin"]]
    rows += [[name, *map(format_number, row, DIGITS), "published"] for name, row in PUBLISHED["systems"].items()]
    origins = [f"published: {PUBLISHED['origin']}"]

    def add(name: str, scores: dict, timing: dict, sources: list[str]):
        figures = [scores.get("aac"), scores.get("asr")]
        figures += [timing.get(key) for key in ("memory_gb", "ttft_seconds", "tpot_seconds")]
        rows.append([name, *map(format_number, figures, DIGITS), f"measured [{len(origins)}]"])
        sources = sources + ([f"memory and times: {timing['protocol']} ({timing['file']})"] if timing else [])
        origins.append(f"measured [{len(origins)}]: " + ("; ".join(sources) or "nothing measured"))

    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        evaluations = [run for run in own if run.task in METRICS]
        systems = next((list(timings(run).items()) for run in own if run.efficiency is not None), [])
        datasets = dict.fromkeys(tuple(run.files) for run in evaluations if run.task == "asr")
        for data in datasets or [None]:
            shown = [run for run in evaluations if run.task == "aac" or tuple(run.files) == data]
            scores = {run.task: run.result["metrics"].get(METRICS[run.task][0], {}).get("value") for run in shown}
            add(Path(model).name, scores, systems[0][1] if systems else {}, list(map(describe_origin, shown)))
        for name, other in systems[1:]:  # measured beside the model
            add(name, {}, other, [])
    return rows, origins


def describe_origin(run: Run) -> str:
    metric, kind = METRICS[run.task]
    note = f"; {run.note}" if run.note else ""
    missing = "" if metric in run.result["metrics"] else f"; no {metric} was computed"
    return f"{kind}: {run.result['clips']} clips of {run.data}{note}{missing} ({run.directory}/result.json)"
