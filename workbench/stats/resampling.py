"""Uncertainty when the document is the unit: bootstrap, sign flips, jackknife.

Arrays in, arrays out. The first axis is always the unit (a prompt group): tokens of one document are not
independent, so nothing here may be handed one row per token (arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

Floats = NDArray[np.float64]

Z95 = 1.959964  # half-width of a 95% normal interval, in standard errors


def bootstrap_mean(values: Floats, n_resamples: int = 2000, seed: int = 0) -> tuple[Floats, Floats]:
    """95% percentile interval of the mean over units.

    `values` is [unit ...]; returns (low, high) of shape [...]. Units are drawn with replacement (Efron 1979). With
    fewer than about 20 units the interval is too narrow; with fewer than 2 it is NaN.
    """
    n_units = values.shape[0]
    flat = values.reshape(n_units, -1)
    if n_units < 2:
        missing = np.full(values.shape[1:], np.nan)
        return missing, missing.copy()
    weights = (
        np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=n_resamples) / n_units
    )
    low, high = np.quantile(weights @ flat, (0.025, 0.975), axis=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def t_interval(values: Floats) -> tuple[Floats, Floats]:
    """95% interval of the mean over units, by Student's t: `values` [unit ...] -> (low, high) of shape [...].

    For means of paired differences: on planted models with 40 groups it holds the true effect 95% of the time where
    the percentile bootstrap holds it 93% of the time (docs/calibration.md). NaN for fewer than 2 units.
    """
    n_units = values.shape[0]
    if n_units < 2:
        missing = np.full(values.shape[1:], np.nan)
        return missing, missing.copy()
    mean = values.mean(0)
    half_width = student_t.ppf(0.975, n_units - 1) * values.std(0, ddof=1) / np.sqrt(n_units)
    return mean - half_width, mean + half_width


def sign_flip_max_t(differences: Floats, n_flips: int = 5000, seed: int = 0) -> tuple[Floats, Floats]:
    """Paired t statistics and p values adjusted for the whole family of tests at once.

    `differences` is [unit test], one paired difference per unit. Null: each unit's vector of differences is symmetric
    around zero, so the sign of a whole unit may be flipped. The adjusted p of a test is the share of flips whose
    largest |t| over all tests reaches its own |t|, which bounds the family-wise error (Westfall & Young 1993; Winkler
    et al. 2014, doi 10.1016/j.neuroimage.2014.01.060). The smallest p possible is max(1 / (n_flips + 1), 2^(1-unit)).
    """
    n_units, n_tests = differences.shape
    if n_units < 2:
        return np.full(n_tests, np.nan), np.full(n_tests, np.nan)
    squares = (differences**2).sum(0)
    observed = _paired_t(differences.mean(0), squares, n_units)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(n_flips, n_units))
    largest = np.concatenate(
        [
            np.abs(_paired_t(block @ differences / n_units, squares, n_units)).max(1)
            for block in np.array_split(signs, max(1, n_flips * n_tests // 4_000_000))
        ]
    )
    # A flip that reproduces the data must count as reaching it, whatever the last bits of the sum say.
    reached = np.sort(largest * (1 + 1e-9))
    exceeding = n_flips - np.searchsorted(reached, np.abs(observed), side="left")
    return observed, (1 + exceeding) / (n_flips + 1)


def _paired_t(means: Floats, squares: Floats, n_units: int) -> Floats:
    """mean / standard error; 0 where every difference is 0, infinite where all are equal and not 0."""
    variance = np.maximum(squares - n_units * means**2, 0) / (n_units * (n_units - 1))
    variance[variance < 1e-14 * np.maximum(squares, 1e-300)] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means == 0, 0.0, means / np.sqrt(variance))


def jackknife_interval(statistic: Callable[[int | None], Floats], n_units: int) -> tuple[Floats, Floats, Floats]:
    """(estimate, low, high) of any statistic of the units, by leaving out one unit at a time.

    `statistic` receives the number of the unit to leave out, or None for none. The interval is estimate +- 1.96
    standard errors (Tukey 1958). Chosen over the bootstrap for divergences: a unit drawn twice would sit in both halves
    of a split and make the halves look alike.
    """
    estimate = statistic(None)
    spread = np.var(np.stack([statistic(unit) for unit in range(n_units)]), axis=0) * (n_units - 1)
    half_width = Z95 * np.sqrt(spread)
    return estimate, estimate - half_width, estimate + half_width


def block_jackknife(
    statistic: Callable[[NDArray[np.bool_]], Floats], n_units: int, n_blocks: int = 20, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """(estimate, low, high) of a costly statistic of the units, by leaving out one block of units at a time.

    `statistic` receives which units are kept [unit]. Units are dealt to at most `n_blocks` blocks at random; the
    standard error is that of the delete-a-group jackknife (Kott 2001), the interval estimate +- t_{0.975} errors with
    n_blocks - 1 degrees of freedom. Fewer than 3 units give a NaN interval.
    """
    estimate = np.asarray(statistic(np.ones(n_units, dtype=bool)), dtype=np.float64)
    if n_units < 3:
        missing = np.full(estimate.shape, np.nan)
        return estimate, missing, missing.copy()
    n_blocks = min(n_blocks, n_units)
    block = np.random.default_rng(seed).permutation(n_units) % n_blocks
    left = np.stack([statistic(block != number) for number in range(n_blocks)])
    error = np.sqrt((n_blocks - 1) / n_blocks * ((left - left.mean(0)) ** 2).sum(0))
    half_width = student_t.ppf(0.975, n_blocks - 1) * error
    return estimate, estimate - half_width, estimate + half_width


def welch_interval(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """95% interval of the difference of two means over different units: [unit ...] twice -> (low, high) [...].

    Welch's t with Satterthwaite's degrees of freedom (Welch 1947). NaN when a side has fewer than 2 units.
    """
    if min(len(first), len(second)) < 2:
        missing = np.full(first.shape[1:], np.nan)
        return missing, missing.copy()
    errors = [side.var(0, ddof=1) / len(side) for side in (first, second)]
    total = errors[0] + errors[1]
    parts = sum(error**2 / (len(side) - 1) for error, side in zip(errors, (first, second), strict=True))
    freedom = np.divide(total**2, parts, out=np.ones_like(total), where=parts > 0)
    half_width = student_t.ppf(0.975, freedom) * np.sqrt(total)
    difference = first.mean(0) - second.mean(0)
    return difference - half_width, difference + half_width


def permutation_max_t(
    values: Floats,
    labels: NDArray[np.bool_],
    strata: NDArray[np.int64] | None = None,
    n_shuffles: int = 2000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Welch t and family-wise adjusted p of units with a label against those without.

    `values` is [unit test]. Null: labels are exchangeable between units of the same stratum (say topic), so they are
    shuffled there; max-T over all tests (Westfall & Young 1993). NaN when a side has fewer than 2 units.
    """
    n_units, n_tests = values.shape
    if labels.sum() < 2 or (~labels).sum() < 2:
        return np.full(n_tests, np.nan), np.full(n_tests, np.nan)
    rng = np.random.default_rng(seed)
    strata = np.zeros(n_units, dtype=np.int64) if strata is None else strata
    observed = np.abs(_welch(values, labels[None].astype(np.float64))[0])
    reached = np.zeros(n_tests)
    step = max(1, 4_000_000 // max(1, n_tests))
    for start in range(0, n_shuffles, step):
        shuffled = _shuffle_within(labels, strata, min(step, n_shuffles - start), rng)
        largest = np.sort(np.abs(_welch(values, shuffled)).max(1) * (1 + 1e-9))
        reached += len(largest) - np.searchsorted(largest, observed, side="left")
    return _welch(values, labels[None].astype(np.float64))[0], (1 + reached) / (n_shuffles + 1)


def _shuffle_within(labels: NDArray[np.bool_], strata: NDArray[np.int64], n: int, rng: np.random.Generator) -> Floats:
    """n shuffles of the labels [shuffle unit], each within its stratum."""
    order = np.argsort(strata, kind="stable")
    # units of a stratum lie next to each other both by stratum and, within it, by a random number
    keys = strata[None] + rng.random((n, len(labels)))
    shuffled = np.empty((n, len(labels)))
    np.put_along_axis(shuffled, keys.argsort(1), np.broadcast_to(labels[order], shuffled.shape).astype(float), axis=1)
    return shuffled


def _welch(values: Floats, labels: Floats) -> Floats:  # [unit test], [shuffle unit] -> [shuffle test]
    sides = []
    for side in (labels, 1 - labels):
        n = side.sum(1, keepdims=True)
        mean = side @ values / n
        variance = np.maximum(side @ values**2 / n - mean**2, 0) * n / (n - 1)
        sides.append((mean, variance / n))
    (mean_a, error_a), (mean_b, error_b) = sides
    error = np.sqrt(error_a + error_b)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean_a == mean_b, 0.0, (mean_a - mean_b) / error)
