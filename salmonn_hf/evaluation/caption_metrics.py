"""Scores of captions against several references each, by pycocoevalcap: the programs that the metrics' papers used."""

import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .bootstrap import interval, mean_interval, resampled_sums
from .word_error_rate import check_pairs


class CaptionMetricsError(RuntimeError):
    """A metric cannot be computed here. The message says what is missing and how to get it."""


@dataclass
class CaptionScore:
    """
    Args:
        value (`float`): of the corpus. CIDEr-D runs from 0 to 10, every other score from 0 to 1.
        low, high (`float`): 95 % bootstrap interval over clips.
        clips (`np.ndarray` of shape `(clips,)`): each clip's own score. Their mean is `value`, but for METEOR and
            BLEU, which sum their counts over the corpus first.
    """

    value: float
    low: float
    high: float
    clips: np.ndarray


def score_captions(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], corenlp: str | Path | None = None
) -> dict[str, CaptionScore]:
    """
    CIDEr-D (Vedantam et al., 2015; document frequencies are those of `references`), METEOR 1.5 (Denkowski and Lavie,
    2014), ROUGE-L (Lin, 2004) and BLEU-1 to BLEU-4 (Papineni et al., 2002, closest reference length), after the Penn
    Treebank tokeniser without punctuation, as in COCO's caption evaluation (Chen et al., 2015). Where `corenlp` is a
    directory with CoreNLP's jars (see [`find_corenlp`]), also SPICE (Anderson et al., 2016) and SPIDEr (Liu et al.,
    2017), the mean of SPICE and CIDEr-D.

    Intervals hold the document frequencies of CIDEr-D fixed.

    Args:
        references (`list[list[str]]`): of each clip.
        hypotheses (`list[str]`): in the same order; "" where there is none, which scores 0.

    Raises:
        ValueError: if there are no clips, the lengths differ, or a clip has no reference.
        CaptionMetricsError: without pycocoevalcap or Java.
    """
    references, hypotheses = tokenised(references, hypotheses)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    pairs = dict(enumerate(references)), dict(enumerate(hypotheses))
    scores = {}
    for name, metric in (("CIDEr-D", Cider()), ("ROUGE-L", Rouge())):
        scores[name] = mean_score(metric.compute_score(*pairs)[1])
    scores["METEOR"] = meteor(references, hypotheses)
    values, clips = Bleu(4).compute_score(*pairs, verbose=0)
    samples = bleu_of_samples(references, hypotheses)
    for order in range(4):
        scores[f"BLEU-{order + 1}"] = CaptionScore(values[order], *interval(samples[:, order]), np.array(clips[order]))
    if corenlp is not None:
        scores["SPICE"] = mean_score(spice(references, hypotheses, corenlp))
        scores["SPIDEr"] = mean_score((scores["SPICE"].clips + scores["CIDEr-D"].clips) / 2)
    return scores


def mean_score(clips: np.ndarray) -> CaptionScore:
    return CaptionScore(float(clips.mean()), *mean_interval(clips), clips)


def cider_d(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
    """The corpus CIDEr-D of [`score_captions`] alone, which takes a second or two; arguments and errors are its."""
    references, hypotheses = tokenised(references, hypotheses)
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(dict(enumerate(references)), dict(enumerate(hypotheses)))[0])


def tokenised(references, hypotheses) -> tuple[list[list[str]], list[list[str]]]:
    check_pairs(references, hypotheses)
    if empty := [i for i, texts in enumerate(references) if isinstance(texts, str) or not any(map(str.strip, texts))]:
        raise ValueError(f"Clip {empty[0]} has no list of reference captions; give one, or leave the clip out.")
    require_java()
    return tokenise(references), tokenise([[text] for text in hypotheses])


def require_java():
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise CaptionMetricsError("Caption metrics need pycocoevalcap: pip install salmonn_hf[captions]") from error
    if shutil.which("java") is None:
        need = "Caption metrics need Java, on which pycocoevalcap runs METEOR and the tokeniser"
        raise CaptionMetricsError(f"{need}, and there is no `java` on the PATH: apt-get install default-jre-headless")


