"""Maps over layers and experts."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.plots.theme import DIVERGING, GRID, NAMES, TEMPLATE, map_axes, ordered

WIDE = 64  # experts from which a panel takes the whole width, and cells have no gaps between them
MAX_RATIO = 3.0  # log2: colours saturate at 8 times more or less than uniform


def load_map(load: pl.DataFrame, panels: str) -> go.Figure:
    """Expert load against uniform, one panel per value of the column `panels`: layers down, experts across.

    `load` comes from `stats.load.expert_load(by=[panels])`. Colour: log2(load E), so 0 is uniform and +1 twice as much;
    an expert without a single slot shows at the bottom of the scale. A column `tokens`, where there is one, joins the
    hover: the text of each expert's tokens, say.
    """
    values = ordered(load[panels])
    n_columns = 1 if int(load["expert"].max()) >= WIDE else min(len(values), 2)  # type: ignore[arg-type]
    n_rows = -(-len(values) // n_columns)
    height = 60 + n_rows * (_panel_height(load["layer"].n_unique()) + 70)
    figure = make_subplots(
        n_rows,
        n_columns,
        subplot_titles=[NAMES.get(value, str(value)) for value in values],
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=75 / height,
    )
    for place, value in enumerate(values):
        part = load.filter(pl.col(panels) == value)
        figure.add_trace(_load_panel(part), place // n_columns + 1, place % n_columns + 1)
    return _map_layout(figure, height, "log2(load / uniform)", MAX_RATIO, n_rows)


def contrast_map(
    contrasts: pl.DataFrame, alpha: float = 0.05, sides: tuple[str, str] = ("ja", "en"), mark: str = "p_adjusted"
) -> go.Figure:
    """Risk difference of every expert between two conditions; a dot marks adjusted p < `alpha`, or what is flagged.

    `contrasts` comes from `stats.contrasts.paired_contrasts` of `sides`; mark: "p_adjusted" or "flagged".
    """
    layers, values = _matrix(contrasts, "risk_difference")
    marked = _matrix(contrasts, mark)[1]
    marked = marked > 0 if mark == "flagged" else marked < alpha
    text = _hover(contrasts, (f"f_{sides[0]}", f"f_{sides[1]}", "low", "high", "p_adjusted"))
    first, second = (side.upper() if len(side) == 2 else side for side in sides)
    figure = make_subplots(1, 1)
    figure.add_trace(
        go.Heatmap(
            z=values,
            y=layers,
            customdata=text,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="layer %{y}, expert %{x}<br>"
            f"{first} - {second} %{{z:+.3f}} [%{{customdata[2]:+.3f}}, %{{customdata[3]:+.3f}}]<br>"
            f"mean share of tokens: {first} %{{customdata[0]:.3f}}, {second} %{{customdata[1]:.3f}}<br>"
            "adjusted p %{customdata[4]:.4f}<extra></extra>",
        )
    )
    rows, columns = np.nonzero(marked)
    figure.add_trace(
        go.Scatter(
            x=columns,
            y=np.array(layers)[rows],
            mode="markers",
            marker={"size": 4, "color": "#ffffff", "line": {"color": "#22262c", "width": 1}},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    return _map_layout(figure, 110 + _panel_height(len(layers)), f"{first} - {second}", max(limit, 1e-3))


def _load_panel(load: pl.DataFrame) -> go.Heatmap:
    layers, ratios = _matrix(load, "log2_ratio")
    tokens = "tokens" in load.columns
    return go.Heatmap(
        z=np.nan_to_num(ratios, nan=-MAX_RATIO),
        y=layers,
        customdata=_hover(load, ("load", "slots")),
        text=_texts(load, "tokens") if tokens else None,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hovertemplate="layer %{y}, expert %{x}<br>load %{customdata[0]:.2%} of slots (%{customdata[1]:,.0f})<br>"
        "log2(load / uniform) %{z:+.2f}" + ("<br>%{text}" if tokens else "") + "<extra></extra>",
    )


def _matrix(frame: pl.DataFrame, value: str) -> tuple[list[int], np.ndarray]:
    """(layers, values [layer expert]) of a frame with one row per layer and expert."""
    ordered = frame.sort("layer", "expert")
    layers = ordered["layer"].unique().sort().to_list()
    return layers, ordered[value].cast(pl.Float64).to_numpy().reshape(len(layers), -1)


def _hover(frame: pl.DataFrame, columns: Sequence[str]) -> np.ndarray:
    return np.stack([_matrix(frame, column)[1] for column in columns], axis=-1)


def _texts(frame: pl.DataFrame, column: str) -> np.ndarray:
    """Texts [layer expert] as plotly shows them literally: it reads some markup, which tokens may look like."""
    layers, texts = frame["layer"].n_unique(), frame.sort("layer", "expert")[column].fill_null("")
    return np.array([html.escape(text).replace("\n", "↵") for text in texts], dtype=object).reshape(layers, -1)


def _panel_height(n_layers: int) -> int:
    return min(max(22 * n_layers, 150), max(420, 8 * n_layers))


def _map_layout(figure: go.Figure, height: int, title: str, limit: float, n_rows: int = 1) -> go.Figure:
    figure.update_layout(
        template=TEMPLATE,
        height=height,
        coloraxis={
            "colorscale": DIVERGING,
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {
                "title": {"text": title, "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
                "tickcolor": GRID,
            },
        },
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="expert", row=n_rows)
    n_layers = max(len(trace.y) for trace in figure.data if trace.type == "heatmap")
    figure.update_yaxes(showgrid=False, zeroline=False, autorange="reversed", tickformat="d")
    if n_layers <= 16:  # few enough to name each
        figure.update_yaxes(dtick=1)
    figure.update_yaxes(title_text="layer", col=1)
    return map_axes(figure)
