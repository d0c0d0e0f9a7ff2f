"""Loads as compositions: log-odds, centred log-ratios, and how much of an expert's use one condition takes.

Frequencies of a layer sum to k, so differences of them are tied to each other and small for rarely used experts. A
ratio of odds asks how many times as often; a centred log-ratio divides by the typical expert; the entropy over
conditions (LAPE) asks whose expert it is. The unit is the prompt group, and every null exchanges conditions within it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from workbench.errors import FrameError
from workbench.stats.load import frequency_cube, n_tokens_of
from workbench.stats.resampling import Floats, jackknife_interval, sign_flip_max_t, t_interval


def log_odds_contrasts(
    counts: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    prior: float = 10.0,
    n_resamples: int = 2000,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """How many times as often, in logs: one row per (layer, expert), largest |z| first.

    counts: `load.slot_counts` by [unit, axis]; values: the two conditions, first minus second. log_odds is the log-odds
    ratio with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008, doi 10.1093/pan/mpn018) of `prior` tokens
    that use experts as both conditions together do: ln (y + a) / (n + prior - y - a) of the first less that of the
    second, where y / n is the mean over units of f, n half of all tokens and a = prior f of both. In nats; 0: no
    difference; the prior keeps experts that were hardly used near 0. low, high: jackknife over units.

    Null: the conditions of every unit exchanged at random. z = log_odds / its standard deviation over exchanges (their
    own variance counts tokens, which depend on each other); p_adjusted is the share of exchanges whose largest |z|
    reaches it (max-T, Westfall & Young 1993). Other columns: f_<value>, n_units, n_tokens, n_tests. Raises FrameError
    without pairs.
    """
    units, layers, cube = _paired_cube(counts, axis, values, n_experts, unit)
    n = n_tokens_of(counts, units, axis, values, unit) / 2
    alpha = prior * cube.mean((0, 1))  # [test]
    first, second = cube
    both = first.mean(0) + second.mean(0)

    def ratio(f_first: Floats, f_second: Floats) -> Floats:
        return _log_odds(n * f_first + alpha, n + prior) - _log_odds(n * f_second + alpha, n + prior)

    estimate, low, high = jackknife_interval(
        lambda out: ratio(_mean_without(first, out), _mean_without(second, out)), len(units)
    )
    mixed = _exchanged(first, second, n_resamples, seed)  # [draw test]
    drawn = ratio(mixed, both - mixed)
    spread = np.maximum(drawn.std(0), 1e-12)
    z, largest = estimate / spread, (np.abs(drawn) / spread).max(1)
    columns = {"log_odds": estimate, "low": low, "high": high, "z": z, "p_adjusted": _adjusted(np.abs(z), largest)}
    frame = _frame(layers, n_experts, values, cube, columns, len(units), round(2 * n))
    return frame.sort(pl.col("z").abs(), descending=True, maintain_order=True)


def clr_contrasts(
    counts: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    prior: float = 10.0,
    n_resamples: int = 2000,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Paired differences of centred log-ratios of the load: one row per (layer, expert), largest |t| first.

    clr_e = ln q_e - mean over experts of ln q (Aitchison 1982), q the load of a unit and condition with `prior` tokens
    of the load of both conditions added, so that no share is 0. clr_difference: mean over units of first less second,
    in nats; it is free of what all experts of a layer share, but sums to 0 over them. low, high: Student's t over
    units; t, p_adjusted: sign flips over units, max-T. Null: exchanging the conditions of a unit changes nothing. Units
    weigh equally whatever their length, and short units are shrunk more. Other columns and errors as in
    `log_odds_contrasts`.
    """
    units, layers, cube = _paired_cube(counts, axis, values, n_experts, unit)
    lengths = _lengths(counts, axis, values, units, unit)  # [value unit]
    smooth = cube * lengths[..., None] + prior * np.maximum(cube.mean((0, 1)), 1e-9)
    logs = np.log(smooth).reshape(*smooth.shape[:2], len(layers), n_experts)
    clr = (logs - logs.mean(-1, keepdims=True)).reshape(smooth.shape)
    difference = clr[0] - clr[1]
    low, high = t_interval(difference)
    t, p_adjusted = sign_flip_max_t(difference, n_resamples, seed)
    columns = {"clr_difference": difference.mean(0), "low": low, "high": high, "t": t, "p_adjusted": p_adjusted}
    frame = _frame(layers, n_experts, values, cube, columns, len(units), int(lengths.sum()))
    return frame.sort(pl.col("t").abs(), descending=True, maintain_order=True)


