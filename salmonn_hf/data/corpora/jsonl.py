"""A list of clips of your own: JSON Lines."""

import json
from collections.abc import Iterator
from pathlib import Path

from ..corpus_files import Drop, example, refuse, require_file

FILE_KEYS = ("file", "file_name", "audio_filepath")  # `file_name` as in an audiofolder, `audio_filepath` as in NeMo


def read_examples(root: str | Path, drop: Drop = refuse) -> Iterator[dict]:
    """
    A file of one JSON object a line: `file`, a path from the list's directory, and `text`; where they are not those
    of a transcript also `task` and `question`; and `language`.
    """
    path = require_file(root, "give the path of the .jsonl file")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                file = next(path.parent / entry[key] for key in FILE_KEYS if entry.get(key))
            except (ValueError, AttributeError, TypeError, StopIteration):
                drop(f"{path}#{number}", "no file", line.strip()[:200])
                continue
            optional = {"language": entry["language"]} if entry.get("language") else {}
            task, question = entry.get("task") or "asr", entry.get("question") or ""
            yield example(file, entry.get("text"), task, path.stem, question, **optional)
