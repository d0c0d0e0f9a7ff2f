from __future__ import annotations

import numpy as np
import pytest

from workbench.stats.resampling import jackknife_interval, sign_flip_max_t, squared_error, t_interval


def _coverage(values: np.ndarray, true: float) -> float:
    """Share of data sets [unit data set] whose interval holds the true mean, among those that are not constant."""
    low, high = t_interval(values)
    return float(((low <= true) & (true <= high))[low < high].mean())


@pytest.mark.parametrize("n_units", [20, 40, 80])
def test_intervals_hold_the_mean_of_normal_skewed_and_sparse_units(n_units: int) -> None:
    """Sparse: an expert that one unit in seven uses. The plain t holds 88 to 93% of such means."""
    rng = np.random.default_rng(0)
    shape = (n_units, 2000)
    few = rng.random(shape) < 0.15
    assert 0.935 <= _coverage(rng.normal(size=shape), 0.0) <= 0.965
    assert 0.92 <= _coverage(rng.exponential(1.0, shape), 1.0) <= 0.97
    assert 0.91 <= _coverage(rng.random(shape) * few, 0.075) <= 0.97
    assert _coverage(rng.normal(size=shape) * few, 0.0) >= 0.94


def test_the_error_of_few_units_has_few_degrees_of_freedom() -> None:
    normal = np.random.default_rng(1).normal(size=(40, 500))
    one_of_forty = np.zeros((40, 1))
    one_of_forty[3] = 1.0
    assert np.median(squared_error(normal)[1]) == pytest.approx(39, abs=3)
    assert squared_error(one_of_forty)[1][0] == pytest.approx(2 * 40 / (38 + 1 / 39 - 37 / 39), rel=0.02)


def test_one_unit_has_no_interval() -> None:
    for n_units in (0, 1):
        low, high = t_interval(np.ones((n_units, 2)))
        assert low.shape == (2,)
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


def test_the_jackknife_of_a_mean_is_the_t_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 3.0])
    estimate, low, high = jackknife_interval(
        lambda out: (values if out is None else np.delete(values, out)).mean(keepdims=True), 5
    )
    assert estimate[0] == values.mean()
    np.testing.assert_allclose((low[0], high[0]), t_interval(values))


def test_no_p_value_is_below_what_the_flips_can_show() -> None:
    differences = np.full((30, 2), 5.0) + np.random.default_rng(0).normal(0, 0.01, (30, 2))
    _, p = sign_flip_max_t(differences, n_flips=99)
    assert p == pytest.approx(1 / 100)


def test_the_interval_of_light_tails_is_the_textbook_one() -> None:
    values = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [5.0, 0.0]])
    low, high = t_interval(values)
    half_width = 3.182446 * np.sqrt(10 / 3) / 2  # t of 3 degrees of freedom
    np.testing.assert_allclose(low, [3 - half_width, 0], rtol=1e-5)
    np.testing.assert_allclose(high, [3 + half_width, 0], rtol=1e-5)
    assert np.isnan(t_interval(values[:1])).all()


def test_few_units_give_no_p_below_what_all_flips_would() -> None:
    rng = np.random.default_rng(0)
    for n_units in (4, 6):
        differences = np.abs(rng.normal(1, 0.01, (n_units, 3)))  # every unit on one side
        for seed in range(20):
            _, p = sign_flip_max_t(differences, 2000, seed)
            assert p.min() >= 2.0 ** (1 - n_units)
