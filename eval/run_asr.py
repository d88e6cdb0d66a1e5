"""
Transcribe a Parquet file with `audio` and `text` columns and print the word error rate with its counts.

    python eval/run_asr.py --model model_cards/salmonn-lite-nano --data test.parquet --output runs/eval/nano
    python eval/run_asr.py --model model_cards/salmonn-lite-nano --peers openai/whisper-base.en --data ... --output ...
    python eval/run_asr.py --model SALMONN_DIR --data test.parquet --batch_size 1 --speculation_type ctc
    torchrun --nproc_per_node 4 eval/run_asr.py --model ... --data ... --output ...

Without `--output` (one process only) the results go to a temporary directory.
Takes SALMONN checkpoints and any other model of `pipeline("automatic-speech-recognition")`; the results of `--peers`
go to `OUTPUT/peers/NAME`. A clip that cannot be read is named and counted with an empty transcript. Started again with
the same `--output`, a killed run goes on where it was. What is written there: `salmonn_hf/evaluation.py`.
"""

import tempfile
from pathlib import Path

from salmonn_hf.evaluation.engine import argument_parser, finish, parquet_clips, predict, run_settings
from salmonn_hf.evaluation.scoring import score_transcripts
from salmonn_hf.inference import Transcriber


def main() -> None:
    parser = argument_parser(__doc__, needs_output=False)
    parser.add_argument("--data", required=True, nargs="+", help="Parquet files")
    parser.add_argument("--text_column", default="text", help="default: %(default)s")
    parser.add_argument("--device", default=None, help="default: the GPU, where there is one")
    parser.add_argument("--speculation_type", help='"ctc": drafts of the CTC head, with --batch_size 1')
    parser.add_argument("--peers", nargs="*", default=[], help="other models, to be measured on the same clips")
    arguments = parser.parse_args()

    # Without --output only the scores are wanted; several processes would each take a directory of their own.
    arguments.output = arguments.output or Path(tempfile.mkdtemp(prefix="run_asr-"))
    clips = parquet_clips(arguments.data, arguments.text_column)[: arguments.max_clips]
    outputs = {arguments.model: arguments.output}
    outputs |= {peer: arguments.output / "peers" / Path(peer).name for peer in arguments.peers}
    for model, output in outputs.items():
        settings = run_settings(arguments, "asr", arguments.data, model)
        predictions = predict(
            clips,
            lambda model=model: Transcriber(model, arguments.dtype, arguments.device, arguments.speculation_type),
            output,
            settings | {"speculation_type": arguments.speculation_type},
            arguments.batch_size,
        )
        if predictions is not None:
            result = finish(output, predictions, *score_transcripts(predictions))
            print(f"{model}: {summary(result)}")


def summary(result: dict) -> str:
    wer, cer, raw, loops = (result["metrics"][name] for name in ("wer", "cer", "wer_raw", "loops"))
    return (
        f"WER {wer['value']:.4f} ({wer['low']:.4f} to {wer['high']:.4f}): {wer['substitutions']} substitutions, "
        f"{wer['deletions']} deletions, {wer['insertions']} insertions in {wer['words']} words of {result['clips']} "
        f"clips ({len(result['broken_clips'])} broken); CER {cer['value']:.4f}, WER of the raw texts "
        f"{raw['value']:.4f}; loops in {loops['value']:.1%} of the clips"
    )


if __name__ == "__main__":
    main()
