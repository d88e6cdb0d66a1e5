"""From predictions to scores: of the whole with 95 % intervals, of each clip, and of each part of the data."""

from collections.abc import Callable

import jiwer
import numpy as np

from .answer_metrics import correct_answers
from .bootstrap import mean_interval, rate_interval
from .caption_metrics import CaptionMetricsError, caption_statistics, find_corenlp, minilm_similarity, score_captions
from .word_error_rate import corpus_rate, error_counts, is_loop

KINDS = ("substitutions", "deletions", "insertions", "hits")
DURATION_BOUNDS = (1, 2, 5, 10, 20, 30)  # seconds


def score_transcripts(predictions: list[dict]) -> tuple[dict, list[dict]]:
    """
    Speech recognition, from the predictions of `engine.predict`: "wer" and "cer" after Whisper's English normaliser,
    "wer_raw" and "cer_raw" of the texts as they are, "loops" (share of clips with a hallucinated loop), their counts,
    and the WER by part. A broken clip counts with an empty transcript. Given are the result, where each metric is
    `{"value", "low", "high"}`, and the scores of each clip.
    """
    references = [(line["references"] or [""])[0] for line in predictions]
    hypotheses = [line["hypothesis"] for line in predictions]
    counts = {
        "wer": error_counts(references, hypotheses),
        "wer_raw": error_counts(references, hypotheses, normalise=False),
        "cer": error_counts(references, hypotheses, align=jiwer.process_characters),
        "cer_raw": error_counts(references, hypotheses, normalise=False, align=jiwer.process_characters),
    }
    metrics = {}
    for name, of_clips in counts.items():
        rate, *whole = corpus_rate(of_clips.sum(0))
        kinds = (*KINDS, "words" if name.startswith("wer") else "characters")
        metrics[name] = metric(rate, error_interval(of_clips)) | dict(zip(kinds, whole, strict=True))
    loops = np.array([is_loop(h, [r]) for r, h in zip(references, hypotheses, strict=True)], dtype=float)
    metrics["loops"] = metric(loops.mean(), mean_interval(loops))

    def wer_of(rows):
        part = counts["wer"][rows]
        return metric(corpus_rate(part.sum(0))[0], error_interval(part))

    scores = [
        {"wer": corpus_rate(clip)[0], **dict(zip(KINDS, map(int, clip), strict=True)), "loop": bool(loop)}
        for clip, loop in zip(counts["wer"], loops, strict=True)
    ]
    return {"metrics": metrics, "breakdowns": {"wer": breakdowns(predictions, wer_of)}}, scores


def score_caption_predictions(
    predictions: list[dict], corenlp: str | None = None, minilm: str | None = None
) -> tuple[dict, list[dict]]:
    """
    Captioning: the scores of `score_captions`, SPICE and SPIDEr among them where CoreNLP is found, MiniLM similarity
    where its model is named, statistics of captions and references, and CIDEr-D and METEOR by part. What could not be
    computed, and why, is in "not_computed".

    Raises:
        CaptionMetricsError: without pycocoevalcap or Java.
    """
    references = [line["references"] for line in predictions]
    hypotheses = [line["hypothesis"] for line in predictions]
    not_computed = {}
    try:
        corenlp = find_corenlp(corenlp)
    except CaptionMetricsError as error:
        not_computed["SPICE, SPIDEr"], corenlp = str(error), None
    scores = score_captions(references, hypotheses, corenlp)
    if minilm:
        scores["MiniLM similarity"] = minilm_similarity(references, hypotheses, minilm)
    else:
        not_computed["MiniLM similarity"] = "no --minilm was given"
    result = {
        "metrics": {name: metric(score.value, (score.low, score.high)) for name, score in scores.items()},
        "not_computed": not_computed,
        "references_per_clip": sorted({len(texts) for texts in references}),
        "statistics": {
            "captions": caption_statistics(hypotheses),
            "references": caption_statistics([text for texts in references for text in texts]),
        },
        "breakdowns": {name: breakdowns(predictions, mean_of(scores[name].clips)) for name in ("CIDEr-D", "METEOR")},
    }
    clips = [{name: float(score.clips[row]) for name, score in scores.items()} for row in range(len(predictions))]
    return result, clips


def score_answers(predictions: list[dict]) -> tuple[dict, list[dict]]:
    """Questions: "accuracy" after normalisation, and by part; a question's own wording is a part too."""
    hypotheses = [line["hypothesis"] for line in predictions]
    correct = correct_answers([line["references"] for line in predictions], hypotheses)
    for line in predictions:
        line["groups"] = {"question": line.get("prompt", ""), **line["groups"]}
    accuracy_of = mean_of(correct.astype(float))
    parts = breakdowns(predictions, accuracy_of)
    result = {"metrics": {"accuracy": accuracy_of(slice(None))}, "breakdowns": {"accuracy": parts}}
    return result, [{"correct": bool(value)} for value in correct]


def metric(value: float, interval: tuple[float, float]) -> dict:
    return {"value": float(value), "low": interval[0], "high": interval[1]}


def mean_of(values: np.ndarray) -> Callable[[list[int]], dict]:
    """Gives the mean of some rows of `values`, shape `(clips,)`, as a metric."""
    return lambda rows: metric(values[rows].mean(), mean_interval(values[rows]))


def error_interval(counts: np.ndarray) -> tuple[float, float]:
    """Of an error rate, from clips' counts `(clips, 4)`; without any reference unit, there is none to speak of."""
    if counts[:, [0, 1, 3]].sum() == 0:
        return (float("nan"), float("nan"))
    return rate_interval(counts[:, :3].sum(1), counts[:, [0, 1, 3]].sum(1))


def breakdowns(predictions: list[dict], score: Callable[[list[int]], dict]) -> dict[str, list[dict]]:
    """
    The score of each part of the clips, by their length and by every group that they do not all share:
    `{"duration": [{"part": "1-2 s", "clips": 12, "value", "low", "high"}, ...], "source": ...}`. `score` gets the rows
    of a part. Clips without the group, such as an unnamed speaker, are one part, "".
    """
    by = {"duration": [duration_part(line["seconds"]) for line in predictions]}
    for key in sorted({key for line in predictions for key in line["groups"]}):
        by[key] = [line["groups"].get(key, "") for line in predictions]
    result = {}
    for key, parts in by.items():
        names = sorted(set(parts), key=duration_order if key == "duration" else str)
        if len(names) > 1 or key == "duration":
            rows = {name: [row for row, part in enumerate(parts) if part == name] for name in names}
            result[key] = [{"part": name, "clips": len(rows[name]), **score(rows[name])} for name in names]
    return result


def duration_part(seconds: float) -> str:
    below = [bound for bound in DURATION_BOUNDS if bound <= seconds]
    above = [bound for bound in DURATION_BOUNDS if bound > seconds]
    return f"{below[-1] if below else 0}-{above[0]} s" if above else f"{below[-1]} s and more"


def duration_order(part: str) -> int:
    return int(part.replace("-", " ").split()[0])
