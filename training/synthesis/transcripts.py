"""What a transcript says: its words, its only name, its only number; which words are forms of one or sound alike."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml

_ENGLISH = yaml.safe_load(Path(__file__).with_name("speech_questions.yaml").read_text(encoding="utf-8"))
UNCERTAIN_NUMBERS, TITLES, UNCERTAIN_NAMES = (
    set(_ENGLISH[name].split()) for name in ("uncertain_numbers", "titles", "uncertain_names")
)
ALIKE: dict[str, set[str]] = {}
for line in _ENGLISH["alike"]:
    for word in line.split():
        ALIKE.setdefault(word, set()).update(line.split())
UNITS = set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
)
MAGNITUDES = {"hundred", "thousand", "million", "billion"}
TOKEN = re.compile(r"[A-Za-z0-9]+(?:['\u2019-][A-Za-z0-9]+)*")
NAME = re.compile(r"[A-Z][a-z]+(-[A-Z][a-z]+)*")


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
    return any(len(part) >= 4 and part in whole for part, whole in ((a, b), (b, a), (stems[0], b), (stems[1], a)))
