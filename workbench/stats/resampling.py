"""Uncertainty when the document is the unit: bootstrap, sign flips, jackknife.

Arrays in, arrays out. The first axis is always the unit (a prompt group): tokens of one document are not
independent, so nothing here may be handed one row per token (arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

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
