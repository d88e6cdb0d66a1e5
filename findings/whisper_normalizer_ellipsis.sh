#!/usr/bin/env bash
# whisper-normalizer 0.1.15 (OpenAI's English normaliser), before jiwer 4.0.0: three dots at the end of a text become a
# word of their own, ".", while one dot, or three within the text, become none.
#
# So a transcript with every word right has an error for how its last sentence ends, and references with such an end
# have one more word. Seen:
#
#   'He is watching me...' -> 'he is watching me .'
#   'He is watching me.' -> 'he is watching me'
#   'He is... watching me.' -> 'he is watching me'
#   word error rate of the second against the first: 20 %
#
# Exits with 1 once the three are the same after normalising.
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
texts = ["He is watching me...", "He is watching me.", "He is... watching me."]
results = [normalize(text) for text in texts]
for text, result in zip(texts, results):
    print(f"{text!r} -> {result!r}")
rate = jiwer.wer(results[0], results[1])
print(f"word error rate of the second against the first: {rate:.0%}".replace("%", " %"))
plain = "he is watching me"
sys.exit(results != [f"{plain} .", plain, plain] or round(rate, 2) != 0.2)
PY
