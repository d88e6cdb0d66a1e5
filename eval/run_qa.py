"""
Ask the questions of a Parquet file with `audio`, `question` and `answers` columns, and print the accuracy.

    python eval/run_qa.py --model CHECKPOINT --data questions.parquet --output runs/eval/questions
    torchrun --nproc_per_node 4 eval/run_qa.py --model ... --data ... --output ...

`answers` is a string or the list of all that are right; they are compared after the normalisation of
`salmonn_hf/answer_metrics.py`. The accuracy of each `kind` of question is printed too, where there is such a column,
or else that of each question. Started again with the same `--output`, a killed run goes on where it was.
"""

from salmonn_hf.evaluation.engine import argument_parser, finish, parquet_clips, predict, run_settings
from salmonn_hf.evaluation.scoring import score_answers
from salmonn_hf.inference import Answerer


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="Parquet files")
    parser.add_argument("--question_column", default="question", help="default: %(default)s")
    parser.add_argument("--answers_column", default="answers", help="default: %(default)s")
    parser.add_argument("--device", default=None, help="default: the GPU, where there is one")
    arguments = parser.parse_args()

    clips = parquet_clips(arguments.data, arguments.answers_column, question=arguments.question_column)
    clips = clips[: arguments.max_clips]
    predictions = predict(
        clips,
        lambda: Answerer(arguments.model, arguments.dtype, arguments.device),
        arguments.output,
        run_settings(arguments, "qa", arguments.data),
        arguments.batch_size,
    )
    if predictions is None:
        return
    result = finish(arguments.output, predictions, *score_answers(predictions))
    accuracy = result["metrics"]["accuracy"]
    print(
        f"accuracy {accuracy['value']:.4f} ({accuracy['low']:.4f} to {accuracy['high']:.4f}) of {len(clips)} "
        f"questions ({len(result['broken_clips'])} with a broken clip). {arguments.note}"
    )
    parts = result["breakdowns"]["accuracy"]
    for part in parts.get("kind") or parts.get("question", ()):
        print(f"  {part['value']:.3f} of {part['clips']:4}  {part['part']}")


if __name__ == "__main__":
    main()
