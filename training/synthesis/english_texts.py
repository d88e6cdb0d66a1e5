"""Sentences and clauses of plain English text that any voice speaks as they are written."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MIN_WORDS, MAX_WORDS = 2, 20

# The glob does not descend, so the offensive collections, which live in a directory of their own, stay out.
DEFAULT_TEXT_GLOB = "/usr/share/games/fortunes/*"
# Index files and duplicates under another name.
SKIPPED_SUFFIXES = {".dat", ".u8"}
# Drawings, code, and fortunes in other languages.
SKIPPED_NAMES = {"ascii-art", "perl", "translate-me"}

# Read out as another word ("Dr." as "doctor", "St." as "street"), or their full stop does not end a sentence.
ABBREVIATIONS = set(
    "mr mrs ms dr st jr sr prof gen col lt sgt capt rev hon gov sen rep vs etc inc ltd co corp vol ed fig no dept ave "
    "blvd mt ft jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun am pm "
    "esq ca cf al approx messrs phd adj adv".split()
)
# Those that are more often words of their own.
ORDINARY_WORDS = {"no", "am", "sun", "sat", "fig", "mar"}
# Real English of some length has at least one of these; Latin, French, lists and names have none.
COMMON_WORDS = set(
    "a about all an and are as at be been but by can do for from had has have he her him his how i if in into is it "
    "its me my no not of on one or our out she so than that the their them then there they this to up us was we were "
    "what when which who will with would you your it's don't i'm you're that's can't i'll never always any "
    "only".split()
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
    """Whether every voice speaks exactly these words."""
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
    # speakable, it drops the sentence.
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
