"""
Write plain sentences with one name or one number, or one of either, for `make_synthetic_speech.py --text`.

    python training/synthesis/make_name_and_number_texts.py --split train --output data/names-train.txt --sentences 900
    python training/synthesis/make_synthetic_speech.py --text data/names-train.txt --output data/names-train.parquet \\
        --clips 800

Numbers are spelt as words. The templates and names of train and test, in `names_and_numbers.yaml`, are disjoint.
"""

import argparse
from pathlib import Path

import numpy as np
import yaml

from salmonn_hf.terminal import command

SPLITS = yaml.safe_load(Path(__file__).with_name("names_and_numbers.yaml").read_text(encoding="utf-8"))
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelt(number: int) -> str:
    """A whole number below 10,000, without "and"."""
    if number >= 100:
        size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
        rest = f" {spelt(number % size)}" if number % size else ""
        return f"{spelt(number // size)} {name}{rest}"
    if number < 20:
        return SMALL[number]
    return TENS[number // 10] + (f"-{SMALL[number % 10]}" if number % 10 else "")


def count(rng: np.random.Generator) -> str:
    # Small numbers are said most; round ones more than others.
    limit = int(rng.choice([13, 100, 1000]))
    number = int(rng.integers(2, limit))
    return spelt(number if limit < 1000 else max(100, number // 50 * 50))


def time(rng: np.random.Generator) -> str:
    hour = spelt(int(rng.integers(2, 13)))
    minute = spelt(int(rng.choice([15, 20, 30, 40, 45, 50])))
    return str(rng.choice([f"{hour} o'clock", f"half past {hour}", f"quarter to {hour}", f"{hour} {minute}"]))


def price(rng: np.random.Generator) -> str:
    return f"{count(rng)} {rng.choice(['dollars', 'pounds', 'euros'])}"


def year(rng: np.random.Generator) -> str:
    return f"{spelt(int(rng.integers(16, 20)))} {spelt(int(rng.integers(11, 100)))}"


def digits(rng: np.random.Generator) -> str:
    return " ".join(SMALL[digit] for digit in rng.integers(1, 10, 3))


NUMBERS = {"count": count, "time": time, "price": price, "year": year, "digits": digits}


def sentence(split: dict, template: str, rng: np.random.Generator) -> str:
    filled = {slot: draw(rng) for slot, draw in NUMBERS.items()}
    filled |= {slot: str(rng.choice(split[f"{slot}s"].split())) for slot in ("person", "surname", "place")}
    return template.format(**filled)


def sentences(split: dict, number: int, rng: np.random.Generator) -> list[str]:
    """Distinct sentences, of each template as many."""
    texts: dict[str, None] = {}
    for turn in range(20 * number):
        if len(texts) == number:
            break
        texts.setdefault(sentence(split, split["templates"][turn % len(split["templates"])], rng))
    return list(texts)


@command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=list(SPLITS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="the text file to write, a paragraph per sentence")
    parser.add_argument("--sentences", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    texts = sentences(SPLITS[args.split], args.sentences, np.random.default_rng(args.seed))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(texts)} sentences")


if __name__ == "__main__":
    main()
