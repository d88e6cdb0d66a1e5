"""
A checkpoint in `transformers serve`: a request brings its audio along, as base64 or a `data:` URI. No address or path
of a request is opened, since whoever may ask the server could read through it what only the server can reach.
"""

import sys
from contextlib import contextmanager

from .audio import AudioError, file_in_text

try:
    from fastapi import HTTPException
except ImportError:  # then nothing is served
    HTTPException = None


def is_serving() -> bool:
    """Whether this process is `transformers serve`."""
    return "transformers.cli.serving.server" in sys.modules


def check_source(source):
    """
    Raises:
        AudioError: in a server, for a `source` that is an address or a path.
    """
    if is_serving() and isinstance(source, str) and file_in_text(source) is None:
        raise AudioError(f"The server does not open {source[:100]}; send the file as base64 or a data: URI.")


@contextmanager
def errors_answered():
    """In a server, what is wrong with a request is the answer to its client, with status 400."""
    try:
        yield
    except ValueError as error:  # AudioError is one
        if not is_serving():
            raise
        raise HTTPException(status_code=400, detail=str(error)) from error
