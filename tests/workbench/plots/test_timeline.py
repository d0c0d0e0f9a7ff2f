"""A value along the channels, with its interval where there is one."""

from __future__ import annotations

import polars as pl

from workbench.plots.experts import timeline_curves


def along(layers: list[int]) -> pl.DataFrame:
    rows = [
        (segment, place, layer, 1.0 + place + layer, 0.5 + place, 1.5 + place, 9)
        for segment in ("analysis", "final")
        for place in range(2)
        for layer in layers
    ]
    return pl.DataFrame(rows, schema=["segment", "bin", "layer", "mean", "low", "high", "n_groups"], orient="row")


def test_one_layer_has_its_interval_as_a_band() -> None:
    fig = timeline_curves(along([0]), "nats")
    assert [trace.name for trace in fig.data if trace.showlegend is not False] == ["analysis", "final"]
    bands = [trace for trace in fig.data if trace.fill == "toself"]
    assert [list(band.x) for band in bands] == [[0.25, 0.75, 0.75, 0.25]] * 2
    assert list(bands[0].y) == [0.5, 1.5, 2.5, 1.5]


def test_layers_are_averaged_and_their_intervals_left_out() -> None:
    fig = timeline_curves(along([0, 2]), "nats")
    assert not [trace for trace in fig.data if trace.fill == "toself"]
    assert list(fig.data[0].y) == [2.0, 3.0]
