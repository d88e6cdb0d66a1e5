#!/usr/bin/env bash
# datasets 5.2.0 wants torchcodec (and FFmpeg's libraries) to make an undecoded Audio column of paths, in one of two ways
# that give the same column.
#
# With `Audio(decode=False)` nothing is decoded or encoded: a row is {"bytes", "path"}. Yet `features=` goes through
# `encode_example`, which asks for torchcodec first; `cast_column` does not. Seen:
#
#   features=Features({"audio": Audio(decode=False)}): ImportError: To support encoding audio data, please install 'torchcodec'.
#   cast_column("audio", Audio(decode=False)): {'bytes': None, 'path': 'clip.wav'}
#
# Exits with 1 once both work.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0
"$work/venv/bin/python" - <<'PY'
import sys

from datasets import Audio, Dataset, Features

paths = {"audio": ["clip.wav"]}
try:
    Dataset.from_dict(paths, features=Features({"audio": Audio(decode=False)}))
    shown = False
except ImportError as error:
    print(f'features=Features({{"audio": Audio(decode=False)}}): {type(error).__name__}: {error}')
    shown = True
row = Dataset.from_dict(paths).cast_column("audio", Audio(decode=False))[0]["audio"]
print('cast_column("audio", Audio(decode=False)):', row)
sys.exit(not (shown and row == {"bytes": None, "path": "clip.wav"}))
PY