def tokenise(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each caption as COCO's tokeniser leaves it: lower case, words and clitics apart, no punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # It takes one caption a line, and takes more characters than "\n" for the end of one.
    rows = {i: [{"caption": " ".join(text.split())} for text in texts] for i, texts in enumerate(captions)}
    tokens = PTBTokenizer().tokenize(rows)
    return [tokens[index] for index in rows]


def meteor(references: list[list[str]], hypotheses: list[list[str]]) -> CaptionScore:
    """METEOR of tokenised captions. Its corpus score is that of the clips' summed statistics, so that the scores of
    bootstrap samples are those of their sums."""
    from pycocoevalcap.meteor.meteor import Meteor

    program = Meteor()
    # The bars part the fields of the program's input.
    lines = [program._stat(texts[0], [reference.replace("|||", "") for reference in several])
             for several, texts in zip(references, hypotheses, strict=True)]  # fmt: skip
    statistics = np.array([line.split() for line in lines], dtype=np.float64)

    def evaluate(rows: np.ndarray) -> np.ndarray:
        """The score of each row of statistics, and at last that of their sum."""
        line = " ||| ".join(["EVAL", *(" ".join(map(str, row)) for row in rows)])
        program.meteor_p.stdin.write(f"{line}\n".encode())
        program.meteor_p.stdin.flush()
        return np.array([float(program.meteor_p.stdout.readline()) for _ in range(len(rows) + 1)])

    *clips, value = evaluate(statistics)
    samples = evaluate(resampled_sums(statistics))[:-1]
    return CaptionScore(float(value), *interval(samples), np.array(clips))


def bleu_of_samples(references: list[list[str]], hypotheses: list[list[str]]) -> np.ndarray:
    """BLEU-1 to BLEU-4 of bootstrap samples, shape `(samples, 4)`: of their summed counts (Papineni et al., 2002,
    section 2.3), with the small terms by which pycocoevalcap avoids divisions by zero."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    counts = []
    for several, texts in zip(references, hypotheses, strict=True):
        clip = cook_test(texts[0], cook_refs(several), eff="closest")
        counts.append([*clip["correct"], *clip["guess"], clip["testlen"], clip["reflen"]])
    correct, guessed, (words, reference_words) = np.split(resampled_sums(np.array(counts)).T, [4, 8])
    brevity_penalty = np.exp(np.minimum(1 - 1 / ((words + 1e-15) / (reference_words + 1e-9)), 0))
    precisions = (correct + 1e-15) / (guessed + 1e-9)
    return (np.cumprod(precisions, axis=0) ** (1 / np.arange(1, 5)[:, None]) * brevity_penalty).T


def find_corenlp(directory: str | Path | None = None) -> Path:
    """
    The directory with the two jars of CoreNLP that SPICE needs, `stanford-corenlp-*.jar` and its models: `directory`,
    else `$CORENLP_HOME`, else where pycocoevalcap itself looks. A [`CaptionMetricsError`] names the places without.
    """
    require_java()
    places = [directory] if directory else [os.environ.get("CORENLP_HOME"), spice_directory() / "lib"]
    for place in map(Path, filter(None, places)):
        if {"models" in jar.name for jar in place.glob("stanford-corenlp-*.jar")} == {False, True}:
            return place
    # The message goes into reports and model cards: it names no directory of this machine that nobody gave.
    searched = directory or "$CORENLP_HOME or pycocoevalcap's spice/lib"
    jars = f"stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar are not in {searched}"
    remedy = "Take them from CoreNLP 3.6.0 and name their directory in CORENLP_HOME."
    raise CaptionMetricsError(f"No SPICE and no SPIDEr: {jars}. {remedy}")


def spice_directory() -> Path:
    import pycocoevalcap.spice

    return Path(pycocoevalcap.spice.__path__[0])


def spice(references: list[list[str]], hypotheses: list[list[str]], corenlp: str | Path) -> np.ndarray:
    """SPICE's F-score of each clip's tokenised caption, shape `(clips,)`, by the authors' program."""
    pairs = enumerate(zip(references, hypotheses, strict=True))
    clips = [{"image_id": index, "test": texts[0], "refs": several} for index, (several, texts) in pairs]
    program = spice_directory()
    classpath = os.pathsep.join(map(str, (program / "spice-1.0.jar", program / "lib" / "*", Path(corenlp) / "*")))
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "captions.json"), Path(folder, "scores.json")
        asked.write_text(json.dumps(clips))
        command = ["java", "-Xmx8G", "-cp", classpath, "edu.anu.spice.SpiceScorer", asked, "-out", answered, "-silent"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if run.returncode or not answered.exists():
            raise CaptionMetricsError(f"SPICE failed; its Java program says: {run.stderr.strip()[-500:]}")
        results = json.loads(answered.read_text())
    scores = {result["image_id"]: result["scores"]["All"]["f"] for result in results}
    return np.array([float(scores[index]) for index in range(len(clips))])


@torch.inference_mode()
def minilm_similarity(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], model: str | Path, batch_size: int = 64
) -> CaptionScore:
    """
    Mean cosine between a caption's sentence embedding and those of its references, of all-MiniLM-L6-v2 (Wang et al.,
    2020; Reimers and Gurevych, 2019). It is FENSE's similarity (Zhou et al., 2022) with a smaller model and without
    the penalty for errors of fluency, so compare it with no published FENSE.

    Args:
        model: directory or hub name of all-MiniLM-L6-v2.
    """
    from transformers import AutoModel, AutoTokenizer

    check_pairs(references, hypotheses)
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    texts = sorted({*hypotheses, *(text for several in references for text in several)}, key=len)
    vectors = {}
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states, mask = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        vectors |= dict(zip(batch, torch.nn.functional.normalize(means, dim=-1), strict=True))
    pairs = zip(references, hypotheses, strict=True)
    means = [torch.stack([vectors[text] for text in texts]).mean(0) @ vectors[caption] for texts, caption in pairs]
    return mean_score(np.array(means, dtype=np.float64))


def caption_statistics(captions: Sequence[str]) -> dict[str, float]:
    """
    How varied captions are: `distinct_words`, `mean_words` (a caption's length), `distinct_captions` and
    `most_frequent_caption` (shares of all captions). Words are what is between spaces, in lower case, without
    punctuation at their ends.

    Raises:
        ValueError: if there are no captions.
    """
    if len(captions) == 0:
        raise ValueError("There are no statistics of nothing: no captions were given.")
    rows = [tuple(filter(None, (word.strip(".,;:!?\"'()") for word in text.lower().split()))) for text in captions]
    counts = Counter(rows)
    return {
        "distinct_words": len({word for row in rows for word in row}),
        "mean_words": sum(map(len, rows)) / len(rows),
        "distinct_captions": len(counts) / len(rows),
        "most_frequent_caption": counts.most_common(1)[0][1] / len(rows),
    }
