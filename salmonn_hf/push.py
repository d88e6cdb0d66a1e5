"""`python -m salmonn_hf.push DIR user/name`, see `hub/push.py`."""

import sys

from .hub.push import main

if __name__ == "__main__":
    sys.exit(main())
