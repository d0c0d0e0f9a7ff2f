"""How well the pipeline finds what was planted: precision and recall over strengths and numbers of documents."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.plots.theme import GREY, GRID, TEMPLATE, faded

SHOWN = ("shared", "mode", "all")
TITLES = {"shared": "language, shared tokens", "mode": "channel, header swapped", "all": "language, all tokens"}
LOOKS = (("#d55e00", "solid", "circle"), ("#2b86c5", "dash", "square"), ("#009e73", "dot", "diamond"))


def calibration_curves(accuracy: pl.DataFrame) -> go.Figure:
    """Recall (above) and precision (below) over strength, a column per contrast, a line per number of groups.

    `accuracy` comes from `stats.calibration.accuracy`. Bands are 95% bootstrap intervals over trials; the grey lines
    are the gates, 0.95 for recall and 0.9 for precision.
    """
    shown = [name for name in SHOWN if name in set(accuracy["contrast"])]
    groups = accuracy.filter(pl.col("contrast").is_in(shown))["n_groups"].unique().sort().to_list()
    figure = make_subplots(
        2, len(shown), subplot_titles=[TITLES[name] for name in shown], shared_xaxes=True, shared_yaxes=True,
        vertical_spacing=0.07, horizontal_spacing=0.03,
    )  # fmt: skip
    for column, name in enumerate(shown, 1):
        for n, (colour, dash, symbol) in zip(groups, LOOKS, strict=False):
            part = accuracy.filter(pl.col("contrast") == name, pl.col("n_groups") == n).sort("strength")
            for row, measure in enumerate(("recall", "precision"), 1):
                known = part.filter(pl.col(measure).is_not_nan())
                label = f"{n} + {n} documents"
                figure.add_trace(_band(known, measure, colour), row, column)
                line = {"color": colour, "dash": dash, "width": 2}
                figure.add_trace(
                    go.Scatter(
                        x=known["strength"], y=known[measure], name=label, legendgroup=label, mode="lines+markers",
                        line=line, marker={"symbol": symbol, "size": 7}, showlegend=row == column == 1,
                        hovertemplate=f"{label}<br>strength %{{x}}: {measure} %{{y:.3f}}<extra></extra>",
                    ),
                    row,
                    column,
                )  # fmt: skip
    for row, gate in ((1, 0.95), (2, 0.9)):
        figure.add_hline(y=gate, line={"color": GREY, "width": 1}, row=row, col="all")
    figure.update_layout(template=TEMPLATE, height=560, margin={"t": 70})
    figure.update_xaxes(type="log", gridcolor=GRID)
    figure.update_xaxes(title_text="strength of the planted experts", row=2)
    figure.update_yaxes(range=[-0.03, 1.05])
    figure.update_yaxes(title_text="recall", row=1, col=1)
    figure.update_yaxes(title_text="precision", row=2, col=1)
    return figure


def _band(part: pl.DataFrame, measure: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=[*part["strength"], *part["strength"].reverse()],
        y=[*part[f"{measure}_low"], *part[f"{measure}_high"].reverse()],
        fill="toself",
        fillcolor=faded(colour, 0.15),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )
