"""
Caption a Parquet file with `audio` and `captions` columns, and score the captions against all of its references.

    python eval/run_aac.py --model CHECKPOINT --data sounds-test.parquet --output runs/eval/captions
    torchrun --nproc_per_node 4 eval/run_aac.py --model ... --data ... --output ...

CIDEr-D, METEOR, ROUGE-L and BLEU need Java and `pip install salmonn_hf[captions]`. SPICE and SPIDEr are computed
where CoreNLP 3.6.0's two jars are found, by `--corenlp` or $CORENLP_HOME; MiniLM similarity where `--minilm` names
the model. To compare with, `--baseline most_frequent` and `--baseline nearest` caption from the training captions in
`--train_data` in place of the model; "nearest" is by the encoder of `--model`. Started again with the same `--output`,
a killed run goes on where it was.
"""

from functools import partial

from salmonn_hf.data.task_prompts import TEST_PROMPTS
from salmonn_hf.evaluation.caption_baselines import BASELINES, MostFrequentCaption, NearestCaption
from salmonn_hf.evaluation.caption_metrics import require_java
from salmonn_hf.evaluation.clips import parquet_clips
from salmonn_hf.evaluation.command_line import argument_parser, evaluate, format_metric
from salmonn_hf.evaluation.scoring import score_caption_predictions
from salmonn_hf.inference import Answerer
from salmonn_hf.terminal import command


@command
def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--captions_column", default="captions", help="default: %(default)s")
    parser.add_argument("--prompt", default=TEST_PROMPTS["audiocaption"], help="default: %(default)s")
    parser.add_argument("--corenlp", help="directory with CoreNLP's jars")
    parser.add_argument("--minilm", help="all-MiniLM-L6-v2: directory or hub name")
    parser.add_argument("--baseline", choices=BASELINES, help="captions of this in place of the model's")
    parser.add_argument("--train_data", nargs="+", help="Parquet files that a baseline takes its captions from")
    arguments = parser.parse_args()
    if arguments.baseline and not arguments.train_data:
        parser.error("a baseline needs --train_data")
    require_java()  # before the model runs: what is missing should not cost that wait

    settings = {"prompt": arguments.prompt}
    if arguments.baseline:
        settings |= {"model": BASELINES[arguments.baseline], "encoder": arguments.model, "train": arguments.train_data}

    def load_model(*names):
        if not arguments.baseline:
            return Answerer(*names)
        train = parquet_clips(arguments.train_data, arguments.captions_column, references_option="captions_column")
        if arguments.baseline == "most_frequent":
            return MostFrequentCaption(train)
        return NearestCaption(train, Answerer(*names), arguments.batch_size)

    score = partial(score_caption_predictions, corenlp=arguments.corenlp, minilm=arguments.minilm)
    clips = parquet_clips(arguments.data, arguments.captions_column, arguments.prompt, None, "captions_column")
    result = evaluate(arguments, "aac", clips, load_model, score, **settings)
    if result is None:
        return
    for name, why in result["not_computed"].items():
        print(f"not computed, {name}: {why}")
    for name, metric in result["metrics"].items():
        print(f"{name:18} {format_metric(metric)}")
    print(f"of {result['clips']} clips ({len(result['broken_clips'])} broken). {arguments.note}")


if __name__ == "__main__":
    main()
