#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile 1.2.2): writing SD2 into memory leaves a file `._` in the working directory, and while it
# lies there, no MP3 in memory can be read in that directory.
#
# SD2 keeps its header in a second file, `._` and the name of the first, and a file in memory has no name. The same second
# file is looked for when a file's first bytes do not say its format, as those of an MP3 do not. Seen:
#
#   before: WAV read, FLAC read, OGG read, MP3 read
#   SD2 written into a BytesIO, the working directory now holds ['._']
#   after:  WAV read, FLAC read, OGG read, MP3 not: Error : bad data offset.
#
# Exits with 1 once the MP3 is read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet soundfile==0.14.0
mkdir "$work/empty"
cd "$work/empty"
"$work/venv/bin/python" - <<'PY'
import io
import os
import sys

import numpy as np
import soundfile

tone = 0.3 * np.sin(np.arange(16000) / 10)
files = {}
for form in ("WAV", "FLAC", "OGG", "MP3"):
    file = io.BytesIO()
    soundfile.write(file, tone, 16000, format=form)
    files[form] = file.getvalue()


def read(form):
    try:
        soundfile.read(io.BytesIO(files[form]))
    except soundfile.LibsndfileError as error:
        return f"{form} not: {error.error_string}"
    return f"{form} read"


before = [read(form) for form in files]
print("before:", ", ".join(before))
soundfile.write(io.BytesIO(), tone, 16000, format="SD2", subtype="PCM_16")
print("SD2 written into a BytesIO, the working directory now holds", os.listdir())
after = [read(form) for form in files]
print("after: ", ", ".join(after))
sys.exit(not (before[-1] == "MP3 read" and after[-1] != "MP3 read" and os.listdir() == ["._"]))
PY
