"""Ratios of times taken in turn, with an interval that holds what it says."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.ratios import time_ratios


def times(*columns: list[float], names: str = "ab") -> pl.DataFrame:
    rows = [(n, name, value) for name, column in zip(names, columns, strict=True) for n, value in enumerate(column)]
    return pl.DataFrame(rows, schema=["round", "name", "seconds"], orient="row")


def test_drift_that_hits_a_whole_round_cancels() -> None:
    drift = [1.0, 5.0, 2.0, 9.0, 1.0, 3.0, 1.0]
    found = time_ratios(times(drift, [2 * second for second in drift]), "a").filter(pl.col("name") == "b")
    assert found.select("ratio", "low", "high", "n_rounds").row(0) == (2.0, 2.0, 2.0, 7)
    assert found["seconds"].item() == 4.0


def test_the_interval_is_the_sign_tests() -> None:
    base, other = [1.0] * 9, [float(n) for n in range(1, 10)]
    row = time_ratios(times(base, other), "a").row(1, named=True)
    assert (row["ratio"], row["low"], row["high"]) == (5.0, 2.0, 8.0)  # ranks 2 and 8 of 9: 96.1%
    short = time_ratios(times(base[:5], other[:5]), "a").row(1, named=True)
    assert (short["low"], short["high"]) == (None, None)  # 5 rounds: 93.75% at most


def test_it_covers_the_true_median() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        row = time_ratios(times([1.0] * 15, np.exp(rng.normal(size=15)).tolist()), "a").row(1, named=True)
        held += row["low"] <= 1.0 <= row["high"]
    assert held / 400 >= 0.93


def test_a_missing_base_or_round_is_named() -> None:
    with pytest.raises(FrameError, match="base: expected one of a, b, got 'c'"):
        time_ratios(times([1.0], [2.0]), "c")
    with pytest.raises(FrameError, match="rounds without some"):
        time_ratios(times([1.0, 2.0], [2.0]), "a")
