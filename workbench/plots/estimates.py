"""Estimates with their intervals, and how well one number predicts another."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import polars as pl

from workbench.errors import FrameError
from workbench.plots.theme import GREY, figure, looks, ordered


def estimate_points(
    frame: pl.DataFrame,
    label: str,
    x_title: str,
    *,
    by: str | None = None,
    value: str = "mean",
    low: str = "low",
    high: str = "high",
    reference: float | None = 0.0,
) -> go.Figure:
    """One line per row, first row on top: a point and its interval, coloured by the column `by`.

    A missing interval shows as a bare point. reference: where the vertical line stands, None for none. Raises
    FrameError for columns that are not there, and for labels that are not unique within a value of `by`.
    """
    _need(frame, [label, value, low, high, *([by] if by else [])])
    if frame.select(label, *([by] if by else [])).is_duplicated().any():
        raise FrameError(f"{label}: expected each label once, got some twice. Aggregate first, or pass by=.")
    labels = frame[label].cast(pl.String).unique(maintain_order=True).to_list()
    names = ordered(frame[by]) if by else [""]
    fig = figure(height=120 + 24 * max(len(labels), 4) + (8 * len(labels) * (len(names) - 1)))
    for name, look in looks(names).items():
        part = frame.filter(pl.col(by) == name) if by else frame
        fig.add_trace(
            go.Scatter(
                x=part[value].to_list(),
                y=part[label].cast(pl.String).to_list(),
                name=str(name),
                mode="markers",
                marker={"color": look.colour, "size": 8, "symbol": look.symbol},
                error_x=_bars(part, value, low, high),
                customdata=part.select(low, high).rows(),
                hovertemplate=f"%{{y}}{' · ' + str(name) if by else ''}<br>%{{x:.4g}} "
                "[%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
                showlegend=by is not None,
            )
        )
    if reference is not None:
        fig.add_vline(x=reference, line={"color": GREY, "width": 1})
    fig.update_xaxes(title_text=x_title)
    fig.update_yaxes(categoryorder="array", categoryarray=labels[::-1], dtick=1)
    return fig


def agreement_points(
    frame: pl.DataFrame,
    x: str,
    y: str,
    x_title: str,
    y_title: str,
    *,
    by: str | None = None,
    hover: Sequence[str] = (),
    diagonal: bool = False,
) -> go.Figure:
    """One point per row: column `y` over column `x`, coloured by `by`; `hover` columns are shown on pointing.

    diagonal: draws y = x, for two measures of one thing. Raises FrameError for columns that are not there.
    """
    _need(frame, [x, y, *hover, *([by] if by else [])])
    fig = figure(height=420)
    names = ordered(frame[by]) if by else [""]
    for name, look in looks(names).items():
        part = frame.filter(pl.col(by) == name) if by else frame
        texts = "".join(f"{column} %{{customdata[{place}]}}<br>" for place, column in enumerate(hover))
        fig.add_trace(
            go.Scatter(
                x=part[x].to_list(),
                y=part[y].to_list(),
                name=str(name),
                mode="markers",
                marker={"color": look.colour, "size": 6, "symbol": look.symbol, "opacity": 0.75},
                customdata=part.select(hover).rows() if hover else None,
                hovertemplate=f"{texts}%{{x:.4g}}, %{{y:.4g}}<extra>{name}</extra>",
                showlegend=by is not None,
            )
        )
    if diagonal and len(frame):
        ends = [float(f(frame.select(x, y).to_numpy().ravel())) for f in (min, max)]
        fig.add_trace(
            go.Scatter(
                x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1}, hoverinfo="skip", showlegend=False
            )
        )
    fig.update_xaxes(title_text=x_title)
    fig.update_yaxes(title_text=y_title)
    return fig


def share_curves(frame: pl.DataFrame, value: str, by: str, x_title: str, n: int = 101) -> go.Figure:
    """What share of the rows lies at or below a value, a curve per value of `by`, through `n` evenly spaced quantiles.

    Raises FrameError for columns that are not there.
    """
    _need(frame, [value, by])
    fig = figure(height=360)
    shares = [place / (n - 1) for place in range(n)]
    for name, look in looks(ordered(frame[by])).items():
        values = frame.filter(pl.col(by) == name)[value].drop_nulls()
        fig.add_trace(
            go.Scatter(
                x=[values.quantile(share, "linear") for share in shares],
                y=shares,
                name=f"{name} ({len(values):,})",
                mode="lines",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                hovertemplate=f"{name}<br>%{{y:.0%}} at or below %{{x:.4g}}<extra></extra>",
            )
        )
    fig.update_xaxes(title_text=x_title)
    fig.update_yaxes(title_text="share at or below", tickformat=".0%")
    return fig


def _bars(frame: pl.DataFrame, value: str, low: str, high: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": (frame[high] - frame[value]).fill_null(0).to_list(),
        "arrayminus": (frame[value] - frame[low]).fill_null(0).to_list(),
        "thickness": 1.5,
        "width": 3,
    }


def _need(frame: pl.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise FrameError(f"columns: expected some of {', '.join(frame.columns)}, got {', '.join(missing)}.")
