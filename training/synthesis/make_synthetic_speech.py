"""Make synthetic English speech with exact transcripts, as one Parquet file.

Sentences and clauses are cut out of plain English text, each is spoken by a randomly drawn eSpeak NG or Flite voice,
and half of the clips are lightly degraded (level, speed, room, noise, bandwidth). Columns: `audio` (16 kHz mono 16-bit
FLAC), `text`, `clip_id`, `source`, `speaker` and `seconds`. The same seed, text and engines give the same clips.

    apt-get install espeak-ng flite fortunes
    python training/synthesis/make_synthetic_speech.py --output data/synth-train.parquet --clips 12000 --seed 1
"""

import argparse
import io
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import soxr
import yaml
from english_texts import DEFAULT_TEXT_GLOB, default_text_files, load_texts
from speech_clips import row, trim, with_silence, write_speech

from salmonn_hf.data.clip_parquet import CLIPS_PER_GROUP
from salmonn_hf.model.audio import SAMPLING_RATE
from salmonn_hf.terminal import command

MAX_WORDS_PER_SECOND = 5.0  # above it the voice skipped words, or failed silently
PROGRAMS = ("espeak-ng", "flite")  # each in the apt package of its name

VOICES = yaml.safe_load(Path(__file__).with_name("voices.yaml").read_text(encoding="utf-8"))
FLITE, ESPEAK = VOICES["flite"], VOICES["espeak"]
STANDARD_VARIANTS, OTHER_VARIANTS = ESPEAK["standard_variants"].split(), ESPEAK["other_variants"].split()
FLITE_SHARE, STANDARD_VARIANT_SHARE = 0.35, 0.4


class Voice(NamedTuple):
    source: str  # e.g. "espeak-ng:en-us+f3"
    speaker: str  # who it sounds like: an eSpeak variant keeps its timbre in every accent
    command: list[str]  # without the text, which is the last argument


def draw_voice(rng: np.random.Generator) -> Voice:
    if rng.random() < FLITE_SHARE:
        name = str(rng.choice(list(FLITE["voices"]), p=list(FLITE["voices"].values())))
        command = ["flite", "-voice", name, "--setf", f"duration_stretch={rng.uniform(*FLITE['stretch']):.2f}"]
        if name in FLITE["pitch"]:
            command += ["--setf", f"int_f0_target_mean={rng.uniform(*FLITE['pitch'][name]):.0f}"]
        return Voice(f"flite:{name}", f"flite-{name}", [*command, "-o", "/dev/stdout", "-t"])
    accent = str(rng.choice(list(ESPEAK["accents"]), p=list(ESPEAK["accents"].values())))
    variant = str(rng.choice(STANDARD_VARIANTS if rng.random() < STANDARD_VARIANT_SHARE else OTHER_VARIANTS))
    speed, pitch = (rng.integers(*ESPEAK[name], endpoint=True) for name in ("words_per_minute", "pitch"))
    voice = f"{accent}+{variant}"
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", "--"]
    return Voice(f"espeak-ng:{voice}", f"espeak-ng-{variant}", command)


def synthesize(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    """Return the engine's samples and their rate."""
    done = subprocess.run([*voice.command, text], capture_output=True, check=True)
    return sf.read(io.BytesIO(done.stdout), dtype="float32")


def make_clip(task: tuple[int, int, str]) -> dict | None:
    """Speak, degrade and encode one text; None if the speech does not fit the text."""
    seed, number, text = task
    rng = np.random.default_rng([seed, 1, number])
    voice = draw_voice(rng)
    degraded = rng.random() < 0.5
    speed = rng.uniform(0.9, 1.1) if degraded and rng.random() < 0.5 else 1.0

    samples, rate = synthesize(voice, text)
    # Resampling from a rate that is off by the factor changes speed and pitch together, like a tape.
    samples = trim(soxr.resample(samples, rate * speed, SAMPLING_RATE))
    samples = with_silence(samples, text, rng, MAX_WORDS_PER_SECOND)
    if samples is None:
        return None
    return row(samples, degraded, rng, text, f"synth-{seed}-{number:06d}", voice.source, voice.speaker)


def make_clips(texts: list[str], clips: int, seed: int, workers: int) -> Iterator[dict]:
    """Exactly `clips` clips."""
    numbers, made, attempts = count(), 0, 0
    # Spawned, since forking after Arrow has started its threads can hang.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        while made < clips:
            if attempts > 2 * clips + 100:
                sys.exit(f"only {made} of {attempts} clips were plausible: check the voices")
            # Numbers go on past the last text, so a text that comes again gets another voice.
            batch = list(islice(numbers, min(CLIPS_PER_GROUP, clips - made)))
            tasks = [(seed, number, texts[number % len(texts)]) for number in batch]
            for clip in pool.imap(make_clip, tasks, chunksize=4):
                if clip:
                    made += 1
                    yield clip
            attempts += len(batch)
            print(f"{made}/{clips} clips, {attempts - made} dropped", flush=True)


@command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--clips", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", type=Path, nargs="+", help=f"English text (default: {DEFAULT_TEXT_GLOB})")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)

    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        sys.exit(f"{', '.join(missing)} not found: apt-get install {' '.join(missing)}")
    paths = args.text or default_text_files()
    if not paths:
        sys.exit(f"no text in {DEFAULT_TEXT_GLOB}: apt-get install fortunes, or name files with --text")
    texts = load_texts(paths, args.seed)
    if not texts:
        sys.exit("the text has no usable sentence")
    print(f"{len(texts)} texts from {len(paths)} files", flush=True)
    write_speech(args.output, make_clips(texts, args.clips, args.seed, args.workers))


if __name__ == "__main__":
    main()
