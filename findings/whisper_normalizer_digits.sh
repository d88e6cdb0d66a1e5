#!/usr/bin/env bash
# whisper-normalizer 0.1.15 (OpenAI's English normaliser), before jiwer 4.0.0: one wrong digit of four is a word error
# rate of 100 %, and a missing apostrophe is two errors.
#
# Digits that are said one by one become one word, so the reference shrinks; "'s" becomes " is", possessives too. Seen:
#
#   'one two three four' -> '1234', 'one two three five' -> '1235': 25 % before, 100 % after
#   "the dog's bowl" -> 'the dog is bowl', 'the dogs bowl' -> 'the dogs bowl': 33 % before, 50 % after
#
# Exits with 1 once normalising leaves the number of words as it is.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet whisper-normalizer==0.1.15 jiwer==4.0.0
"$work/venv/bin/python" - <<'PY'
import sys

import jiwer
from whisper_normalizer.english import EnglishTextNormalizer

normalize = EnglishTextNormalizer()
rates = []
for said, written in (("one two three four", "one two three five"), ("the dog's bowl", "the dogs bowl")):
    before, after = jiwer.wer(said, written), jiwer.wer(normalize(said), normalize(written))
    pair = f"{said!r} -> {normalize(said)!r}, {written!r} -> {normalize(written)!r}"
    print(f"{pair}: {before:.0%} before, {after:.0%} after".replace("%", " %"))
    rates.append((round(before, 2), round(after, 2)))
sys.exit(rates != [(0.25, 1.0), (0.33, 0.5)])
PY
