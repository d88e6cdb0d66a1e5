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

from salmonn_hf import cli, load_audio
from salmonn_hf.default_model import default_model
from salmonn_hf.evaluation.word_error_rate import word_error_rate
from salmonn_hf.inference import Transcriber
from salmonn_hf.model.audio import SAMPLING_RATE
from salmonn_hf.terminal import command

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT / "eval" / "recordings"


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="*", help="files to transcribe; default: the project's own recordings")
    parser.add_argument("--model", default=default_model(), help="checkpoint; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.audio:
        return cli.main(["transcribe", *arguments.audio, "--model", arguments.model])
    clips = [json.loads(line) for line in (RECORDINGS / "recordings.jsonl").read_text(encoding="utf-8").splitlines()]
    waveforms = [load_audio(str(RECORDINGS / clip["file"])) for clip in clips]
    times = [time.perf_counter()]
    transcriber = Transcriber(arguments.model)
    times.append(time.perf_counter())
    hypotheses = []
    for clip, waveform in zip(clips, waveforms, strict=True):
        hypotheses += transcriber([waveform])
        times.append(time.perf_counter())
        print(f"{clip['file']}  {clip['seconds']:.1f} s of audio in {times[-1] - times[-2]:.1f} s")
        print(f"  reference:  {clip['text']}\n  hypothesis: {hypotheses[-1]}\n", flush=True)
    score = word_error_rate([clip["text"] for clip in clips], hypotheses)
    spent, length = times[-1] - times[1], sum(map(len, waveforms)) / SAMPLING_RATE
    print(
        f"Word error rate: {score.wer:.1%}: {score.errors} errors in {score.words} words ({score.substitutions} "
        f"substituted, {score.deletions} deleted, {score.insertions} inserted), after Whisper's English normaliser\n"
        f"Set-up: {times[1] - times[0]:.1f} s to load the model\n"
        f"Transcription: {spent:.1f} s for {length:.1f} s of audio, real-time factor {spent / length:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
