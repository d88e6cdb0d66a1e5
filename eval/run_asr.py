"""
Transcribe a Parquet file with `audio` and `text` columns and print the word error rate with its counts.

    python eval/run_asr.py --model model_cards/salmonn-lite-nano --data test.parquet --output runs/eval/nano
    python eval/run_asr.py --model model_cards/salmonn-lite-nano --peers openai/whisper-base.en --data ... --output ...
    python eval/run_asr.py --model SALMONN_DIR --data test.parquet --batch_size 1 --speculation_type ctc
    torchrun --nproc_per_node 4 eval/run_asr.py --model ... --data ... --output ...

Without `--output` (one process only) the results go to a temporary directory.
Takes SALMONN checkpoints and any other model of `pipeline("automatic-speech-recognition")`; the results of `--peers`
go to `OUTPUT/peers/NAME`. A clip that cannot be read is named and counted with an empty transcript. Started again with
the same `--output`, a killed run goes on where it was. What is written there: `docs/evaluation.md`.
"""

import tempfile
from functools import partial
from pathlib import Path

from salmonn_hf.evaluation.clips import parquet_clips
from salmonn_hf.evaluation.command_line import argument_parser, evaluate, format_metric
from salmonn_hf.evaluation.scoring import score_transcripts
from salmonn_hf.inference import Transcriber
from salmonn_hf.terminal import command


@command
def main() -> None:
    parser = argument_parser(__doc__, needs_output=False)
    parser.add_argument("--text_column", default="text", help="default: %(default)s")
    parser.add_argument("--speculation_type", help='"ctc": drafts of the CTC head, with --batch_size 1')
    parser.add_argument("--peers", nargs="*", default=[], help="other models, to be measured on the same clips")
    arguments = parser.parse_args()

    # Without --output only the scores are wanted; several processes would each take a directory of their own.
    output = arguments.output or Path(tempfile.mkdtemp(prefix="run_asr-"))
    clips = parquet_clips(arguments.data, arguments.text_column)
    speculation = {"speculation_type": arguments.speculation_type}
    for model in [arguments.model, *arguments.peers]:
        arguments.output = output / "peers" / Path(model).name if model in arguments.peers else output
        arguments.model = model
        load_model = partial(Transcriber, **speculation)
        if (result := evaluate(arguments, "asr", clips, load_model, score_transcripts, **speculation)) is None:
            continue
        wer, cer, raw, loops = (result["metrics"][name] for name in ("wer", "cer", "wer_raw", "loops"))
        print(
            f"{model}: WER {format_metric(wer)}: {wer['substitutions']} substitutions, {wer['deletions']} deletions, "
            f"{wer['insertions']} insertions in {wer['words']} words of {result['clips']} clips "
            f"({len(result['broken_clips'])} broken); CER {cer['value']:.4f}, WER of the raw texts {raw['value']:.4f}"
            f"; loops in {loops['value']:.1%} of the clips"
        )


if __name__ == "__main__":
    main()
