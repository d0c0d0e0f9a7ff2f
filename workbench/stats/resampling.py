"""Uncertainty when the document is the unit: Student's t, sign flips, jackknife.

Arrays in, arrays out. The first axis is always the unit (a prompt group): tokens of one document are not
independent, so nothing here may be handed one row per token (arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]


def half_width(values: Floats) -> Floats:
    """Half of the 95% interval of the mean over units: [unit ...] -> [...]; NaN for fewer than 2 units.

    Student's t, with the degrees of freedom that the standard error has (`squared_error`). Every interval of a mean and
    every jackknife here is this one; docs/calibration.md says how often it holds, beside the plain t and bootstraps.
    """
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    variance, freedom = squared_error(values)
    return stdtrit(freedom, 0.975) * np.sqrt(variance)


def squared_error(values: Floats) -> tuple[Floats, Floats]:
    """(squared standard error of the mean over units, its degrees of freedom): [unit ...] -> two of [...].

    Freedom: 2 s^4 / var(s^2) (Satterthwaite 1946) with var(s^2) = s^4 (kurtosis - (n - 3) / (n - 1)) / n, at most the
    n - 1 that normal values have. An expert that a handful of units use owes its error to that handful, and n - 1 would
    promise more.
    """
    n = len(values)
    squares = (values - values.mean(0)) ** 2
    variance = squares.mean(0)
    shares = np.divide(squares, variance, out=np.zeros_like(squares), where=variance > 0)
    excess = (shares**2).mean(0) - (n - 3) / (n - 1)
    return variance / (n - 1), np.clip(2 * n / np.maximum(excess, 1e-12), 1, n - 1)


def t_interval(values: Floats) -> tuple[Floats, Floats]:
    """95% interval of the mean over units, mean +- `half_width`: `values` [unit ...] -> (low, high) of shape [...]."""
    mean = values.mean(0) if len(values) else np.full(values.shape[1:], np.nan)
    around = half_width(values)
    return mean - around, mean + around


def sign_flip_max_t(
    differences: Floats, n_flips: int = 5000, seed: int = 0, least: Floats | float = 0.0
) -> tuple[Floats, Floats]:
    """Paired t statistics and p values adjusted for the whole family of tests at once.

    `differences` is [unit test], one paired difference per unit. Null: each unit's vector of differences is symmetric
    around zero, so the sign of a whole unit may be flipped. The adjusted p of a test is the share of flips whose
    largest |t| over all tests reaches its own |t|, which bounds the family-wise error (Westfall & Young 1993; Winkler
    et al. 2014, doi 10.1016/j.neuroimage.2014.01.060). The smallest p possible is max(1 / (n_flips + 1), 2^(1-unit)).

    least: [test] or one number, the least squared standard error that is believed. Something rare that happened not to
    occur in any unit has next to no spread, and its |t| would be of any size.
    """
    n_units, n_tests = differences.shape
    if n_units < 2:
        return np.full(n_tests, np.nan), np.full(n_tests, np.nan)
    squares = (differences**2).sum(0)
    observed = _paired_t(differences.mean(0), squares, n_units, least)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(n_flips, n_units))
    largest = np.concatenate(
        [
            np.abs(_paired_t(block @ differences / n_units, squares, n_units, least)).max(1)
            for block in np.array_split(signs, max(1, n_flips * n_tests // 4_000_000))
        ]
    )
    # A flip that reproduces the data must count as reaching it, whatever the last bits of the sum say.
    reached = np.sort(largest * (1 + 1e-9))
    exceeding = n_flips - np.searchsorted(reached, np.abs(observed), side="left")
    # all flips and none look alike: of few units no draw of flips may give less than all of them would
    return observed, np.maximum((1 + exceeding) / (n_flips + 1), 2.0 ** (1 - n_units))


def _paired_t(means: Floats, squares: Floats, n_units: int, least: Floats | float) -> Floats:
    """mean / standard error; 0 where every difference is 0, infinite where all are equal and not 0."""
    variance = np.maximum(squares - n_units * means**2, 0) / (n_units * (n_units - 1))
    variance[variance < 1e-14 * np.maximum(squares, 1e-300)] = 0
    variance = np.maximum(variance, least)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means == 0, 0.0, means / np.sqrt(variance))


def jackknife_interval(statistic: Callable[[int | None], Floats], n_units: int) -> tuple[Floats, Floats, Floats]:
    """(estimate, low, high) of any statistic of the units, by leaving out one unit at a time.

    `statistic` receives the number of the unit to leave out, or None for none. The interval is estimate +- the
    `half_width` of the pseudo-values (Tukey 1958). Chosen over the bootstrap for divergences: a unit drawn twice would
    sit in both halves of a split and make the halves look alike.
    """
    estimate = np.asarray(statistic(None), dtype=np.float64)
    return estimate, *_around(estimate, [statistic(unit) for unit in range(n_units)])


def block_jackknife(
    statistic: Callable[[NDArray[np.bool_]], Floats], n_units: int, n_blocks: int = 20, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """(estimate, low, high) of a costly statistic of the units, by leaving out one block of units at a time.

    `statistic` receives which units are kept [unit]. Units are dealt to at most `n_blocks` blocks at random; the
    standard error is that of the delete-a-group jackknife (Kott 2001), the interval that of `jackknife_interval` over
    blocks. Fewer than 3 units give a NaN interval.
    """
    estimate = np.asarray(statistic(np.ones(n_units, dtype=bool)), dtype=np.float64)
    if n_units < 3:
        missing = np.full(estimate.shape, np.nan)
        return estimate, missing, missing.copy()
    block = deal_blocks(n_units, n_blocks, seed)
    return estimate, *_around(estimate, [statistic(block != number) for number in range(int(block.max()) + 1)])


def deal_blocks(n_units: int, n_blocks: int = 20, seed: int = 0) -> NDArray[np.int64]:
    """Deals units to at most `n_blocks` blocks of like size at random: the block of every unit."""
    return np.random.default_rng(seed).permutation(n_units) % max(1, min(n_blocks, n_units))


def sums_jackknife(statistic: Callable[[Floats], Floats], sums: Floats) -> tuple[Floats, Floats]:
    """(low, high) of a statistic of sums over units: `block_jackknife` where sums over blocks [block ...] are at hand.

    `statistic` takes sums [...] or [block ...] and works cell by cell. Fewer than 3 blocks give NaN.
    """
    total = sums.sum(0)
    estimate = np.asarray(statistic(total), dtype=np.float64)
    if len(sums) < 3:
        missing = np.full(estimate.shape, np.nan)
        return missing, missing.copy()
    return _around(estimate, statistic(total - sums))


def pair_jackknife(
    statistic: Callable[[NDArray[np.bool_]], Floats], first: NDArray[np.int64], second: NDArray[np.int64]
) -> tuple[Floats, Floats, Floats]:
    """(estimate, low, high) of a statistic of pairs [pair] whose two ends belong to units `first` and `second`.

    `statistic` receives which pairs are kept. A pair goes with the unit of either end. That counts twice what is a
    pair's own, so the squared width over pairs of units, as if these were independent, is taken off, and is the least
    (Aronow, Samii & Assenova 2015, doi 10.1093/pan/mpv018). Fewer than 3 units give a NaN interval.
    """
    n_units = int(max(first.max(initial=-1), second.max(initial=-1))) + 1
    both = np.minimum(first, second) * n_units + np.maximum(first, second)
    names, both = np.unique(both, return_inverse=True)
    estimate, low, high = block_jackknife(lambda units: statistic(units[first] & units[second]), n_units)
    _, alone_low, alone_high = block_jackknife(lambda kept: statistic(kept[both]), len(names))
    each, alone = (high - low) / 2, (alone_high - alone_low) / 2
    around = np.sqrt(np.maximum(each**2 - alone**2, alone**2))
    return estimate, estimate - around, estimate + around


def _around(estimate: Floats, left_out: Sequence[Floats] | Floats) -> tuple[Floats, Floats]:
    """estimate +- the half-width of its pseudo-values, up to a constant: (1 - n) times the estimates with one out."""
    around = half_width((1 - len(left_out)) * np.asarray(left_out, dtype=np.float64))
    return estimate - around, estimate + around


def welch_interval(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """95% interval of the difference of two means over different units: [unit ...] twice -> (low, high) [...].

    Welch's t with Satterthwaite's degrees of freedom (Welch 1947), of each side as in `squared_error`. NaN when a side
    has fewer than 2 units.
    """
    if min(len(first), len(second)) < 2:
        missing = np.full(first.shape[1:], np.nan)
        return missing, missing.copy()
    (error_a, freedom_a), (error_b, freedom_b) = (squared_error(side) for side in (first, second))
    total, parts = error_a + error_b, error_a**2 / freedom_a + error_b**2 / freedom_b
    freedom = np.divide(total**2, parts, out=np.ones_like(total), where=parts > 0)
    around = stdtrit(freedom, 0.975) * np.sqrt(total)
    difference = first.mean(0) - second.mean(0)
    return difference - around, difference + around


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
