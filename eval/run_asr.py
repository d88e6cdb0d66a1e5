"""
Transcribe a Parquet file with `audio` and `text` columns and print the word error rate with its counts.

    python eval/run_asr.py --model model_cards/salmonn-lite-nano --data test.parquet --output runs/eval/nano
    python eval/run_asr.py --model openai/whisper-base.en --data test.parquet --output runs/eval/whisper
    torchrun --nproc_per_node 4 eval/run_asr.py --model ... --data ... --output ...

Takes SALMONN checkpoints and any other model of `pipeline("automatic-speech-recognition")`, several in one run. A clip
that cannot be read is named and counted with an empty transcript. Started again with the same `--output`, a killed run
goes on where it was. What is written there: `salmonn_hf/evaluation.py`.
"""

from salmonn_hf.evaluation import argument_parser, finish, parquet_clips, predict, run_settings
from salmonn_hf.inference import Transcriber
from salmonn_hf.scoring import score_transcripts


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="Parquet files")
    parser.add_argument("--text_column", default="text", help="default: %(default)s")
    parser.add_argument("--device", default=None, help="default: the GPU, where there is one")
    arguments = parser.parse_args()

    clips = parquet_clips(arguments.data, arguments.text_column)[: arguments.max_clips]
    predictions = predict(
        clips,
        lambda: Transcriber(arguments.model, arguments.dtype, arguments.device),
        arguments.output,
        run_settings(arguments, "asr", arguments.data),
        arguments.batch_size,
    )
    if predictions is None:
        return
    result = finish(arguments.output, predictions, *score_transcripts(predictions))
    wer = result["metrics"]["wer"]
    print(
        f"WER {wer['value']:.4f} ({wer['low']:.4f} to {wer['high']:.4f}): {wer['substitutions']} substitutions, "
        f"{wer['deletions']} deletions, {wer['insertions']} insertions in {wer['words']} words of {len(clips)} clips "
        f"({len(result['broken_clips'])} broken); CER {result['metrics']['cer']['value']:.4f}, as it is "
        f"{result['metrics']['wer_raw']['value']:.4f}; loops in {result['metrics']['loops']['value']:.1%} of the clips"
    )


if __name__ == "__main__":
    main()
