"""Transcribe the recordings beside this script and score them, or transcribe audio files of your own.

    python eval/demo.py                       # the recordings, with word error rate and speed
    python eval/demo.py interview.mp3 a.wav   # any files

The first run also fetches the base models that the checkpoint names; that is part of the set-up time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import salmonn_hf
from salmonn_hf.evaluation.word_error_rate import word_error_rate
from salmonn_hf.inference import Transcriber
from salmonn_hf.model.audio import SAMPLING_RATE

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT / "eval" / "recordings"
MODEL = ROOT / "model_cards" / "salmonn-lite-nano"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="*", help="files to transcribe; default: the project's own recordings")
    parser.add_argument("--model", default=str(MODEL), help="checkpoint directory or hub id; default: %(default)s")
    return parser.parse_args()


def transcribe_files(transcriber: Transcriber, waveforms: dict):
    for name, waveform in waveforms.items():
        (text,) = transcriber([waveform])
        print(f"{name}: {text}" if len(waveforms) > 1 else text)


def transcribe_recordings(transcriber: Transcriber, clips: list[dict], waveforms: dict, setup_seconds: float):
    references, hypotheses, spent = [], [], 0.0
    for clip, waveform in zip(clips, waveforms.values(), strict=True):
        start = time.perf_counter()
        (text,) = transcriber([waveform])
        seconds = time.perf_counter() - start
        print(f"{clip['file']}  {clip['seconds']:.1f} s of audio in {seconds:.1f} s")
        print(f"  reference:  {clip['text']}\n  hypothesis: {text}\n", flush=True)
        references.append(clip["text"])
        hypotheses.append(text)
        spent += seconds

    score = word_error_rate(references, hypotheses)
    audio_seconds = sum(len(waveform) for waveform in waveforms.values()) / SAMPLING_RATE
    print(
        f"Word error rate: {score.wer:.1%}: {score.errors} errors in {score.words} words ({score.substitutions} "
        f"substituted, {score.deletions} deleted, {score.insertions} inserted), after Whisper's English normaliser"
    )
    print(f"Set-up: {setup_seconds:.1f} s to load the model")
    speed = f"{spent:.1f} s for {audio_seconds:.1f} s of audio, real-time factor {spent / audio_seconds:.2f}"
    print(f"Transcription: {speed}")


def main() -> int:
    arguments = parse_arguments()
    lines = (RECORDINGS / "recordings.jsonl").read_text(encoding="utf-8").splitlines()
    clips = [json.loads(line) for line in lines]
    paths = arguments.audio or [str(RECORDINGS / clip["file"]) for clip in clips]
    try:  # before the model is loaded: a wrong path should not cost that wait
        waveforms = {path: salmonn_hf.load_audio(path) for path in paths}
    except (salmonn_hf.AudioError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    start = time.perf_counter()
    transcriber = Transcriber(arguments.model)
    setup_seconds = time.perf_counter() - start

    if arguments.audio:
        transcribe_files(transcriber, waveforms)
    else:
        transcribe_recordings(transcriber, clips, waveforms, setup_seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
