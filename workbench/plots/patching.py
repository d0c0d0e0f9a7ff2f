"""Maps of what patching restores: layers down, positions or heads across."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.errors import FrameError
from workbench.plots.theme import DIVERGING, GRID, TEMPLATE, layer_step


def patch_map(means: pl.DataFrame, across: str = "pos", panels: str = "component", limit: float = 1.0) -> go.Figure:
    """Mean share of the metric restored, one panel per value of `panels`: layers down, `across` along.

    `means` comes from `Result.mean("recovered", by=[panels, "layer", across])`. Colour: 0 fades into the page, 1 is all
    of it, beyond +-`limit` the colour stays. The hover has the interval. Raises FrameError for missing columns.
    """
    needed = ("layer", across, panels, "mean", "low", "high")
    missing = [column for column in needed if column not in means.columns]
    if missing:
        raise FrameError(f"columns: expected some of {', '.join(means.columns)}, got {', '.join(missing)}.")
    names = means[panels].unique(maintain_order=True).to_list()
    columns = means[across].unique(maintain_order=True).to_list()
    layers = means["layer"].unique().sort().to_list()
    fig = make_subplots(
        1, len(names), subplot_titles=[str(name) for name in names], shared_yaxes=True, horizontal_spacing=0.02
    )
    for place, name in enumerate(names, 1):
        fig.add_trace(_panel(means.filter(pl.col(panels) == name), across, layers, columns), 1, place)
    fig.update_layout(
        template=TEMPLATE,
        height=150 + min(max(22 * len(layers), 150), 420),
        coloraxis={
            "colorscale": DIVERGING,
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {"title": {"text": "restored", "side": "right"}, "thickness": 12, "tickcolor": GRID},
        },
    )
    fig.update_xaxes(showgrid=False, zeroline=False, title_text=across, type="category")
    fig.update_yaxes(showgrid=False, zeroline=False, autorange="reversed", dtick=layer_step(len(layers)))
    fig.update_yaxes(title_text="layer", col=1)
    return fig


def _panel(part: pl.DataFrame, across: str, layers: Sequence[int], columns: Sequence[object]) -> go.Heatmap:
    values = np.full((3, len(layers), len(columns)), np.nan)
    for layer, column, *numbers in part.select("layer", across, "mean", "low", "high").rows():
        values[:, layers.index(layer), columns.index(column)] = numbers
    return go.Heatmap(
        z=values[0],
        x=[str(column) for column in columns],
        y=list(layers),
        customdata=np.moveaxis(values[1:], 0, -1),
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate=f"layer %{{y}}, {across} %{{x}}<br>restored %{{z:.3f}} "
        "[%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
    )
