"""Share of short answers that equal an accepted one after SQuAD's normalisation; "Yes, a dog barks." is "yes"."""

import datasets
import evaluate

from salmonn_hf.evaluation.answer_metrics import correct_answers

INPUTS = """
predictions (`list[str]`): an answer to each question.
references (`list[list[str]]`): the accepted answers to each question.

Returns `accuracy` as a fraction.
"""


class AnswerAccuracy(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references):
        return {"accuracy": float(correct_answers(references, predictions).mean())}
