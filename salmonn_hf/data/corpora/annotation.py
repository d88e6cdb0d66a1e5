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
    path = require_file(Path(path), "give the path of the annotation JSON")

    def under_prefix(name: str) -> str:
        return os.path.join(prefix, name.lstrip("/")) if prefix else name

    for number, entry in enumerate(json_items(path, "annotation")):
        files = [entry.get("path"), *(entry.get("expand_wav") or [])] if isinstance(entry, dict) else [None]
        if not all(isinstance(file, str) and file for file in files):
            drop(f"{path}#{number}", "no path", str(entry)[:200])
            continue
        folders = files[0].strip("/").split("/")[:-1]
        optional = {key: entry[key] for key in ("testset_id", "language") if entry.get(key) is not None}
        if len(files) > 1:
            optional["expand_wav"] = [under_prefix(file) for file in files[1:]]
        yield example(
            under_prefix(files[0]),
            entry.get("text"),
            str(entry.get("task") or "asr"),
            folders[0] if prefix and folders else path.stem,
            str(entry.get("Q") or ""),
            **optional,
        )
