"""
The four modes of the SALMONN-lite challenge: transcribe or caption the clips of an annotation file, and write the
answers by `testset_id` as CSV.

    python eval/run_submission.py --mode submission_asr --model CHECKPOINT --annotation test_asr.json \\
        --prefix /data --output runs/submission
    python eval/run_submission.py --mode valid_aac --model CHECKPOINT --annotation valid_aac.json --prefix /data \\
        --output runs/valid

`submission_*` writes answers alone; `valid_*` also scores them against the annotation's texts. As in the original
evaluator (nota-github/audiolm-evaluator, `evaluate_salmonn.py`) the CSV has the columns testset_id and text, and the
text is in lower case. It is read back and checked: every testset_id of the annotation, once, in its order.
"""

import csv
from collections import Counter
from pathlib import Path

from salmonn_hf.data.task_prompts import TEST_PROMPTS
from salmonn_hf.evaluation.caption_metrics import require_java
from salmonn_hf.evaluation.engine import Clip, annotation_clips, argument_parser, finish, predict, run_settings
from salmonn_hf.evaluation.scoring import score_caption_predictions, score_transcripts
from salmonn_hf.inference import Answerer, Transcriber

TASKS = {"asr": ("asr",), "aac": ("audiocaption", "audiocaption_v2")}


def check_clips(clips: list[Clip], kind: str):
    """
    Raises:
        ValueError: if a testset_id comes twice or, where answers are to be scored, a clip has no text.
    """
    name, count = Counter(clip.id for clip in clips).most_common(1)[0]
    if count > 1:
        raise ValueError(f"The testset_id {name} stands at {count} clips; mend the annotation file.")
    if kind == "valid" and (missing := [clip.id for clip in clips if not clip.references]):
        raise ValueError(
            f"{len(missing)} clips have no text to score against, the first is {missing[0]}; add it, or use "
            "a submission mode."
        )


def write_csv(file: Path, predictions: list[dict]):
    """
    Raises:
        ValueError: if what was written does not read back as it should.
    """
    rows = [[line["id"], " ".join(line["hypothesis"].lower().split())] for line in predictions]
    sibling = file.with_suffix(".part")
    with sibling.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["testset_id", "text"], *rows])
    with sibling.open(newline="", encoding="utf-8") as stream:
        if list(csv.reader(stream)) != [["testset_id", "text"], *rows]:
            raise ValueError(f"{sibling} does not read back as it was written.")
    sibling.replace(file)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--mode", required=True, choices=[f"{a}_{b}" for a in ("submission", "valid") for b in TASKS])
    parser.add_argument("--annotation", required=True, help='JSON: {"annotation": [{"path", "task", "testset_id"}]}')
    parser.add_argument("--prefix", default="", help="directory that the annotation's paths are under")
    parser.add_argument("--device", default=None, help="default: the GPU, where there is one")
    parser.add_argument("--corenlp", help="directory with CoreNLP's jars, for SPICE and SPIDEr")
    arguments = parser.parse_args()
    kind, task = arguments.mode.split("_")
    if (kind, task) == ("valid", "aac"):
        require_java()

    prompts = {name: TEST_PROMPTS[name] for name in TASKS[task]}
    clips = annotation_clips(arguments.annotation, arguments.prefix, prompts)[: arguments.max_clips]
    check_clips(clips, kind)
    models = {"asr": Transcriber, "aac": Answerer}  # a transcript may be of a clip of any length
    predictions = predict(
        clips,
        lambda: models[task](arguments.model, arguments.dtype, arguments.device),
        arguments.output,
        run_settings(arguments, task, [arguments.annotation]) | {"mode": arguments.mode, "prefix": arguments.prefix},
        arguments.batch_size,
    )
    if predictions is None:
        return
    write_csv(arguments.output / f"{arguments.mode}.csv", predictions)
    if kind == "valid":
        scored = (
            score_transcripts(predictions)
            if task == "asr"
            else score_caption_predictions(predictions, arguments.corenlp)
        )
    else:
        scored = {"metrics": {}}, [{} for _ in predictions]
    result = finish(arguments.output, predictions, *scored)
    for name, metric in result["metrics"].items():
        print(f"{name}: {metric['value']:.4f} ({metric['low']:.4f} to {metric['high']:.4f})")
    print(
        f"{arguments.output / arguments.mode}.csv: {len(predictions)} rows, {len(result['broken_clips'])} broken clips"
    )


if __name__ == "__main__":
    main()
