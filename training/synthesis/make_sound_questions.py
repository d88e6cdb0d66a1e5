"""
Make questions about captioned sounds and speech, and mixtures of both, as Parquet files to train or test on.

    python training/synthesis/make_sound_questions.py --sounds sounds-train.parquet --speech bass-train.parquet \\
        --output_dir data/sounds-train --seed 1

`--sounds` has the columns `audio`, `label` and `kind` ("sound" or "music"), `--speech` has `audio` and `text`. Written
are `questions.parquet`, with `audio`, `question`, `text` (the answer), `task` (QA) and `kind`, and
`mixtures.parquet`, speech with a sound behind it, with `audio`, `text` (the transcript) and `task` (asr). The answers
follow from labels and from what was mixed:

- Is anyone speaking? Of sounds, speech and mixtures.
- Which of five sounds is it? Of each sound, the other four labels drawn from all; and of the sound behind a voice.
- Which animal, which instrument is it? Of those that are one.
"""

import argparse
from pathlib import Path

import numpy as np
import yaml

from salmonn_hf.data.augmentation import add_noise
from salmonn_hf.data.clip_parquet import parquet_rows, write_clips
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.model.audio import SAMPLING_RATE, load_audio
from salmonn_hf.terminal import command

WORDS = yaml.safe_load(Path(__file__).with_name("sound_questions.yaml").read_text(encoding="utf-8"))
QUESTIONS = WORDS["questions"]
# By words of the labels.
VOICES, ANIMALS, INSTRUMENTS = (WORDS[kind].split() for kind in ("voices", "animals", "instruments"))


def plain(label: str) -> str:
    return label.removesuffix(" (rendered)")


def named(label: str, names: list[str]) -> bool:
    return any(word in names for word in plain(label).split())


def wording(kind: str, rng: np.random.Generator) -> str:
    return str(rng.choice(QUESTIONS[kind]))


def five_choices(label: str, labels: list[str], rng: np.random.Generator) -> str:
    options = [label, *rng.choice([other for other in labels if other != label], 4, replace=False)]
    rng.shuffle(options)
    return ", ".join(options[:4]) + " or " + options[4]


def sound_questions(row: dict, labels: list[str], rounds: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Of a sound: (kind of question, question, answer)."""
    label = plain(row["label"])
    texts = [wording("which", rng) for _ in range(rounds)]
    questions = [("which of five", text.format(five_choices(label, labels, rng)), label) for text in texts]
    if not named(label, VOICES):
        questions.append(("speech", wording("speech", rng), "no"))
    if row["kind"] == "sound" and named(label, ANIMALS):
        questions.append(("animal", wording("animal", rng), next(w for w in label.split() if w in ANIMALS)))
    if row["kind"] == "music" and named(label, INSTRUMENTS):
        questions.append(("instrument", wording("instrument", rng), label))
    return questions


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", nargs="+", required=True, help="Parquet files")
    parser.add_argument("--speech", nargs="+", required=True, help="Parquet files")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--mixtures", type=int, default=800)
    parser.add_argument("--spoken", type=int, default=800, help="speech clips that are asked about")
    parser.add_argument("--rounds", type=int, default=2, help="choices among five per sound")
    parser.add_argument("--snr", type=float, nargs=2, default=(0.0, 15.0), help="of mixtures, in dB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    sounds, speech = parquet_rows(args.sounds, "label", "kind"), parquet_rows(args.speech, "text")
    labels = sorted({plain(label) for label in sounds["label"]})
    questions, mixtures = [], []

    def ask(audio: dict, kind: str, question: str, answer: str):
        row = {"audio": audio, "question": question, "text": answer, "task": "QA", "kind": kind}
        questions.append(row | {"seconds": len(load_audio(audio)) / SAMPLING_RATE})

    for row in sounds:
        for asked in sound_questions(row, labels, args.rounds, rng):
            ask(row["audio"], *asked)

    chosen = rng.permutation(len(speech))
    for index in chosen[: args.spoken]:
        ask(speech[int(index)]["audio"], "speech", wording("speech", rng), "yes")

    behind = [index for index, label in enumerate(sounds["label"]) if not named(label, VOICES)]
    for number, index in enumerate(chosen[-args.mixtures :] if args.mixtures else []):
        spoken, sound = speech[int(index)], sounds[int(rng.choice(behind))]
        voice, label = load_audio(spoken["audio"]), plain(sound["label"])
        mixed = add_noise(voice, np.resize(load_audio(sound["audio"]), len(voice)), rng.uniform(*args.snr))
        mixed = mixed / max(1.0, float(np.abs(mixed).max()))
        audio = {"bytes": flac_bytes(mixed), "path": f"mixture-{number}.flac"}
        row = {"audio": audio, "text": spoken["text"], "task": "asr", "seconds": len(voice) / SAMPLING_RATE}
        mixtures.append(row)
        if number % 2:
            ask(audio, "speech", wording("speech", rng), "yes")
        else:
            question = wording("which_behind", rng).format(five_choices(label, labels, rng))
            ask(audio, "which of five, behind a voice", question, label)

    for name, rows in (("questions", questions), ("mixtures", mixtures)):
        if rows:
            write_clips(args.output_dir / f"{name}.parquet", rows, rows[0])
            print(f"{args.output_dir / name}.parquet: {len(rows)} rows")


if __name__ == "__main__":
    main()
