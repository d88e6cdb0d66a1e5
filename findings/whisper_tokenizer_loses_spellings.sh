#!/usr/bin/env bash
# transformers 5.23.0: `WhisperTokenizer.save_pretrained` leaves `normalizer.json` out, so `normalize`, with which every
# published word error rate of Whisper is computed, fails in the copy.
#
# `from_pretrained` reads the table of British and American spellings; the saved directory lacks it. Seen:
#
#   loaded: normalize("the colour") gives 'the color'
#   saved and loaded again, from ['tokenizer.json', 'tokenizer_config.json']: AttributeError: 'NoneType' object has no attribute 'get'
#
# Exits with 1 once the copy normalises.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
import os
import sys
from pathlib import Path

from transformers import WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

tokens = [*bytes_to_unicode().values(), "<|endoftext|>"]
Path("original").mkdir()
Path("original/vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
Path("original/merges.txt").write_text("#version: 0.2\n")
Path("original/normalizer.json").write_text(json.dumps({"colour": "color"}))
tokenizer = WhisperTokenizer.from_pretrained("original")
loaded = tokenizer.normalize("the colour")
print(f'loaded: normalize("the colour") gives {loaded!r}')
tokenizer.save_pretrained("copy")
try:
    again = WhisperTokenizer.from_pretrained("copy").normalize("the colour")
except AttributeError as error:
    again = f"{type(error).__name__}: {error}"
print(f"saved and loaded again, from {sorted(os.listdir('copy'))}: {again}")
sys.exit(not (loaded == "the color" and again != loaded))
PY
