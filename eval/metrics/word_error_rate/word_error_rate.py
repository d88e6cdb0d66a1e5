"""Corpus-level word and character error rates after Whisper's English normaliser, with their counts."""

import datasets
import evaluate

from salmonn_hf.evaluation.word_error_rate import character_error_rate, word_error_rate

INPUTS = """
predictions (`list[str]`): what was recognised.
references (`list[str]`): what was said.
normalise (`bool`): `False` takes the texts as they are. Default: `True`.

Returns `wer` and `cer` as fractions, and of words `substitutions`, `deletions`, `insertions`, `hits` and `words`.
"""


class WordErrorRate(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, normalise=True):
        characters = character_error_rate(references, predictions, normalise)
        return vars(word_error_rate(references, predictions, normalise)) | {"cer": characters.cer}
