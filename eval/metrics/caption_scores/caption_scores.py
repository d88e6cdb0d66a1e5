"""CIDEr-D, METEOR, ROUGE-L and BLEU by pycocoevalcap, which needs Java; SPICE and SPIDEr where CoreNLP is named."""

import datasets
import evaluate

from salmonn_hf.evaluation.caption_metrics import score_captions

INPUTS = """
predictions (`list[str]`): a caption of each clip.
references (`list[list[str]]`): the reference captions of each clip.
corenlp (`str`): directory with CoreNLP 3.6.0's two jars, for SPICE and SPIDEr.

Returns each score by its name, of the whole corpus.
"""


class CaptionScores(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, corenlp=None):
        return {name: score.value for name, score in score_captions(references, predictions, corenlp).items()}
