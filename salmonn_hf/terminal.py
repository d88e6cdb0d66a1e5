"""What every command does alike at a terminal and in a pipe."""

import os
import sys
from collections.abc import Callable
from functools import wraps


def command(main: Callable) -> Callable:
    """
    A `main` whose output may be cut off by its reader, as `| head -1` does, or hold what the terminal cannot print,
    such as a file name in another encoding: it ends quietly with the status of a broken pipe, and prints escapes.
    """

    @wraps(main)
    def run(*arguments, **settings):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                return main(*arguments, **settings)
            finally:  # also where argparse ends it
                sys.stdout.flush()
        except BrokenPipeError:
            # What is still to be written would raise again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # as the shell counts SIGPIPE

    return run
