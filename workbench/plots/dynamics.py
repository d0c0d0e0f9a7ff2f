"""Figures about how routing moves: around the turns of an answer, along the text, from layer to layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from workbench.plots.distributions import interval_band
from workbench.plots.theme import DIVERGING, GREY, TEMPLATE, figure, layer_step, looks


def event_curves(events: pl.DataFrame, y_title: str) -> go.Figure:
    """A value around the turns of an answer, less that around control places: one curve per turn over the offset.

    events: `stats.events.event_average` of one layer, or of a mean over layers, with a column `turn`. Bands: 95%.
    Filled points: adjusted p <= 0.05 (one family for each turn); open ones: not.
    """
    fig = figure(height=320)
    fig.add_hline(y=0, line={"color": GREY, "width": 1})
    turns = events["turn"].unique(maintain_order=True).to_list()
    for turn, look in looks(turns).items():
        part = events.filter(turn=turn).sort("offset")
        fig.add_trace(interval_band(part, "low", "high", look.colour, x="offset"))
        sure = (part["p_adjusted"] <= 0.05).fill_null(False)
        fig.add_trace(
            go.Scatter(
                x=part["offset"], y=part["difference"], name=turn, mode="lines+markers",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker={"size": 8, "symbol": [look.symbol if found else f"{look.symbol}-open" for found in sure]},
                customdata=part.select("event", "control", "p_adjusted", "n_groups").rows(),
                hovertemplate=f"{turn}, token %{{x:+d}}<br>%{{customdata[0]:.3f}} against %{{customdata[1]:.3f}}: "
                "%{y:+.3f}, adjusted p %{customdata[2]:.4f}<br>%{customdata[3]} groups<extra></extra>",
            )
        )  # fmt: skip
    fig.update_xaxes(title_text="tokens from the turn", tickformat="+d")
    fig.update_yaxes(title_text=y_title)
    return fig


def in_a_row_curves(in_a_row: pl.DataFrame) -> go.Figure:
    """How well one fixed set of experts serves tokens in a row, by layer; dashed: the same tokens shuffled.

    `in_a_row` comes from `stats.dynamics.local_consistency`.
    """
    fig = figure()
    for m, look in looks(in_a_row["m"].unique().sort().to_list()).items():
        part = in_a_row.filter(m=m).sort("layer")
        fig.add_trace(interval_band(part, "low", "high", look.colour))
        fig.add_trace(
            go.Scatter(
                x=part["layer"], y=part["srp"], name=f"{m} tokens in a row", mode="lines+markers",
                line={"color": look.colour, "width": 2}, marker={"size": 7, "symbol": look.symbol},
                hovertemplate=f"{m} tokens in a row<br>layer %{{x}}: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
        fig.add_trace(
            go.Scatter(
                x=part["layer"], y=part["null"], mode="lines", showlegend=False,
                line={"color": look.colour, "dash": "dash", "width": 1},
                hovertemplate=f"{m} shuffled tokens<br>layer %{{x}}: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
    fig.update_xaxes(title_text="layer", tickformat="d", tick0=0, dtick=layer_step(in_a_row["layer"].n_unique()))
    fig.update_yaxes(title_text="served by one set (F1)")
    return fig


def likeness_map(layers: pl.DataFrame) -> go.Figure:
    """Whether two layers sort tokens alike. `layers` comes from `stats.dynamics.layer_consistency`."""
    names = sorted(set(layers["layer"]) | set(layers["other"]))
    place = {layer: row for row, layer in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    hover = np.full((len(names), len(names), 2), np.nan)
    for row in layers.iter_rows(named=True):
        for a, b in ((row["layer"], row["other"]), (row["other"], row["layer"])):
            values[place[a], place[b]] = row["correlation"]
            hover[place[a], place[b]] = row["low"], row["high"]
    fig = go.Figure(
        go.Heatmap(
            x=names, y=names, z=values, customdata=hover, colorscale=DIVERGING, zmin=-1, zmax=1, xgap=1, ygap=1,
            colorbar={"title": {"text": "correlation", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="layers %{y} and %{x}<br>correlation %{z:.3f} "
            "[%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
        )
    )  # fmt: skip
    fig.update_layout(template=TEMPLATE, height=110 + min(max(26 * len(names), 200), 560))
    fig.update_xaxes(title_text="layer", dtick=layer_step(len(names)), showgrid=False)
    fig.update_yaxes(title_text="layer", autorange="reversed", dtick=layer_step(len(names)), showgrid=False)
    return fig
