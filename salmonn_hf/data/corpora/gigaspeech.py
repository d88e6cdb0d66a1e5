"""GigaSpeech."""

from collections.abc import Iterator
from pathlib import Path

from ..corpus_files import Drop, example, json_items, refuse, require_file, require_subset
from ..skipped_clips import UnusableClip

SUBSETS = ("XS", "S", "M", "L", "XL", "DEV", "TEST")
PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")


def plain_text(text_tn: str) -> str:
    """
    GigaSpeech's `text_tn` as text: its four punctuation tags become signs, its capitals lower case.

    Raises:
        UnusableClip: for a garbage utterance, which is no speech, or an unknown tag.
    """
    text = ""
    for token in text_tn.split():
        if token in PUNCTUATION:
            text += PUNCTUATION[token] if text else ""
        elif token.startswith("<"):
            raise UnusableClip("garbage utterance" if token in GARBAGE else "unknown tag", token)
        else:
            text += " " * bool(text) + token.lower()
    return text


def read_examples(root: str | Path, split: str = "XL", drop: Drop = refuse) -> Iterator[dict]:
    """
    GigaSpeech: `GigaSpeech.json` and the hour-long Opus files that it names (https://github.com/SpeechColab/GigaSpeech,
    "Metadata walkthrough" and "Text Pre-Processing" of the README). Each segment is a row with `start` and `end`, its
    `begin_time` and `end_time`, and `clip_id`, its `sid`. For clips that were cut beforehand use `annotation`.

    Args:
        split: a subset, "XS" to "XL", "DEV" or "TEST". Each training subset holds the smaller ones.
    """
    path = require_file(Path(root, "GigaSpeech.json"), "give the directory that holds it and `audio`")
    require_subset(path, split, SUBSETS)
    for recording in json_items(path, "audios"):
        file = Path(root, recording["path"])
        for segment in recording.get("segments", ()):
            if f"{{{split}}}" not in segment.get("subsets", ()):
                continue
            name = segment.get("sid")
            try:
                part = {"start": float(segment["begin_time"]), "end": float(segment["end_time"]), "clip_id": name}
                text = plain_text(segment["text_tn"])
            except KeyError:
                drop(f"{file}#{name}", "incomplete entry", str(segment)[:200])
            except UnusableClip as clip:
                drop(f"{file}#{name}", clip.reason, clip.detail)
            else:
                yield example(file, text, "asr", f"GigaSpeech/{split}", language="en", **part)
