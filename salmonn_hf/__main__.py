"""`python -m salmonn_hf` is the command `salmonn`, see `cli.py`."""

import sys

from .cli import main

sys.exit(main())
