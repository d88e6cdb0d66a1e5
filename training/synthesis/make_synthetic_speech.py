"""Make synthetic English speech with exact transcripts, as one Parquet file.

Sentences and clauses are cut out of plain English text, each is read by a randomly drawn eSpeak NG or Flite voice,
half of the clips are lightly degraded (level, speed, room, noise, bandwidth), and the result is written with the
columns `audio` (16 kHz mono 16-bit FLAC, the `datasets` Audio form), `text`, `clip_id`, `source`, `speaker` and
`seconds`. The same seed, text and engine versions give the same clips, whatever the number of workers.

    apt-get install espeak-ng flite fortunes
    python training/make_synthetic_speech.py --output synth-train.parquet --clips 12000 --seed 1 --workers 2
"""

import argparse
import glob
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import soxr

SAMPLE_RATE = 16_000
ROW_GROUP_CLIPS = 200
MIN_WORDS, MAX_WORDS = 2, 20
MIN_SECONDS, MAX_SECONDS = 0.5, 12.0
# Outside these bounds the voice spelled something out, skipped words, or failed silently.
MIN_WORDS_PER_SECOND, MAX_WORDS_PER_SECOND = 1.0, 5.0

# The glob does not descend, so the offensive collections, which live in a directory of their own, stay out.
DEFAULT_TEXT_GLOB = "/usr/share/games/fortunes/*"
# Index files and duplicates under another name.
SKIPPED_SUFFIXES = {".dat", ".u8"}
# Drawings, code, and fortunes in other languages.
SKIPPED_NAMES = {"ascii-art", "perl", "translate-me"}

APT_PACKAGES = {"espeak-ng": "espeak-ng", "flite": "flite"}


def word_list(words: str) -> list[str]:
    return words.split()


# ---------------------------------------------------------------------------------------------------------- voices

FLITE_SHARE = 0.35
# The recorded voices sound far more natural than the diphone ones (kal16, kal), which only add variety.
FLITE_VOICES = {"rms": 0.3, "slt": 0.3, "awb": 0.3, "kal16": 0.07, "kal": 0.03}
# Mean pitch in Hz, near that of the recorded speaker; rms ignores the setting.
FLITE_PITCH_HZ = {"slt": (150, 200), "awb": (105, 150), "kal16": (85, 130), "kal": (85, 130)}
FLITE_STRETCH = (0.85, 1.2)

ESPEAK_ACCENTS = {
    "en-us": 0.4,
    "en-gb": 0.2,
    "en-gb-x-rp": 0.1,
    "en-gb-scotland": 0.08,
    "en-gb-x-gbclan": 0.06,
    "en-gb-x-gbcwmd": 0.06,
    "en-us-nyc": 0.06,
    "en-029": 0.04,
}
# Of `espeak-ng --voices=variant`, those meant to be people: no whispers, robots, monsters or test voices. Some listed
# variants (Gustave, Marcelo, Miguel) do not load, and eSpeak silently uses its default voice; they are left out too.
ESPEAK_STANDARD_VARIANTS = [f"m{n}" for n in range(1, 9)] + [f"f{n}" for n in range(1, 6)]
ESPEAK_OTHER_VARIANTS = word_list(
    "adam Alex Alicia Andrea Andy Annie antonio aunty belinda benjamin boris david Denis Diogo ed edward edward2 Gene "
    "Gene2 grandma grandpa Henrique Hugo iven iven2 iven3 iven4 Jacky john klatt klatt2 klatt3 klatt4 Lee linda Marco "
    "Mario max Michael michel Mike Nguyen pablo paul pedro quincy RicishayMax RicishayMax2 RicishayMax3 rob robert "
    "sandro shelby steph steph2 steph3 travis victor zac anika"
)
ESPEAK_STANDARD_SHARE = 0.4
ESPEAK_WORDS_PER_MINUTE = (130, 210)
ESPEAK_PITCH = (25, 75)

# ------------------------------------------------------------------------------------------------------------ text

# Read out as another word ("Dr." as "doctor", "St." as "street"), or their full stop does not end a sentence.
ABBREVIATIONS = set(
    word_list(
        "mr mrs ms dr st jr sr prof gen col lt sgt capt rev hon gov sen rep vs etc inc ltd co corp vol ed fig no dept "
        "ave blvd mt ft jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun "
        "am pm esq ca cf al approx messrs phd adj adv"
    )
)
# Those that are more often words of their own.
ORDINARY_WORDS = {"no", "am", "sun", "sat", "fig", "mar"}
# Common words of which real English of some length has at least one; tells it from Latin, French, lists and names.
COMMON_WORDS = set(
    word_list(
        "a about all an and are as at be been but by can do for from had has have he her him his how i if in into is "
        "it its me my no not of on one or our out she so than that the their them then there they this to up us was "
        "we were what when which who will with would you your it's don't i'm you're that's can't i'll never always "
        "any only"
    )
)
SINGLE_LETTER_WORDS = {"a", "i", "o"}
WORD = re.compile(r"'?[A-Za-z]+(?:['-][A-Za-z]+)*'?")
CLIP_TEXT = re.compile(r"[A-Za-z' .,?!-]+")


