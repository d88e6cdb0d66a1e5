"""
Fetch base parts and print the directory of each. The exit status is 1 if one cannot be had.

    python -m salmonn_hf.base_parts openai/whisper-base.en HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import logging
import sys

from ..terminal import command
from . import BasePartNotFoundError, resolve_base_part


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m salmonn_hf.base_parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="hub id or directory")
    parser.add_argument("--local-files-only", action="store_true", help="fetch nothing")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("salmonn_hf").setLevel(logging.INFO)
    try:
        for name in options.names:
            print(resolve_base_part(name, local_files_only=options.local_files_only), flush=True)
    except BasePartNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
