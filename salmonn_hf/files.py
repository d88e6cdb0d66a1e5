"""Files that are written atomically."""

import os
import threading
from pathlib import Path


def write_atomically(file: Path, content: str | bytes):
    """So that a reader finds the file as it was or as it is to be, never half of it. Text is written as UTF-8."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
