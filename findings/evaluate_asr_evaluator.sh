#!/usr/bin/env bash
# evaluate 0.4.6 beside transformers 5.23.0: `evaluator("automatic-speech-recognition")` takes no pipeline object.
#
# It asks whether the object is a `transformers.TFPreTrainedModel`, a name that transformers 5 no longer has, before it
# asks whether it is a pipeline. Seen:
#
#   AttributeError: module transformers has no attribute TFPreTrainedModel
#
# Exits with 1 once it takes one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 'evaluate[evaluator]==0.4.6'
"$work/venv/bin/python" - <<'PY'
import sys

from evaluate import evaluator


class Recogniser:  # what the evaluator needs of a pipeline
    task = "automatic-speech-recognition"

    def __call__(self, clips, **settings):
        return [{"text": "one"} for clip in clips]


try:
    evaluator("automatic-speech-recognition").prepare_pipeline(Recogniser())
except AttributeError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit("TFPreTrainedModel" not in str(error))
print("it takes one")
sys.exit(1)
PY
