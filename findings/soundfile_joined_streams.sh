#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile 1.2.2) reads the first of several joined Ogg or MP3 streams, as if nothing came behind it.
#
# Joining such files byte by byte gives a valid file: Ogg calls it chaining, MP3 is a row of frames, and radio stations
# and recorders write both. FFmpeg and players play all of it. Here two tones of 1 s each; of MP3, a warning about the
# size in its header is all there is. Seen:
#
#   OGG: 2 tones of 1 s joined, soundfile reads 1.0 s, and info() says 1.0 s
#   MP3: 2 tones of 1 s joined, soundfile reads 1.0 s, and info() says 1.0 s
#
# Exits with 1 once it reads both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet soundfile==0.14.0
"$work/venv/bin/python" - <<'PY'
import io
import sys

import numpy as np
import soundfile

seconds = np.arange(16000) / 16000
shown = True
for form in ("OGG", "MP3"):
    joined = b""
    for hertz in (440, 880):
        file = io.BytesIO()
        soundfile.write(file, 0.3 * np.sin(2 * np.pi * hertz * seconds), 16000, format=form)
        joined += file.getvalue()
    waveform, rate = soundfile.read(io.BytesIO(joined))
    read, said = len(waveform) / rate, soundfile.info(io.BytesIO(joined)).duration
    print(f"{form}: 2 tones of 1 s joined, soundfile reads {read:.1f} s, and info() says {said:.1f} s")
    shown &= read < 1.5
sys.exit(not shown)
PY