def activation_entropy(
    counts: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    n_resamples: int = 1000,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Whose expert is it? Language activation probability entropy (LAPE, arXiv 2402.16438) with experts for neurons.

    counts: `load.slot_counts` by [unit, axis]; values: two or more conditions. share_<value> = f_value / sum of f over
    conditions, f the mean over units; lape = -sum share ln share, in nats: 0 for an expert of one condition alone, ln
    of the number of conditions for one that all use alike. null: its mean when the conditions of a unit are exchanged
    at random, which is below that maximum because text differs; excess = null - lape, with a jackknife interval over
    units, low, high; p_adjusted: the share of exchanges in which any expert's excess, in standard deviations of its
    null, reaches this one's (max-T). share_<value>_low, _high: jackknife.

    One row per (layer, expert), largest excess first; NaN where no unit used the expert. With two conditions lape only
    ranks experts by distance from an even share: read the share. The result depends on which conditions were compared.
    Other columns: top (the condition with the largest share), n_units, n_tests. Raises FrameError without units that
    have all conditions, or for fewer than two conditions.
    """
    units, layers, cube = _paired_cube(counts, axis, values, n_experts, unit)

    def shares(out: int | None) -> Floats:  # [value + 1, test]: shares, then entropy
        f = _mean_without(cube.swapaxes(0, 1), out)
        return np.concatenate([_shares(f), _entropy(f)[None]])

    estimate, low, high = jackknife_interval(shares, len(units))
    drawn = np.stack(list(_shuffled_entropies(cube, n_resamples, seed)))  # [draw test]
    null, spread = drawn.mean(0), np.maximum(drawn.std(0), 1e-12)
    excess, around = null - estimate[-1], (high[-1] - low[-1]) / 2
    used = np.isfinite(null)
    score = np.where(used, excess / spread, -np.inf)
    largest = ((null - drawn) / spread)[:, used].max(1) if used.any() else np.zeros(len(drawn))
    columns = {
        "lape": estimate[-1], "null": null, "excess": excess, "low": excess - around, "high": excess + around,
        "p_adjusted": np.where(used, _adjusted(score, largest), np.nan),
    }  # fmt: skip
    for place, value in enumerate(values):
        columns |= {f"share_{value}": estimate[place]}
        columns |= {f"share_{value}_low": np.maximum(low[place], 0), f"share_{value}_high": np.minimum(high[place], 1)}
    frame = _frame(layers, n_experts, values, cube, columns, len(units), None)
    top = np.array(values)[np.nan_to_num(estimate[:-1]).argmax(0)]
    frame = frame.with_columns(top=pl.Series(top))
    return frame.sort(pl.col("excess").fill_nan(None), descending=True, nulls_last=True, maintain_order=True)


def _paired_cube(
    counts: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int, unit: str
) -> tuple[list[str], list[int], Floats]:
    """Units, layers and frequencies [value unit test], a test being a layer and expert."""
    if len(set(values)) < 2:
        raise FrameError(f"values: expected two conditions or more of {axis}, got {', '.join(values) or 'none'}.")
    units, layers, cube = frequency_cube(counts, axis, values, n_experts, unit)
    if len(units) < 2:
        raise FrameError(
            f"counts: expected two or more of {unit} with every one of {', '.join(values)}, got {len(units)}. "
            f"Count by [{unit}, {axis}] and pass conditions that the same units have."
        )
    return units, layers, cube.reshape(len(values), len(units), -1)


def _lengths(counts: pl.DataFrame, axis: str, values: Sequence[str], units: Sequence[str], unit: str) -> Floats:
    """Tokens of every condition and unit [value unit]."""
    sizes = {(row[0], row[1]): row[2] for row in counts.select(axis, unit, "n_tokens").unique().rows()}
    return np.array([[sizes[value, name] for name in units] for value in values], dtype=np.float64)


def _mean_without(values: Floats, out: int | None) -> Floats:
    """Mean over the first axis, without one of its entries."""
    return values.mean(0) if out is None else (values.sum(0) - values[out]) / (len(values) - 1)


def _exchanged(first: Floats, second: Floats, n: int, seed: int) -> Floats:
    """The mean of the first condition, n times, with the conditions of a random half of the units exchanged."""
    stay = np.random.default_rng(seed).integers(0, 2, (n, len(first)))
    return (stay @ first + (1 - stay) @ second) / len(first)


def _log_odds(y: Floats, n: float) -> Floats:
    """ln y / (n - y); an expert of no token or of every one is kept half a token or less away from infinity."""
    return np.log(np.maximum(y, 1e-9) / np.maximum(n - y, 0.5))


def _shares(f: Floats) -> Floats:  # [value test] -> [value test], NaN where no condition uses the expert
    total = f.sum(0)
    return np.divide(f, total, out=np.full(f.shape, np.nan), where=total > 1e-12)


def _entropy(f: Floats) -> Floats:  # [value test] -> [test]
    share = _shares(f)
    return -(share * np.log(share, out=np.zeros_like(share), where=share > 0)).sum(0)


def _shuffled_entropies(cube: Floats, n: int, seed: int) -> Iterator[Floats]:  # [value unit test] -> n times [test]
    rng = np.random.default_rng(seed)
    places = np.arange(cube.shape[1])
    for _ in range(n):
        yield _entropy(cube[rng.random(cube.shape[:2]).argsort(0), places].mean(1))


def _adjusted(score: Floats, largest: Floats) -> Floats:
    """(1 + draws whose largest score reaches this one) / (1 + draws)."""
    ordered = np.sort(largest * (1 + 1e-9))
    return (1 + len(ordered) - np.searchsorted(ordered, score, side="left")) / (1 + len(ordered))


def _frame(
    layers: Sequence[int], n_experts: int, values: Sequence[str], cube: Floats, columns: dict[str, Floats],
    n_units: int, n_tokens: int | None,
) -> pl.DataFrame:  # fmt: skip
    tests = {
        "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
        "expert": np.tile(np.arange(n_experts), len(layers)),
        **{f"f_{value}": cube[place].mean(0) for place, value in enumerate(values)},
    }
    sizes = {"n_units": n_units, **({} if n_tokens is None else {"n_tokens": n_tokens}), "n_tests": cube.shape[-1]}
    return pl.DataFrame({**tests, **columns}).with_columns(**{name: pl.lit(size) for name, size in sizes.items()})
