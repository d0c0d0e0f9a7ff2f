from __future__ import annotations

import numpy as np
import pytest

from workbench.stats.resampling import bootstrap_mean, jackknife_interval, sign_flip_max_t


def test_bootstrap_interval_covers_the_true_mean_in_about_95_percent_of_draws() -> None:
    rng = np.random.default_rng(0)
    draws = rng.exponential(1.0, (60, 400))  # 60 units, 400 independent data sets side by side
    low, high = bootstrap_mean(draws, n_resamples=1000)
    covered = np.mean((low <= 1.0) & (high >= 1.0))
    assert 0.90 <= covered <= 0.975


def test_bootstrap_keeps_the_shape_and_the_seed() -> None:
    values = np.random.default_rng(1).normal(size=(10, 2, 3))
    low, high = bootstrap_mean(values, seed=5)
    assert low.shape == high.shape == (2, 3)
    assert np.all(low < values.mean(0))
    assert np.all(values.mean(0) < high)
    np.testing.assert_array_equal(low, bootstrap_mean(values, seed=5)[0])


def test_one_unit_has_no_interval() -> None:
    low, high = bootstrap_mean(np.ones((1, 2)))
    assert np.isnan(low).all()
    assert np.isnan(high).all()
    assert np.isnan(sign_flip_max_t(np.ones((1, 2)))[1]).all()


def test_t_is_the_paired_t_statistic() -> None:
    differences = np.array([[1.0], [2.0], [4.0]])
    t, _ = sign_flip_max_t(differences, n_flips=10)
    assert t[0] == pytest.approx(differences.mean() / (differences.std(ddof=1) / np.sqrt(3)))


def test_p_of_one_test_is_the_exact_sign_flip_p() -> None:
    # 8 units all positive: of the 2^8 sign patterns only the two extreme ones reach the observed |t|.
    differences = np.arange(1.0, 9.0)[:, None]
    _, p = sign_flip_max_t(differences, n_flips=40_000)
    assert p[0] == pytest.approx(2 / 256, abs=0.002)


def test_constant_and_empty_differences() -> None:
    t, p = sign_flip_max_t(np.column_stack([np.zeros(12), np.full(12, 0.1)]), n_flips=999)
    assert t[0] == 0
    assert p[0] == 1
    assert np.isinf(t[1])
    assert p[1] < 0.01


def test_family_wise_error_on_null_families() -> None:
    # 40 correlated, skewed tests per family; the chance of any p < 0.05 must be about 0.05, not 40 times that.
    rng = np.random.default_rng(2)
    rejected = 0
    for family in range(200):
        noise = rng.normal(size=(24, 40)) + rng.normal(size=(24, 1))
        _, p = sign_flip_max_t(noise * np.abs(noise), n_flips=199, seed=family)
        rejected += bool((p <= 0.05).any())
    assert rejected / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_a_real_difference_survives_the_correction() -> None:
    rng = np.random.default_rng(3)
    differences = rng.normal(size=(40, 50))
    differences[:, 7] += 1.0
    _, p = sign_flip_max_t(differences, n_flips=999)
    assert p[7] < 0.01
    assert (np.delete(p, 7) > 0.05).all()


def test_jackknife_of_the_mean_is_the_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 3.0])
    estimate, low, high = jackknife_interval(
        lambda out: (values if out is None else np.delete(values, out)).mean(keepdims=True), 5
    )
    error = values.std(ddof=1) / np.sqrt(5)
    assert estimate[0] == values.mean()
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * error, rel=1e-4)


def test_no_p_value_is_below_what_the_flips_can_show() -> None:
    differences = np.full((30, 2), 5.0) + np.random.default_rng(0).normal(0, 0.01, (30, 2))
    _, p = sign_flip_max_t(differences, n_flips=99)
    assert p == pytest.approx(1 / 100)
