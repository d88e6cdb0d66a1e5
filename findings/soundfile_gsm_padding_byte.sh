#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile 1.2.2) reads 320 samples too many from a WAV of GSM 6.10 with an odd number of blocks, even
# from one that it wrote itself.
#
# A block has 65 bytes and holds 320 samples. WAV pads a chunk of an odd size with one byte that is not part of it; that
# byte is taken for one more block. The header is right, both the size of the data and the number of samples. Seen:
#
#   2 blocks: written 640 samples in 130 bytes, header says 640, read 640
#   3 blocks: written 960 samples in 195 bytes, header says 960, read 1280
#   5 blocks: written 1600 samples in 325 bytes, header says 1600, read 1920
#
# Exits with 1 once it reads what was written.
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

surplus = []
for blocks in (2, 3, 5):
    written = 320 * blocks
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(written) / 10), 8000, format="WAV", subtype="GSM610")
    wav = file.getvalue()
    size, said = (int.from_bytes(wav[at : at + 4], "little") for at in (wav.index(b"data") + 4, wav.index(b"fact") + 8))
    read = len(soundfile.read(io.BytesIO(wav))[0])
    print(f"{blocks} blocks: written {written} samples in {size} bytes, header says {said}, read {read}")
    surplus.append(read - written)
sys.exit(surplus != [0, 320, 320])
PY
