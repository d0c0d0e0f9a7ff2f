from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from workbench.stats.resampling import block_jackknife, permutation_max_t, welch_interval


def test_the_statistic_and_the_interval_are_welchs() -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.uniform(size=(20, 3)), np.arange(20) < 7  # no heavy tails: n - 1 degrees of freedom
    t, _ = permutation_max_t(values, labels, n_shuffles=10)
    expected = stats.ttest_ind(values[labels], values[~labels], equal_var=False)
    np.testing.assert_allclose(t, expected.statistic)
    low, high = welch_interval(values[labels], values[~labels])
    wanted = expected.confidence_interval()
    np.testing.assert_allclose((low, high), (wanted.low, wanted.high))


def test_family_wise_error_of_shuffled_labels() -> None:
    rng = np.random.default_rng(1)
    rejected = 0
    for family in range(200):
        values = rng.exponential(size=(24, 30)) + rng.normal(size=(24, 1))
        _, p = permutation_max_t(values, rng.permutation(24) < 10, n_shuffles=199, seed=family)
        rejected += bool((p <= 0.05).any())
    assert rejected / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_strata_take_a_confounded_topic_out() -> None:
    """Topics differ in level, and the label is more frequent in one: shuffling across topics is fooled."""
    rng = np.random.default_rng(2)
    fooled = honest = 0
    for family in range(60):
        topic = np.repeat([0, 1], 30)
        labels = rng.random(60) < np.where(topic == 0, 0.8, 0.2)
        values = rng.normal(size=(60, 5)) + 2.0 * topic[:, None]
        for strata in (None, topic):
            _, p = permutation_max_t(values, labels, strata, n_shuffles=199, seed=family)
            if strata is None:
                fooled += bool((p <= 0.05).any())
            else:
                honest += bool((p <= 0.05).any())
    assert fooled > 40
    assert honest <= 8


def test_a_real_difference_is_found_and_too_few_units_give_nan() -> None:
    rng = np.random.default_rng(3)
    values, labels = rng.normal(size=(40, 20)), np.arange(40) % 2 == 0
    values[labels, 4] += 2
    _, p = permutation_max_t(values, labels, n_shuffles=999)
    assert np.flatnonzero(p <= 0.05).tolist() == [4]
    assert np.isnan(permutation_max_t(values[:3], np.array([True, False, False]))[1]).all()
    assert np.isnan(welch_interval(values[:1], values[1:])[0]).all()


def test_the_block_jackknife_of_a_mean_covers_it() -> None:
    rng = np.random.default_rng(4)
    covered = []
    for seed in range(300):
        values = rng.exponential(size=50)
        estimate, low, high = block_jackknife(
            lambda kept, values=values: np.array([values[kept].mean()]), 50, seed=seed
        )
        assert estimate[0] == pytest.approx(values.mean())
        covered.append(low[0] <= 1 <= high[0])
    assert 0.90 <= np.mean(covered) <= 0.98


def test_the_block_jackknife_of_few_units_leaves_out_one_at_a_time_and_of_two_has_no_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0])
    _, low, high = block_jackknife(lambda kept: np.array([values[kept].mean()]), 4)
    half_width = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert (high - low)[0] / 2 == pytest.approx(half_width)
    assert np.isnan(block_jackknife(lambda kept: values[:2][kept].mean(keepdims=True), 2)[1]).all()
