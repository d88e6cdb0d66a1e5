"""Files that are whole or not there."""

import os
from pathlib import Path


def write_whole(file: Path, text: str):
    """So that a reader finds the file as it was or as it is to be, never half of it."""
    sibling = file.with_name(f".{file.name}.{os.getpid()}")
    sibling.write_text(text, encoding="utf-8")
    os.replace(sibling, file)
