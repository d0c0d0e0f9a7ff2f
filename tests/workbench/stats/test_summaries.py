from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.summaries import group_means, layer_means, segment_lengths


def test_layer_means_average_tokens_then_groups(tiny) -> None:
    tokens, routing = tiny
    means = layer_means(tokens, routing, "router_entropy", by=["lang"])
    assert means.select("lang", "layer", "mean", "n_groups").rows() == [("en", 0, 4.0, 1), ("ja", 0, 1.5, 1)]


def test_groups_weigh_the_same_and_the_interval_is_over_groups() -> None:
    units = pl.DataFrame({"group_id": ["a", "b", "c"], "lang": ["ja"] * 3, "x": [1.0, 2.0, 6.0]})
    row = group_means(units, "x", ["lang"]).row(0, named=True)
    assert row["mean"] == 3.0
    assert row["n_groups"] == 3
    around = 4.302653 * np.sqrt(7 / 3)  # t of 2 degrees of freedom, times the standard error
    assert row["low"] == pytest.approx(3 - around)
    assert row["high"] == pytest.approx(3 + around)


def test_a_margin_that_does_not_exist_is_left_out(tiny) -> None:
    tokens, routing = tiny
    routing = routing.with_columns(router_margin=pl.lit(None, dtype=pl.Float32))
    assert layer_means(tokens, routing, "router_margin", by=["lang"]).is_empty()


def test_lengths_count_written_tokens_of_each_channel(tiny) -> None:
    lengths = segment_lengths(tiny[0])
    rows = {(row["lang"], row["segment"]): row["mean"] for row in lengths.iter_rows(named=True)}
    assert rows["ja", "final"] == 1.0
    assert rows["ja", "analysis"] == 0.0
    assert rows["en", "final"] == 0.0  # a document without the channel counts as length 0, it is not dropped
