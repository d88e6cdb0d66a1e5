"""
Make questions about what is said, and captions of speech, as Parquet files to train or test on.

    python training/synthesis/make_speech_questions.py --speech bass-train.parquet names-train.parquet \\
        --output_dir data/spoken-train --per_kind 350 --captions 600 --seed 1

`--speech` has `audio` and `text`, the transcript. Written are `questions.parquet`, with `audio`, `question`, `text`
(the answer), `task` (QA), `kind` and `transcript`, and `captions.parquet`, with `audio`, `text`, `task` (audiocaption)
and `kind`. Each kind is drawn from all files alike, and in each file as often "yes" as "no":

- word: is it said? Each word is asked for twice, where it is said and where neither it, a form of it nor a word that
  sounds like it is.
- asks: does the speaker ask something? By the question mark.
- number, name: which is said? Of transcripts with exactly one; the answer is written as there.
- first word, last word. No answer of these four is more than a twentieth of its kind.

A caption says that somebody speaks and how it sounds, as far as that is known: whether the voice is deep or high, by
the median of its pitch, and whether this script made it a telephone's or added noise. It quotes no word.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from speech_captions import caption
from transcripts import Token, names_of, related, the_name, the_number, tokens

from salmonn_hf.data.clip_parquet import parquet_rows, write_clips
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.evaluation.answer_metrics import normalise_answer
from salmonn_hf.model.audio import SAMPLING_RATE, load_audio
from salmonn_hf.terminal import command

ENGLISH = yaml.safe_load(Path(__file__).with_name("speech_questions.yaml").read_text(encoding="utf-8"))
QUESTIONS = ENGLISH["questions"]
FUNCTION_WORDS, OPENERS = (set(ENGLISH[name].split()) for name in ("function_words", "openers"))


class Clip(NamedTuple):
    file: int
    index: int  # in its file
    text: str
    spoken: list[Token]


Asked = tuple[Clip, str, str]  # a clip, what fills the question's {}, the answer


def content_words(clip: Clip) -> list[str]:
    lowered = dict.fromkeys(token.word.lower() for token in clip.spoken)
    return [word for word in lowered if len(word) > 3 and word.isalpha() and word not in FUNCTION_WORDS]


def word_questions(clips: list[Clip], names: set[str], rng: np.random.Generator) -> Iterator[list[Asked]]:
    usable = [clip for clip in clips if len(clip.spoken) >= 3 and content_words(clip)]
    others = usable[len(usable) // 2 :]
    for clip in usable[: len(usable) // 2]:
        word = str(rng.choice(content_words(clip)))
        free = (n for n, other in enumerate(others) if not any(related(word, t.word.lower()) for t in other.spoken))
        if (number := next(free, None)) is not None:
            written = word.capitalize() if word in names else word
            yield [(clip, written, "yes"), (others.pop(number), written, "no")]


def asks(clip: Clip) -> bool | None:
    if "?" in clip.text:
        return True
    starts = {token.word.lower().replace("\u2019", "'") for token in clip.spoken if token.starts}
    return None if starts & OPENERS and "!" not in clip.text else False


def asks_questions(clips: list[Clip]) -> Iterator[list[Asked]]:
    yes, no = ([clip for clip in clips if asks(clip) is answer] for answer in (True, False))
    for asking, telling in zip(yes, no, strict=False):
        yield [(asking, "", "yes"), (telling, "", "no")]


def word_at(clip: Clip, place: int, names: set[str]) -> str | None:
    word = clip.spoken[place].word if len(clip.spoken) >= 3 else ""
    if not word.replace("'", "").isalpha() or (len(word) == 1 and word.lower() not in "aio"):
        return None
    if not normalise_answer(word):  # an article, which no evaluation of answers counts
        return None
    return word if word.lower() in names or word.split("'")[0] == "I" else word.lower()


def questions(kind: str, clips: list[Clip], names: set[str], rng: np.random.Generator) -> Iterator[list[Asked]]:
    """Of one file: what can be asked, in groups that belong together."""
    if kind == "word":
        yield from word_questions(clips, names, rng)
    elif kind == "asks":
        yield from asks_questions(clips)
    else:
        finders: dict[str, Callable[[Clip], str | None]] = {
            "number": lambda clip: the_number(clip.spoken),
            "name": lambda clip: the_name(clip.spoken, names),
            "first word": lambda clip: word_at(clip, 0, names),
            "last word": lambda clip: word_at(clip, -1, names),
        }
        for clip in clips:
            if answer := finders[kind](clip):
                yield [(clip, "", answer)]


def varied(groups: Iterator[list[Asked]], given: Counter[str], most: int) -> Iterator[list[Asked]]:
    """Without a single question whose answer was given so often: nobody gets far by guessing "the"."""
    for group in groups:
        answer = group[0][2].lower()
        if len(group) > 1 or given[answer] < most:
            given[answer] += 1
            yield group


def alike_from_each(sources: list[Iterator[list]], limit: int) -> list:
    """Up to `limit` items, a group of each source in turn."""
    drawn: list = []
    while sources and len(drawn) < limit:
        for source in list(sources):
            group = next(source, None)
            if group is None:
                sources.remove(source)
            elif len(drawn) + len(group) <= limit:
                drawn += group
            else:
                return drawn
    return drawn


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", nargs="+", required=True, help="Parquet files, of which each gives its share")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--per_kind", type=int, default=350, help="at most so many questions of each kind")
    parser.add_argument("--captions", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    speech = [parquet_rows([file], "text") for file in args.speech]
    texts = [list(rows["text"]) for rows in speech]
    names = names_of([text for of_file in texts for text in of_file])
    clips = [[Clip(n, i, text, tokens(text)) for i, text in enumerate(of_file)] for n, of_file in enumerate(texts)]

    def shuffled(stream: int) -> list[tuple[list[Clip], np.random.Generator]]:
        """The clips of each file in a new order, with a generator of its own: a kind does not change another."""
        rngs = [np.random.default_rng([args.seed, stream, file]) for file in range(len(clips))]
        return [([of_file[i] for i in r.permutation(len(of_file))], r) for of_file, r in zip(clips, rngs, strict=True)]

    asked, captions = [], []
    for stream, (kind, wordings) in enumerate(QUESTIONS.items()):
        given, most = Counter[str](), max(1, args.per_kind // 20)
        sources = [varied(questions(kind, of_file, names, rng), given, most) for of_file, rng in shuffled(stream)]
        rng = np.random.default_rng([args.seed, stream])
        for clip, filling, answer in alike_from_each(sources, args.per_kind):
            audio = speech[clip.file][clip.index]["audio"]
            row = {"audio": audio, "question": str(rng.choice(wordings)).format(filling), "text": answer, "task": "QA"}
            seconds = len(load_audio(audio)) / SAMPLING_RATE
            asked.append(row | {"kind": kind, "transcript": clip.text, "seconds": seconds})

    rng = np.random.default_rng([args.seed, len(QUESTIONS)])
    sources = [iter([[clip] for clip in of_file]) for of_file, _ in shuffled(len(QUESTIONS))]
    for number, clip in enumerate(alike_from_each(sources, args.captions)):
        samples, text, kind = caption(load_audio(speech[clip.file][clip.index]["audio"]), rng)
        audio = {"bytes": flac_bytes(samples), "path": f"speech-{number}.flac"}
        row = {"audio": audio, "text": text, "task": "audiocaption", "kind": kind}
        captions.append(row | {"seconds": len(samples) / SAMPLING_RATE})

    for name, rows in (("questions", asked), ("captions", captions)):
        if rows:
            write_clips(args.output_dir / f"{name}.parquet", rows, rows[0])
            print(f"{args.output_dir / name}.parquet: {len(rows)} rows")
            for kind, times in sorted(Counter(row["kind"] for row in rows).items()):
                print(f"    {kind}: {times}")


if __name__ == "__main__":
    main()
