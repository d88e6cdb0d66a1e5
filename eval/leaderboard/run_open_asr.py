"""
The transformers script of the Open ASR Leaderboard, from a clone of it, on SALMONN:

    git clone https://github.com/huggingface/open_asr_leaderboard
    python eval/leaderboard/run_open_asr.py open_asr_leaderboard --model_id DIR_OR_NAME --dataset_path ... \
        --dataset librispeech --split test.clean --device 0 --batch_size 64 --max_new_tokens 466

The arguments after the clone are the script's own. It knows SALMONN once the package is imported; the rest is for
machines that lack what it takes for granted: on a CPU (`--device -1`) a clock in place of CUDA's, without torchcodec
the package's own decoder, and jiwer itself in place of its wrapper on the hub.
"""

import argparse
import runpy
import sys
import time
from pathlib import Path

import datasets
import evaluate
import jiwer
import torch
from transformers.utils import is_torchcodec_usable

import salmonn_hf
from salmonn_hf.terminal import command


class Clock:
    """What the script asks of `torch.cuda.Event`."""

    def __init__(self, enable_timing=True):
        self.seconds = None

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end) -> float:
        """Milliseconds."""
        return 1000 * (end.seconds - self.seconds)


def parse_args(parser, *args, parse=argparse.ArgumentParser.parse_args, **kwargs):
    """The script's `--device` is a number, -1 for the CPU, which torch calls by its name."""
    arguments = parse(parser, *args, **kwargs)
    if arguments.device < 0:
        arguments.device = "cpu"
        torch.cuda.Event, torch.cuda.synchronize = Clock, lambda device=None: None
    return arguments


class WordErrorRate:
    """`evaluate.load("wer")`, without a hub."""

    def compute(self, predictions, references) -> float:
        return jiwer.wer(list(references), list(predictions))


def decode(feature, value, token_per_repo_id=None) -> dict:
    """`datasets.Audio.decode_example` without torchcodec: the samples, beside the file that they come from."""
    rate = feature.sampling_rate or 16_000
    return {**value, "array": salmonn_hf.load_audio(value, rate), "sampling_rate": rate}


def encode(feature, value: dict) -> dict:
    """`datasets.Audio.encode_example` of what `decode` gave: the file again."""
    return {name: value[name] for name in ("bytes", "path")}


@command
def main():
    clone = Path(sys.argv[1] if len(sys.argv) > 1 else "")
    script = clone / "transformers" / "run_eval.py"
    if not script.is_file():
        sys.exit(f"{script} does not exist; give the path of a clone of open_asr_leaderboard as the first argument.")
    argparse.ArgumentParser.parse_args = parse_args
    evaluate.load = lambda name, *args, **kwargs: WordErrorRate()
    if not is_torchcodec_usable("audio"):
        datasets.Audio.decode_example, datasets.Audio.encode_example = decode, encode
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(clone.resolve()))  # for its package `normalizer`
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
