"""The table of SALMONN's compression challenge: what its teams published, and what was measured here."""

from pathlib import Path

from .results import Run, timings
from .tables import format_number

COLUMNS = ("AAC (SPIDEr)", "ASR (WER)", "Memory (GB)", "TTFT (s)", "TPOT (s)")
DIGITS = (4, 4, 2, 3, 3)
# From the READMEs of the challenge's teams (boostcampaitech7, level 4), and of nota-github/audiolm-trainer for the
# baseline; SALMONN-7B as cv-16 measured it. Where a README gives TTFT and TPOT as one figure, it stands under TTFT.
PUBLISHED_SYSTEMS = {
    "nota baseline": (0.2027, 0.0634, 9.18, 0.206, 0.045),
    "seed (cv-03)": (0.3049, 0.0642, 5.32, 0.356, 0.107),
    "nlp-07": (0.3615, 0.0699, 3.83, 0.172, 0.038),
    "cv-16": (0.3549, 0.0530, 4.09, 0.36, None),
    "nlp-12": (0.3304, 0.0770, 4.05, 0.846, None),
    "SALMONN-7B": (0.485, 0.051, 15.75, None, None),
}
PUBLISHED_ORIGIN = (
    "self-reported on V100 GPUs over the challenge's split (LibriSpeech test-other, AudioCaps; SPIDEr with one "
    "reference a clip); TTFT of cv-16 and nlp-12 includes TPOT"
)


def challenge_table(runs: list[Run]) -> tuple[list[list[str]], list[str]]:
    """The rows of the challenge's table, published systems first, and where each of our figures came from."""
    rows = [["system", *COLUMNS, "origin"]]
    for name, figures in PUBLISHED_SYSTEMS.items():
        rows.append([name, *map(format_number, figures, DIGITS), "published"])
    origins = [f"published: {PUBLISHED_ORIGIN}"]

    def add(name: str, scores: dict, timing: dict, sources: list[str]):
        figures = [scores.get("aac"), scores.get("asr")]
        figures += [timing.get(key) for key in ("memory_gb", "ttft_seconds", "tpot_seconds")]
        rows.append([name, *map(format_number, figures, DIGITS), f"measured [{len(origins)}]"])
        sources = sources + ([f"memory and times: {timing['protocol']} ({timing['file']})"] if timing else [])
        origins.append(f"measured [{len(origins)}]: " + ("; ".join(sources) or "nothing measured"))

    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        evaluations = [run for run in own if run.result is not None and run.task in ("asr", "aac")]
        systems = next((list(timings(run).items()) for run in own if run.efficiency is not None), [])
        timing = systems[0][1] if systems else {}
        datasets = dict.fromkeys(tuple(run.result["settings"]["data"]) for run in evaluations if run.task == "asr")
        for data in datasets or [None]:
            scores, sources = {}, []
            for run in evaluations:
                metric = run.result["metrics"].get({"asr": "wer", "aac": "SPIDEr"}[run.task])
                if run.task == "aac" or tuple(run.result["settings"]["data"]) == data:
                    scores[run.task] = metric["value"] if metric else None
                    sources.append(describe_origin(run))
            add(Path(model).name, scores, timing, sources)
        for name, other in systems[1:]:  # measured beside the model
            add(name, {}, other, [])
    return rows, origins


def describe_origin(run: Run) -> str:
    kind = {"asr": "WER", "aac": "captions"}[run.task]
    note = f"; {run.note}" if run.note else ""
    missing = "" if run.task == "asr" or "SPIDEr" in run.result["metrics"] else "; no SPIDEr was computed"
    return f"{kind}: {run.result['clips']} clips of {run.data}{note}{missing} ({run.directory}/result.json)"
