"""SALMONN's annotation files."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..corpus_files import Drop, example, json_items, refuse, require_file


def read_examples(path: str | Path, prefix: str = "", drop: Drop = refuse) -> Iterator[dict]:
    """
    A SALMONN annotation file: `{"annotation": [{"path", "text", "task", "Q", "expand_wav"}, ...]}`.

    As in the reference (`dataset.py` of bytedance/SALMONN; nota-github/audiolm-trainer adds the prefix and
    `testset_id`), `task` is "asr" and `Q` "" where they are not given, and the files of `expand_wav` follow the first
    with 0.1 s of silence before each. The reference's padding to 1 s and its cut at 30 s are not applied.

    Args:
        prefix: directory that the paths are under, with or without a slash at their front. By default they are taken
            as they are.
    """
    path = require_file(path, "give the path of the annotation JSON")
    for number, entry in enumerate(json_items(path, "annotation")):
        files = [entry.get("path"), *(entry.get("expand_wav") or [])] if isinstance(entry, dict) else [None]
        if not all(isinstance(file, str) and file for file in files):
            drop(f"{path}#{number}", "no path", str(entry)[:200])
            continue
        folders = files[0].strip("/").split("/")[:-1]
        source = folders[0] if prefix and folders else path.stem
        optional = {key: entry[key] for key in ("testset_id", "language") if entry.get(key) is not None}
        first, *others = (os.path.join(prefix, file.lstrip("/")) if prefix else file for file in files)
        if others:
            optional["expand_wav"] = others
        task, question = str(entry.get("task") or "asr"), str(entry.get("Q") or "")
        yield example(first, entry.get("text"), task, source, question, **optional)
