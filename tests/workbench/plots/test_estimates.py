"""Figures of estimates, agreements and patching say what their frames say."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.plots.distributions import layer_curves
from workbench.plots.estimates import agreement_points, estimate_points, share_curves
from workbench.plots.patching import patch_map
from workbench.plots.text import with_interval
from workbench.plots.theme import COLOURS, looks

MEANS = pl.DataFrame(
    {"name": ["b", "a"], "mean": [0.5, -1.0], "low": [0.25, None], "high": [1.0, None], "by": ["ja", "other"]}
)


def test_points_keep_order_and_intervals() -> None:
    fig = estimate_points(MEANS, "name", "nats")
    (trace,) = fig.data
    assert (list(trace.x), list(trace.y)) == ([0.5, -1.0], ["b", "a"])
    assert list(trace.error_x.array) == [0.5, 0.0]  # a missing interval is a bare point
    assert list(trace.error_x.arrayminus) == [0.25, 0.0]
    assert list(fig.layout.yaxis.categoryarray) == ["a", "b"]  # plotly counts from below: the first row is on top
    assert fig.layout.shapes[0].x0 == 0
    assert not estimate_points(MEANS, "name", "nats", reference=None).layout.shapes


def test_points_by_a_column_differ_in_colour_and_symbol() -> None:
    fig = estimate_points(MEANS, "name", "nats", by="by")
    assert [trace.name for trace in fig.data] == ["ja", "other"]
    assert fig.data[0].marker.color == COLOURS["ja"] != fig.data[1].marker.color
    assert fig.data[0].marker.symbol != fig.data[1].marker.symbol


@pytest.mark.parametrize(
    "draw",
    [
        lambda frame: estimate_points(frame, "none", "x"),
        lambda frame: agreement_points(frame, "none", "mean", "x", "y"),
        lambda frame: share_curves(frame, "none", "by", "x"),
    ],
)
def test_missing_columns_are_named(draw: Callable[[pl.DataFrame], object]) -> None:
    with pytest.raises(FrameError, match="columns: expected some of name, mean, low, high, by, got none"):
        draw(MEANS)


def test_labels_that_stand_for_two_rows_are_refused() -> None:
    with pytest.raises(FrameError, match="name: expected each label once"):
        estimate_points(pl.concat([MEANS, MEANS]), "name", "x")


def test_agreement_has_a_point_per_row_and_a_diagonal_through_all() -> None:
    fig = agreement_points(MEANS, "mean", "low", "x", "y", hover=["name"], diagonal=True)
    points, line = fig.data
    assert list(points.x) == [0.5, -1.0]
    assert [tuple(row) for row in points.customdata] == [("b",), ("a",)]
    assert list(line.x) == list(line.y)
    assert line.x[0] == -1.0


def test_share_curves_run_through_the_quantiles() -> None:
    frame = pl.DataFrame({"kind": ["a"] * 5 + ["b"] * 3, "value": [0.0, 1, 2, 3, 4, 7, 7, None]})
    first, second = share_curves(frame, "value", "kind", "x", n=5).data
    assert list(first.x) == [0, 1, 2, 3, 4]
    assert list(first.y) == [0, 0.25, 0.5, 0.75, 1]
    assert set(second.x) == {7.0}
    assert second.name == "b (2)"


def test_a_patch_map_puts_every_cell_in_its_place() -> None:
    rows = [("resid_pre", layer, pos, layer + 10 * pos, 0.0, 1.0) for layer in (1, 3) for pos in (0, 2)]
    rows.append(("z", 3, 2, 0.5, 0.0, 1.0))
    frame = pl.DataFrame(rows, schema=["component", "layer", "pos", "mean", "low", "high"], orient="row", strict=False)
    first, second = patch_map(frame).data
    assert first.z.tolist() == [[1, 21], [3, 23]]
    assert list(first.x) == ["0", "2"]
    assert second.z[1][1] == 0.5
    assert second.z[0][0] != second.z[0][0]  # nothing was measured there
    with pytest.raises(FrameError, match="got head"):
        patch_map(frame, across="head")


def test_intervals_in_sentences() -> None:
    assert with_interval(MEANS.row(0, named=True)) == "0.500 [0.250, 1.000]"
    assert with_interval(MEANS.row(0, named=True), form="+.1f") == "+0.5 [+0.2, +1.0]"
    assert with_interval(MEANS.row(1, named=True)) == "-1.000 (no interval)"
    with pytest.raises(FrameError, match="got risk"):
        with_interval(MEANS.row(0, named=True), "risk")


def test_curves_without_a_colour_of_their_own_are_told_apart() -> None:
    frame = pl.DataFrame({"what": ["found", "found", "null", "null"], "layer": [0, 1, 0, 1], "mean": [1.0, 2, 3, 4]})
    found, null = layer_curves(frame, "what", "y").data
    assert found.line.color != null.line.color
    assert found.line.dash != null.line.dash
    assert looks(["ja"])["ja"].colour == COLOURS["ja"]
