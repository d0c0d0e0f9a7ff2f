"""Ratios of times that were measured in turn: what a busy machine does to one round, it does to both."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy.stats import binom

from workbench.errors import FrameError


def time_ratios(times: pl.DataFrame, base: str) -> pl.DataFrame:
    """How many times as long each run took as `base`, within rounds: columns name, seconds, ratio, low, high, n_rounds.

    times: `experiments.timing.time_in_turn`. seconds: the median over rounds; ratio: the median of the ratios within a
    round. low, high: the order statistics that hold the true median with at least 95% (sign test), None with fewer than
    6 rounds, which cannot. Null: 1. Raises FrameError when `base` or a round is missing.
    """
    wide = times.pivot("name", index="round", values="seconds").sort("round")
    if base not in wide.columns:
        raise FrameError(f"base: expected one of {', '.join(wide.columns[1:])}, got {base!r}.")
    if wide.null_count().sum_horizontal().item():
        raise FrameError("times: expected every run in every round, got rounds without some.")
    rows = []
    for name in wide.columns[1:]:
        ratio = np.sort((wide[name] / wide[base]).to_numpy())
        low, high = _median_interval(ratio)
        rows.append((name, wide[name].median(), float(np.median(ratio)), low, high, len(ratio)))
    schema = {"name": pl.String, "seconds": pl.Float64, "ratio": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema={**schema, "n_rounds": pl.Int64}, orient="row")


def _median_interval(ordered: np.ndarray) -> tuple[float | None, float | None]:
    """The narrowest pair of order statistics, equally far from both ends, with coverage of at least 95%."""
    n = len(ordered)
    fits = [left for left in range(n // 2) if 1 - 2 * binom.cdf(left, n, 0.5) >= 0.95]
    if not fits:
        return None, None
    return float(ordered[fits[-1]]), float(ordered[n - 1 - fits[-1]])
