"""
The four modes of the SALMONN-lite challenge: transcribe or caption the clips of an annotation file, and write the
answers by `testset_id` as CSV.

    python eval/run_submission.py --mode submission_asr --model CHECKPOINT --annotation test_asr.json \\
        --prefix /data --output runs/submission

`submission_*` writes answers alone; `valid_*` also scores them against the annotation's texts. As in the original
evaluator (nota-github/audiolm-evaluator, `evaluate_salmonn.py`) the CSV has the columns testset_id and text, and the
text is in lower case: every testset_id of the annotation, once, in its order.
"""

import csv
import io
from collections import Counter
from pathlib import Path

from salmonn_hf.data.task_prompts import TEST_PROMPTS
from salmonn_hf.evaluation.caption_metrics import require_java
from salmonn_hf.evaluation.clips import Clip, annotation_clips
from salmonn_hf.evaluation.command_line import argument_parser, evaluate, format_metric
from salmonn_hf.evaluation.scoring import score_caption_predictions as score_captions
from salmonn_hf.evaluation.scoring import score_transcripts
from salmonn_hf.files import write_atomically
from salmonn_hf.inference import Answerer, Transcriber
from salmonn_hf.terminal import command

TASKS = {"asr": ("asr",), "aac": ("audiocaption", "audiocaption_v2")}


def check_clips(clips: list[Clip], kind: str):
    """Refuse a testset_id that comes twice and, where answers are to be scored, a clip without a text."""
    name, count = Counter(clip.id for clip in clips).most_common(1)[0]
    if count > 1:
        raise ValueError(f"The testset_id {name} stands at {count} clips; correct the annotation file.")
    if kind == "valid" and (missing := [clip.id for clip in clips if not clip.references]):
        found = f"{len(missing)} clips have no text to score against, the first is {missing[0]}"
        raise ValueError(f"{found}; add it, or use a submission mode.")


def write_csv(file: Path, predictions: list[dict]):
    rows = [[line["id"], " ".join(line["hypothesis"].lower().split())] for line in predictions]
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["testset_id", "text"], *rows])
    write_atomically(file, stream.getvalue())


@command
def main() -> None:
    parser = argument_parser(__doc__, data=False)
    parser.add_argument("--mode", required=True, choices=[f"{a}_{b}" for a in ("submission", "valid") for b in TASKS])
    parser.add_argument("--annotation", required=True, help='JSON: {"annotation": [{"path", "task", "testset_id"}]}')
    parser.add_argument("--prefix", default="", help="directory that the annotation's paths are under")
    parser.add_argument("--corenlp", help="directory with CoreNLP's jars, for SPICE and SPIDEr")
    arguments = parser.parse_args()
    kind, task = arguments.mode.split("_")
    if (kind, task) == ("valid", "aac"):
        require_java()

    prompts = {name: TEST_PROMPTS[name] for name in TASKS[task]}
    clips = annotation_clips(arguments.annotation, arguments.prefix, prompts)[: arguments.max_clips]
    check_clips(clips, kind)
    csv_file = arguments.output / f"{arguments.mode}.csv"

    def score(predictions):
        write_csv(csv_file, predictions)
        if kind == "submission":
            return {"metrics": {}}, [{} for _ in predictions]
        return score_transcripts(predictions) if task == "asr" else score_captions(predictions, arguments.corenlp)

    load_model = {"asr": Transcriber, "aac": Answerer}[task]  # a transcript may be of a clip of any length
    settings = {"data": [arguments.annotation], "mode": arguments.mode, "prefix": arguments.prefix}
    result = evaluate(arguments, task, clips, load_model, score, **settings)
    if result is not None:
        for name, metric in result["metrics"].items():
            print(f"{name}: {format_metric(metric)}")
        print(f"{csv_file}: {result['clips']} rows, {len(result['broken_clips'])} broken clips")


if __name__ == "__main__":
    main()