def default_text_files() -> list[Path]:
    paths = (Path(name) for name in sorted(glob.glob(DEFAULT_TEXT_GLOB)))
    return [p for p in paths if p.is_file() and p.suffix not in SKIPPED_SUFFIXES and p.name not in SKIPPED_NAMES]


def read_paragraphs(path: Path) -> Iterator[str]:
    """Yield the paragraphs of a text or fortunes file, each on one line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    # Fortunes are separated by a line with only "%".
    for fortune in re.split(r"(?m)^%\s*$", text):
        # The attribution ("\t\t-- Mark Twain, ...") runs to the end of the fortune.
        fortune = re.split(r"(?m)^\s*--", fortune)[0]
        for paragraph in re.split(r"\n\s*\n|\n(?=\t)", fortune):
            # A line that starts with a capital after one without final punctuation is a verse or list item: keeping
            # it apart avoids run-on sentences, at the price of cutting some prose at a name.
            lines = re.sub(r"(?<=[^.,?!;:\s])[ \t]*\n(?=[A-Z][a-z]+ [a-z])", ".\n", paragraph.strip())
            yield " ".join(lines.split())


def speakable(text: str) -> bool:
    """Whether every voice should say exactly these words."""
    if not CLIP_TEXT.fullmatch(text):
        return False
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return False
    bare_words = [word.rstrip(".,?!") for word in words]
    for word in bare_words:
        if not WORD.fullmatch(word):
            return False
        lower = word.lower().strip("'")
        if len(lower) == 1 and lower not in SINGLE_LETTER_WORDS:
            return False
        # Capitals inside a word mark acronyms and names of programs ("USA", "XTerm"), often spelled out.
        if any(not part[1:].islower() for part in re.split(r"['-]", word.strip("'")) if len(part) > 1):
            return False
        if lower in ABBREVIATIONS - ORDINARY_WORDS:
            return False
        if not re.search(r"[aeiouy]", lower) or re.search(r"(.)\1\1", lower):
            return False
    return len(words) < 5 or any(word.lower() in COMMON_WORDS for word in bare_words)


def split_clips(paragraph: str, rng: np.random.Generator) -> Iterator[str]:
    """Cut one paragraph in sentences, and long or randomly chosen sentences further at their commas."""
    paragraph = paragraph.replace("\u2019", "'").replace('"', "").replace("``", "").replace("''", "")
    # The full stop of an abbreviation or initial does not end the sentence. Turned into a character that is not
    # speakable, it makes the whole sentence go.
    abbreviations = "|".join(sorted(ABBREVIATIONS - ORDINARY_WORDS))
    paragraph = re.sub(rf"(?i)(?<![\w'])({abbreviations}|[a-z])\.(?=\s)", r"\1_", paragraph)
    for sentence in re.split(r"(?<=[.?!])\s+|\s*(?:[;:]|\.\.+|--+)\s*|\s-\s", paragraph):
        if not sentence:
            continue
        parts = [sentence]
        if len(sentence.split()) > MAX_WORDS or rng.random() < 0.25:
            target = rng.integers(3, 15)
            parts = []
            for piece in sentence.split(", "):
                if parts and len(parts[-1].split()) < target:
                    parts[-1] += ", " + piece
                else:
                    parts.append(piece)
        yield from (part.strip(" ,-") for part in parts)


def load_texts(paths: list[Path], seed: int) -> list[str]:
    """Return the distinct speakable clips of the files, shuffled."""
    rng = np.random.default_rng([seed, 0])
    texts = {}
    for path in paths:
        for paragraph in read_paragraphs(path):
            for text in split_clips(paragraph, rng):
                if speakable(text):
                    texts.setdefault(re.sub(r"[^a-z' ]", "", text.lower()), text)
    clips = list(texts.values())
    rng.shuffle(clips)
    return clips


# ------------------------------------------------------------------------------------------------------- synthesis


class Voice(NamedTuple):
    source: str  # what reproduces the voice, e.g. "espeak-ng:en-us+f3"
    speaker: str  # who it sounds like: an eSpeak variant keeps its timbre in every accent
    command: list[str]  # without the text, which is the last argument


def draw_voice(rng: np.random.Generator) -> Voice:
    if rng.random() < FLITE_SHARE:
        name = str(rng.choice(list(FLITE_VOICES), p=list(FLITE_VOICES.values())))
        command = ["flite", "-voice", name, "--setf", f"duration_stretch={rng.uniform(*FLITE_STRETCH):.2f}"]
        if name in FLITE_PITCH_HZ:
            command += ["--setf", f"int_f0_target_mean={rng.uniform(*FLITE_PITCH_HZ[name]):.0f}"]
        return Voice(f"flite:{name}", f"flite-{name}", [*command, "-o", "/dev/stdout", "-t"])
    accent = str(rng.choice(list(ESPEAK_ACCENTS), p=list(ESPEAK_ACCENTS.values())))
    standard = rng.random() < ESPEAK_STANDARD_SHARE
    variant = str(rng.choice(ESPEAK_STANDARD_VARIANTS if standard else ESPEAK_OTHER_VARIANTS))
    speed, pitch = rng.integers(*ESPEAK_WORDS_PER_MINUTE, endpoint=True), rng.integers(*ESPEAK_PITCH, endpoint=True)
    voice = f"{accent}+{variant}"
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", "--"]
    return Voice(f"espeak-ng:{voice}", f"espeak-ng-{variant}", command)


def synthesize(voice: Voice, text: str) -> tuple[np.ndarray, int]:
    """Return the engine's samples and their rate."""
    done = subprocess.run([*voice.command, text], capture_output=True, check=True)
    samples, rate = sf.read(io.BytesIO(done.stdout), dtype="float32")
    return samples, rate


