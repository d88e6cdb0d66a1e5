"""Bootstrap intervals against the intervals of statistics books, and on cases where they are known."""

import numpy as np
import pytest

from salmonn_hf.evaluation.bootstrap import interval, mean_interval, rate_interval, resampled_sums


def test_mean_is_that_of_normal_theory():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = mean_interval(values, resamples=4000)
    error = values.std(ddof=1) / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error)


def test_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    intervals = [mean_interval(rng.exponential(1.0, size=100), resamples=300) for _ in range(200)]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_rate_is_a_quotient_of_sums():
    # The clip of 90 words without error and the one of 10 with 10: a sample holds both, or one of them twice.
    low, high = rate_interval(np.array([0, 10]), np.array([90, 10]))
    assert (low, high) == (0.0, 1.0)
    # Every clip has the same rate: so has any sample, however long its clips are.
    words = np.array([10, 50, 200])
    assert rate_interval(words / 10, words) == pytest.approx((0.1, 0.1))


def test_samples_are_as_large_as_the_whole_and_the_same_every_time():
    values = np.arange(12.0).reshape(6, 2)
    sums = resampled_sums(np.column_stack([values, np.ones(6)]), resamples=50)
    assert sums.shape == (50, 3)
    assert (sums[:, 2] == 6).all()
    # The columns of a sample come from the same clips.
    np.testing.assert_allclose(sums[:, 1] - sums[:, 0], 6)
    assert len(np.unique(sums[:, 0])) > 10
    np.testing.assert_array_equal(resampled_sums(values, 50), sums[:, :2])


def test_samples_without_a_score_are_left_out():
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no clips"):
        resampled_sums(np.zeros((0, 1)))
