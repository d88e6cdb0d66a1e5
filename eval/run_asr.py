"""
Transcribe a Parquet file with `audio` and `text` columns and print the word error rate with its counts.

    python eval/run_asr.py --model model_cards/salmonn-lite-nano --data test.parquet --output runs/eval
    python eval/run_asr.py --model openai/whisper-base.en --data test.parquet
    python eval/run_asr.py --model SALMONN_DIR --data test.parquet --batch_size 1 --speculation_type ctc

Takes SALMONN checkpoints and any other model of `pipeline("automatic-speech-recognition")`. A clip that cannot be read
is named and counted with an empty transcript. With `--output`, every reference and transcript goes to
`transcripts.jsonl` and the counts to `result.json`.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import pipeline

from salmonn_hf import AudioError, load_audio
from salmonn_hf.base_parts import REGISTRY_COPIES, resolve_base_part
from salmonn_hf.metrics import word_error_rate
from salmonn_hf.training import load_speech


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub name")
    parser.add_argument("--data", required=True, nargs="+", help="Parquet files")
    parser.add_argument("--text_column", default="text", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="directory for transcripts.jsonl and result.json")
    parser.add_argument("--batch_size", type=int, default=16, help="clips at once; default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; default: the checkpoint's")
    parser.add_argument("--device", default=None, help="default: the GPU, where there is one")
    parser.add_argument("--speculation_type", help='"ctc": drafts of the CTC head, with --batch_size 1')
    parser.add_argument("--max_clips", type=int, help="the first of them only")
    return parser.parse_args()


def read_clips(data) -> tuple[dict[int, object], list[str]]:
    """Waveforms by row, and what is wrong with the rows that have none."""
    waveforms, broken = {}, []
    for row, clip in enumerate(data["audio"]):
        try:
            waveforms[row] = load_audio(clip)
        except AudioError as error:
            broken.append(f"row {row}: {error}")
    return waveforms, broken


def main() -> None:
    arguments = parse_arguments()
    data = load_speech(arguments.data, arguments.text_column)
    if arguments.max_clips:
        data = data.select(range(min(arguments.max_clips, len(data))))
    waveforms, broken = read_clips(data)

    model = str(resolve_base_part(arguments.model)) if arguments.model in REGISTRY_COPIES else arguments.model
    transcriber = pipeline("automatic-speech-recognition", model=model, dtype=arguments.dtype, device=arguments.device)
    if transcriber.tokenizer.pad_token is None:  # transformers' own pipeline needs one to make batches
        transcriber.tokenizer.pad_token = transcriber.tokenizer.eos_token
    # Clips of like length side by side, so that batches hold little padding; the longest first, so that a batch too
    # large for the memory fails at once.
    rows = sorted(waveforms, key=lambda row: -len(waveforms[row]))
    hypotheses = [""] * len(data)
    start = time.perf_counter()
    # One beam: transformers' own pipeline takes five unless it is told otherwise.
    generate_kwargs = {"num_beams": 1}
    if arguments.speculation_type:
        generate_kwargs["speculation_type"] = arguments.speculation_type
    results = transcriber(
        (waveforms[row] for row in rows), batch_size=arguments.batch_size, generate_kwargs=generate_kwargs
    )
    for row, result in zip(rows, tqdm(results, total=len(rows), unit="clip"), strict=True):
        hypotheses[row] = result["text"].strip()
    seconds = time.perf_counter() - start

    references = [text or "" for text in data["text"]]
    score = word_error_rate(references, hypotheses)
    audio_seconds = sum(len(waveform) for waveform in waveforms.values()) / 16000
    result = {
        "model": arguments.model,
        "data": [Path(file).name for file in arguments.data],
        **dataclasses.asdict(score),
        "clips": len(data),
        "broken_clips": broken,
        "audio_seconds": round(audio_seconds, 1),
        "seconds": round(seconds, 1),
        "real_time_factor": round(seconds / audio_seconds, 4),
        "batch_size": arguments.batch_size,
        "speculation_type": arguments.speculation_type,
        "dtype": str(transcriber.model.dtype),
        "torch": torch.__version__,
    }
    for problem in broken:
        print(f"broken clip, {problem}", file=sys.stderr)
    print(
        f"WER {score.wer:.4f}: {score.substitutions} substitutions, {score.deletions} deletions, {score.insertions} "
        f"insertions in {score.words} words of {len(data)} clips ({len(broken)} broken); real-time factor "
        f"{result['real_time_factor']}"
    )
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        with open(arguments.output / "transcripts.jsonl", "w") as file:
            for row, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
                file.write(json.dumps({"row": row, "reference": reference, "hypothesis": hypothesis}) + "\n")


if __name__ == "__main__":
    main()
