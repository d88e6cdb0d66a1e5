"""
Make questions about what is said, and captions of speech, as Parquet files to train or test on.

    python training/synthesis/make_speech_questions.py --speech bass-train.parquet names-train.parquet \\
        --output_dir data/spoken-train --per_kind 350 --captions 600 --seed 1

`--speech` has `audio` and `text`, the transcript. Written are `questions.parquet`, with `audio`, `question`, `text` (the
answer), `task` (QA), `kind` and `transcript`, and `captions.parquet`, with `audio`, `text`, `task` (audiocaption) and
`kind`. Each kind is drawn from all files alike, and in each file as often "yes" as "no":

- word: is it said? Each word is asked for twice, where it is said and where neither it, a form of it nor a word that
  sounds like it is.
- asks: does the speaker ask something? By the question mark.
- number, name: which is said? Of transcripts with exactly one; the answer is written as there.
- first word, last word. No answer of these four is more than a twentieth of its kind.

A caption says that somebody speaks and how it sounds, as far as that is known: whether the voice is deep or high, by the
median of its pitch, and whether this script made it a telephone's or added noise. It quotes no word.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from salmonn_hf.data.augmentation import add_noise
from salmonn_hf.data.clip_parquet import parquet_rows, write_clips
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.model.audio import SAMPLING_RATE, load_audio
from salmonn_hf.terminal import command

ENGLISH = yaml.safe_load(Path(__file__).with_name("speech_questions.yaml").read_text(encoding="utf-8"))
QUESTIONS, CAPTIONS = ENGLISH["questions"], ENGLISH["captions"]
FUNCTION_WORDS, OPENERS, UNCERTAIN_NUMBERS, TITLES, UNCERTAIN_NAMES = (
    set(ENGLISH[name].split()) for name in ("function_words", "openers", "uncertain_numbers", "titles", "uncertain_names")
)
ALIKE: dict[str, set[str]] = {}
for line in ENGLISH["alike"]:
    for word in line.split():
        ALIKE.setdefault(word, set()).update(line.split())

UNITS = set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
)
MAGNITUDES = {"hundred", "thousand", "million", "billion"}
TOKEN = re.compile(r"[A-Za-z0-9]+(?:['\u2019-][A-Za-z0-9]+)*")
NAME = re.compile(r"[A-Z][a-z]+(-[A-Z][a-z]+)*")

DEEP_HZ, HIGH_HZ = 125.0, 190.0  # what lies between is neither
TELEPHONE_SHARE, NOISE_SHARE, NOISE_DB = 0.3, 0.3, (0.0, 12.0)


class Token(NamedTuple):
    word: str
    before: str  # what stands between it and the one before
    starts: bool  # whether a sentence starts here


def tokens(text: str) -> list[Token]:
    found: list[Token] = []
    end = 0
    for match in TOKEN.finditer(text):
        before = text[end : match.start()]
        stops = re.search(r"[.?!:;\"\u201c]", before) and not (
            before.strip() == "." and found[-1:] and found[-1].word.lower() in TITLES
        )
        found.append(Token(match.group(), before, not found or bool(stops)))
        end = match.end()
    return found


def names_of(texts: list[str]) -> set[str]:
    """Words (in lower case) that stand inside a sentence with a capital more often than without one."""
    capitals, small = Counter[str](), Counter[str]()
    for token in (token for text in texts for token in tokens(text)):
        if token.word[0].islower():
            small[token.word.lower()] += 1
        elif not token.starts and NAME.fullmatch(token.word):
            capitals[token.word.lower()] += 1
    known = TITLES | UNCERTAIN_NAMES | {"i"}
    return {word for word, times in capitals.items() if times > small[word] and word not in known}


def the_name(spoken: list[Token], names: set[str]) -> str | None:
    """The only name, without titles; None if there is none, are several, or may be."""
    runs: list[list[str]] = []
    last = None
    for position, token in enumerate(spoken):
        word = token.word.lower()
        if word in TITLES or (word not in names and token.starts) or word == "i" or word.startswith(("i'", "i\u2019")):
            continue
        if token.word[0].isupper() or word in names:
            plural = word.endswith("s") and word[:-1] in names
            if token.starts or word not in names or plural or not NAME.fullmatch(token.word):
                return None
            if last == position - 1 and token.before == " ":
                runs[-1].append(token.word)
            else:
                runs.append([token.word])
            last = position
    return " ".join(runs[0]) if len(runs) == 1 and len(runs[0]) < 4 else None


def the_number(spoken: list[Token]) -> str | None:
    """The only number, as it is written; None if there is none, are several, or may be."""
    runs: list[str] = []
    last = None
    for position, token in enumerate(spoken):
        word = token.word.lower()
        parts = word.split("-")
        if all(part in UNITS or part in MAGNITUDES or part.isdigit() for part in parts):
            joined = last is not None and (
                (last == position - 1 and token.before == " ")
                or (last == position - 2 and spoken[position - 1].word == "and" and runs[-1].split()[-1] in MAGNITUDES)
            )
            if joined:
                between = " and " if last == position - 2 else " "
                runs[-1] += between + token.word
            else:
                runs.append(token.word)
            last = position
        elif word in UNCERTAIN_NUMBERS or any(part in UNITS or re.search(r"\d", part) for part in parts):
            return None
    # "One" is a pronoun more often than a number, and "a hundred" is less than a number.
    sure = len(runs) == 1 and runs[0].lower() != "one" and not set(runs[0].lower().split()) <= MAGNITUDES
    return runs[0] if sure else None


def stem(word: str) -> str:
    for suffix in ("ingly", "ing", "edly", "ied", "ies", "iest", "ier", "ed", "es", "est", "er", "ly", "s", "e", "y"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix)
            return word[:-1] if word[-1] == word[-2] else word
    return word


def related(a: str, b: str) -> bool:
    """Whether two words may be forms of one, one holds the other, or they sound alike. Errs on the side of yes."""
    stems = stem(a), stem(b)
    if b in ALIKE.get(a, ()) or stems[0] == stems[1]:
        return True
    return (len(stems[0]) >= 4 and stems[0] in b) or (len(stems[1]) >= 4 and stems[1] in a)


class Clip(NamedTuple):
    file: int
    index: int  # in its file
    text: str
    spoken: list[Token]


Asked = tuple[Clip, str, str]  # a clip, what fills the question's {}, the answer


def content_words(clip: Clip) -> list[str]:
    lowered = dict.fromkeys(token.word.lower() for token in clip.spoken)
    return [word for word in lowered if len(word) > 3 and word.isascii() and word.isalpha() and word not in FUNCTION_WORDS]


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


def median_pitch(samples: np.ndarray) -> float | None:
    """Median of the pitch in Hz of voiced frames, by autocorrelation; None for fewer than ten."""
    size, hop = SAMPLING_RATE // 25, SAMPLING_RATE // 50
    if len(samples) < 10 * size:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    frames = frames - frames.mean(1, keepdims=True)
    power = (frames**2).sum(1)
    frames = frames[power > 0.05 * np.quantile(power, 0.95)]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(size), 2 * size)) ** 2
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)
    correlation = np.fft.irfft(spectra)[:, : size // 2] / window[: size // 2]
    correlation /= np.maximum(correlation[:, :1], 1e-12)
    shortest, longest = SAMPLING_RATE // 400, SAMPLING_RATE // 65
    within = correlation[:, shortest:longest]
    within = within[within.max(1) > 0.6]
    if len(within) < 10:
        return None
    # The first lag that is nearly the best, then its peak: twice a period fits as well as a period.
    first = (within > 0.92 * within.max(1, keepdims=True)).argmax(1)
    peaks = [lag + int(row[lag : lag + 12].argmax()) for lag, row in zip(first, within, strict=True)]
    return float(np.median(SAMPLING_RATE / (np.array(peaks) + shortest)))


def telephone(samples: np.ndarray) -> np.ndarray:
    """Only what lies between 300 and 3,400 Hz, in the 8 bits of a telephone's mu-law."""
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLING_RATE)
    band = 1 / np.sqrt((1 + (300 / np.maximum(frequencies, 1)) ** 8) * (1 + (frequencies / 3400) ** 24))
    samples = np.fft.irfft(np.fft.rfft(samples) * band, len(samples))
    scale = np.abs(samples).max(initial=1e-9)
    bits = np.round(127 * np.log1p(255 * np.abs(samples) / scale) / np.log(256)) / 127
    return np.sign(samples) * scale * (256**bits - 1) / 255


def noise_for(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White, or pink, whose power falls with frequency."""
    noise = rng.standard_normal(len(samples))
    if rng.random() < 0.5:
        return noise
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLING_RATE)
    return np.fft.irfft(np.fft.rfft(noise) / np.sqrt(np.maximum(frequencies, 50)), len(samples))


def caption(samples: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """A clip, perhaps made worse; what is said of it; which kind that is."""
    pitch = median_pitch(samples)
    voice = "voice" if pitch is None or DEEP_HZ < pitch < HIGH_HZ else "deep" if pitch <= DEEP_HZ else "high"
    text, drawn = str(rng.choice(CAPTIONS[voice])), rng.random()
    if drawn > TELEPHONE_SHARE + NOISE_SHARE:
        return samples, f"{text}.", voice
    over = "telephone" if drawn < TELEPHONE_SHARE else "noise"
    if over == "telephone":
        samples = telephone(samples)
    else:
        samples = add_noise(samples, noise_for(samples, rng), rng.uniform(*NOISE_DB))
        samples = samples / max(1.0, float(np.abs(samples).max()))
    return samples, f"{text}, {rng.choice(CAPTIONS[over])}.", f"{voice}, {over}"


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
