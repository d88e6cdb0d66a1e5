"""Confidence intervals by resampling clips: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR
performance evaluation", ICASSP 2004."""

import numpy as np

RESAMPLES = 1000


def resampled_sums(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """
    Sums over bootstrap samples of the clips, each as large as the whole and drawn with replacement. The score of each
    sample follows from them: an error rate is a quotient of two sums, a mean a sum over the number of clips.

    Args:
        values (`np.ndarray` of shape `(clips, quantities)`): of each clip.

    Returns:
        `np.ndarray` of shape `(resamples, quantities)`, float64.

    Raises:
        ValueError: if there are no clips.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("There is no interval of nothing: no clips were given.")
    rng = np.random.default_rng(seed)
    shares = np.full(len(values), 1 / len(values))
    return np.stack([rng.multinomial(len(values), shares) @ values for _ in range(resamples)])


def interval(scores: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the scores `(resamples,)` of bootstrap samples, without those that are NaN."""
    low, high = np.nanquantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray, **kwargs) -> tuple[float, float]:
    """The interval of the mean of one value per clip, `values` of shape `(clips,)`."""
    values = np.asarray(values, dtype=np.float64)
    return interval(resampled_sums(values[:, None], **kwargs)[:, 0] / len(values))


def rate_interval(numerators: np.ndarray, denominators: np.ndarray, **kwargs) -> tuple[float, float]:
    """The interval of a quotient of sums, both of shape `(clips,)`: an error rate's errors and reference units."""
    sums = resampled_sums(np.stack([numerators, denominators], axis=1), **kwargs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(sums[:, 0] / sums[:, 1])
