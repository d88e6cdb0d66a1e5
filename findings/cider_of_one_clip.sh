#!/usr/bin/env bash
# pycocoevalcap 1.2: the CIDEr of a perfect caption is 0 where one clip is scored, and 10 where two are.
#
# Words count by their inverse document frequency over the references of the clips that are scored, log(clips / clips
# with the word), which is log(1) for every word of a single clip. So CIDEr of a subset, or the mean of the scores of
# its parts, is not CIDEr of the whole. Seen:
#
#   1 clip, every caption is its reference: CIDEr 0.0
#   2 clips, every caption is its reference: CIDEr 10.0
#
# Exits with 1 once a perfect caption of one clip scores.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pycocoevalcap==1.2
"$work/venv/bin/python" - <<'PY'
import sys

from pycocoevalcap.cider.cider import Cider

captions = {0: ["a dog barks loudly"], 1: ["rain falls on a roof"]}
scores = []
for clips in (1, 2):
    some = {clip: captions[clip] for clip in range(clips)}
    scores.append(float(Cider().compute_score(some, some)[0]))
    print(f"{clips} clip{'s' * (clips > 1)}, every caption is its reference: CIDEr {scores[-1]:.1f}")
sys.exit(not (scores[0] == 0 and scores[1] > 9.9))
PY
