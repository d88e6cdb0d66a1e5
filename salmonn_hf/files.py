"""Files that are written atomically."""

import os
import threading
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_or_absent(file: Path):
    """A path to write to, which becomes `file` at the end: a reader finds it as it was or as it is to be."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(file: Path, content: str | bytes):
    """Text is written as UTF-8; of a file name that is none, the bytes that are not as escapes."""
    with complete_or_absent(file) as partial:
        partial.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
