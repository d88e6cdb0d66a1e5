"""Sentences and clauses of plain English text that any voice speaks as they are written."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

MIN_WORDS, MAX_WORDS = 2, 20

# The glob does not descend, so the offensive collections, which live in a directory of their own, stay out.
DEFAULT_TEXT_GLOB = "/usr/share/games/fortunes/*"
# Index files and duplicates under another name; then drawings, code, and fortunes in other languages.
SKIPPED_SUFFIXES, SKIPPED_NAMES = {".dat", ".u8"}, {"ascii-art", "perl", "translate-me"}

_WORDS = yaml.safe_load(Path(__file__).with_name("english_words.yaml").read_text(encoding="utf-8"))
ABBREVIATIONS, COMMON_WORDS = set(_WORDS["abbreviations"].split()), set(_WORDS["common"].split())
WORD = re.compile(r"'?[A-Za-z]+(?:['-][A-Za-z]+)*'?")
CLIP_TEXT = re.compile(r"[A-Za-z' .,?!-]+")


def default_text_files() -> list[Path]:
    paths = map(Path, sorted(glob.glob(DEFAULT_TEXT_GLOB)))
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


def speakable_word(word: str) -> bool:
    lower, parts = word.lower().strip("'"), re.split(r"['-]", word.strip("'"))
    return bool(
        WORD.fullmatch(word)
        and (len(lower) > 1 or lower in ("a", "i", "o"))
        # Capitals inside a word mark acronyms and names of programs ("USA", "XTerm"), often spelled out.
        and all(part[1:].islower() for part in parts if len(part) > 1)
        and lower not in ABBREVIATIONS
        and re.search(r"[aeiouy]", lower)
        and not re.search(r"(.)\1\1", lower)
    )


def speakable(text: str) -> bool:
    """Whether every voice speaks exactly these words."""
    words = [word.rstrip(".,?!") for word in text.split()]
    if not (CLIP_TEXT.fullmatch(text) and MIN_WORDS <= len(words) <= MAX_WORDS and all(map(speakable_word, words))):
        return False
    return len(words) < 5 or any(word.lower() in COMMON_WORDS for word in words)


def split_clips(paragraph: str, rng: np.random.Generator) -> Iterator[str]:
    """Cut one paragraph in sentences, and long or randomly chosen sentences further at their commas."""
    paragraph = paragraph.replace("\u2019", "'").replace('"', "").replace("``", "").replace("''", "")
    # The full stop of an abbreviation or initial ends no sentence. As a character that is not speakable, it drops it.
    paragraph = re.sub(rf"(?i)(?<![\w'])({'|'.join(sorted(ABBREVIATIONS))}|[a-z])\.(?=\s)", r"\1_", paragraph)
    for sentence in filter(None, re.split(r"(?<=[.?!])\s+|\s*(?:[;:]|\.\.+|--+)\s*|\s-\s", paragraph)):
        parts = [sentence]
        if len(sentence.split()) > MAX_WORDS or rng.random() < 0.25:
            target, parts = rng.integers(3, 15), []
            for piece in sentence.split(", "):
                if parts and len(parts[-1].split()) < target:
                    parts[-1] += ", " + piece
                else:
                    parts.append(piece)
        yield from (part.strip(" ,-") for part in parts)


def load_texts(paths: list[Path], seed: int) -> list[str]:
    """Return the distinct speakable clips of the files, shuffled."""
    rng, texts = np.random.default_rng([seed, 0]), {}
    paragraphs = (paragraph for path in paths for paragraph in read_paragraphs(path))
    for text in (text for paragraph in paragraphs for text in split_clips(paragraph, rng)):
        if speakable(text):
            texts.setdefault(re.sub(r"[^a-z' ]", "", text.lower()), text)
    clips = list(texts.values())
    rng.shuffle(clips)
    return clips