def trim(samples: np.ndarray, margin: float = 0.02) -> np.ndarray:
    """Cut the engine's own silence off both ends."""
    # The engines' silence is nearly digital, so a low threshold keeps soft first and last consonants.
    loud = np.flatnonzero(np.abs(samples) > 0.004 * np.abs(samples).max(initial=0))
    if not loud.size:
        return samples[:0]
    extra = int(margin * SAMPLE_RATE)
    return samples[max(loud[0] - extra, 0) : loud[-1] + extra + 1]


def convolve(samples: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    size = 1 << (len(samples) + len(kernel) - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(kernel, size), size)[: len(samples)]


def add_reverb(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small room: the direct sound, then quiet noise that falls by 60 dB in the reverberation time."""
    reverberation_time = rng.uniform(0.1, 0.4)
    seconds = np.arange(int(reverberation_time * SAMPLE_RATE)) / SAMPLE_RATE
    response = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / reverberation_time)
    response[: int(0.002 * SAMPLE_RATE)] = 0  # nothing can echo before the nearest wall
    reverberant_to_direct_db = rng.uniform(-18, -6)
    response *= 10 ** (reverberant_to_direct_db / 20) / np.linalg.norm(response)
    response[0] = 1
    return convolve(samples, response)


def add_noise(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(len(samples))
    if rng.random() < 0.5:  # pink: power falls with frequency
        spectrum = np.fft.rfft(noise)
        frequencies = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE)
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(frequencies, 50)), len(noise))
    snr_db = rng.uniform(15, 35)
    return samples + noise * np.linalg.norm(samples) / np.linalg.norm(noise) * 10 ** (-snr_db / 20)


def low_pass(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(samples)
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    cutoff = rng.uniform(3500, 8000)
    return np.fft.irfft(spectrum / np.sqrt(1 + (frequencies / cutoff) ** 16), len(samples))


def with_silence(
    samples: np.ndarray, text: str, rng: np.random.Generator, max_words_per_second: float
) -> np.ndarray | None:
    """Speech with a moment of silence on either side; None if it is too slow, too fast, too short or too long."""
    words_per_second = len(text.split()) / max(len(samples) / SAMPLE_RATE, 1e-3)
    if not MIN_WORDS_PER_SECOND <= words_per_second <= max_words_per_second:
        return None
    before, after = (np.zeros(int(rng.uniform(0, 0.3) * SAMPLE_RATE)) for _ in range(2))
    samples = np.concatenate([before, samples, after])
    return samples if MIN_SECONDS <= len(samples) / SAMPLE_RATE <= MAX_SECONDS else None


def degrade(samples: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """The samples with some of room, noise and a narrower band, and a gain in dB to give them."""
    for effect in (add_reverb, add_noise, low_pass):
        if rng.random() < 0.5:
            samples = effect(samples, rng)
    return samples, rng.uniform(-20, 0)


def row(samples: np.ndarray, gain_db: float, text: str, clip_id: str, source: str, speaker: str) -> dict:
    """A clip as it is written: at 16 kHz, `gain_db` against full level."""
    # The voices differ in level; 0.9 leaves room for the rounding of the encoder.
    samples = samples * (0.9 / np.abs(samples).max() * 10 ** (gain_db / 20))
    flac = io.BytesIO()
    sf.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return {
        "audio": {"bytes": flac.getvalue(), "path": f"{clip_id}.flac"},
        "text": text,
        "clip_id": clip_id,
        "source": source,
        "speaker": speaker,
        "seconds": len(samples) / SAMPLE_RATE,
    }


def make_clip(task: tuple[int, int, str]) -> dict | None:
    """Speak, degrade and encode one text; None if the speech does not fit the text."""
    seed, number, text = task
    rng = np.random.default_rng([seed, 1, number])
    voice = draw_voice(rng)
    degraded = rng.random() < 0.5
    speed = rng.uniform(0.9, 1.1) if degraded and rng.random() < 0.5 else 1.0

    samples, rate = synthesize(voice, text)
    # Resampling from a rate that is off by the factor changes speed and pitch together, like a tape.
    samples = trim(soxr.resample(samples, rate * speed, SAMPLE_RATE))
    samples = with_silence(samples, text, rng, MAX_WORDS_PER_SECOND)
    if samples is None:
        return None
    gain_db = 0.0
    if degraded:
        samples, gain_db = degrade(samples, rng)
    return row(samples, gain_db, text, f"synth-{seed}-{number:06d}", voice.source, voice.speaker)


# ---------------------------------------------------------------------------------------------------------- output


def schema() -> pa.Schema:
    # Imported here because it is slow and the workers do not need it.
    from datasets import Audio, Features, Value

    strings = {name: Value("string") for name in ("text", "clip_id", "source", "speaker")}
    # The schema's metadata makes `load_dataset` see the column as Audio, not as a struct.
    return Features({"audio": Audio(SAMPLE_RATE), **strings, "seconds": Value("float32")}).arrow_schema


def require_programs() -> None:
    missing = [program for program in APT_PACKAGES if shutil.which(program) is None]
    if missing:
        packages = " ".join(APT_PACKAGES[program] for program in missing)
        sys.exit(f"{', '.join(missing)} not found: apt-get install {packages}")


def write_clips(output: Path, texts: list[str], clips: int, seed: int, workers: int) -> list[dict]:
    """Write exactly `clips` clips and return their rows without the audio."""
    rows, attempts = [], 0
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with (
        # Spawned, since forking after Arrow has started its threads can hang.
        multiprocessing.get_context("spawn").Pool(workers) as pool,
        # The audio is compressed already.
        pq.ParquetWriter(partial, schema(), compression="zstd", compression_level=1) as writer,
    ):
        while len(rows) < clips:
            wanted = min(ROW_GROUP_CLIPS, clips - len(rows))
            group = []
            while len(group) < wanted:
                if attempts > 2 * clips + 100:
                    sys.exit(f"only {len(rows) + len(group)} of {attempts} clips were plausible: check the voices")
                # Numbers go on past the last text, so a text that comes again gets another voice.
                numbers = range(attempts, attempts + wanted - len(group))
                attempts = numbers.stop
                tasks = [(seed, number, texts[number % len(texts)]) for number in numbers]
                group += [clip for clip in pool.imap(make_clip, tasks, chunksize=4) if clip]
            writer.write_table(pa.Table.from_pylist(group, schema=writer.schema))
            rows += [{name: value for name, value in clip.items() if name != "audio"} for clip in group]
            print(f"{len(rows)}/{clips} clips, {attempts - len(rows)} dropped", flush=True)
    os.replace(partial, output)
    return rows


def report(rows: list[dict], elapsed: float) -> None:
    seconds = np.array([row["seconds"] for row in rows])
    words = np.array([len(row["text"].split()) for row in rows])
    flite = np.mean([row["source"].startswith("flite:") for row in rows])
    print(f"{len(rows)} clips, {seconds.sum() / 3600:.2f} hours, made in {elapsed:.0f} s")
    for name, values in (("seconds", seconds), ("words", words), ("words per second", words / seconds)):
        quantiles = " ".join(f"{q:.2f}" for q in np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))
        print(f"{name}: mean {values.mean():.2f}; min, 5, 25, 50, 75, 95 %, max: {quantiles}")
    sources, speakers = ({row[name] for row in rows} for name in ("source", "speaker"))
    print(f"{flite:.0%} flite, {len(sources)} voices, {len(speakers)} speakers")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--clips", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--text", type=Path, nargs="+", help=f"English text or fortunes files (default: those of {DEFAULT_TEXT_GLOB})"
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)

    require_programs()
    paths = args.text or default_text_files()
    if not paths:
        sys.exit(f"no text in {DEFAULT_TEXT_GLOB}: apt-get install fortunes, or name files with --text")
    texts = load_texts(paths, args.seed)
    if not texts:
        sys.exit("the text has no usable sentence")
    lengths = [len(text.split()) for text in texts]
    print(f"{len(texts)} texts of {np.mean(lengths):.1f} words on average, from {len(paths)} files", flush=True)
    started = time.monotonic()
    rows = write_clips(args.output, texts, args.clips, args.seed, args.workers)
    report(rows, time.monotonic() - started)


if __name__ == "__main__":
    main()
