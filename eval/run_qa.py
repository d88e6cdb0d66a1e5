"""
Ask the questions of a Parquet file with `audio`, `question` and `answers` columns, and print the accuracy.

    python eval/run_qa.py --model CHECKPOINT --data questions.parquet --output runs/eval/questions
    torchrun --nproc_per_node 4 eval/run_qa.py --model ... --data ... --output ...

`answers` is a string or the list of all that are right; they are compared after the normalisation of
`salmonn_hf/evaluation/answer_metrics.py`. The accuracy of each `kind` of question is printed too, where there is such
a column, or else that of each question. Started again with the same `--output`, a killed run goes on where it was.
"""

from salmonn_hf.evaluation.clips import parquet_clips
from salmonn_hf.evaluation.command_line import argument_parser, evaluate, format_metric
from salmonn_hf.evaluation.scoring import score_answers
from salmonn_hf.inference import Answerer
from salmonn_hf.terminal import command


@command
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--question_column", default="question", help="default: %(default)s")
    parser.add_argument("--answers_column", default="answers", help="default: %(default)s")
    arguments = parser.parse_args()
    clips = parquet_clips(arguments.data, arguments.answers_column, "", arguments.question_column, "answers_column")
    result = evaluate(arguments, "qa", clips, Answerer, score_answers)
    if result is None:
        return
    print(
        f"accuracy {format_metric(result['metrics']['accuracy'])} of {result['clips']} questions "
        f"({len(result['broken_clips'])} with a broken clip). {arguments.note}"
    )
    parts = result["breakdowns"]["accuracy"]
    for part in parts.get("kind") or parts.get("question", ()):
        print(f"  {part['value']:.3f} of {part['clips']:4}  {part['part']}")


if __name__ == "__main__":
    main()
