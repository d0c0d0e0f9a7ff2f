"""Curves over layers, intervals, and lengths."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import polars as pl

from workbench.axes import EFFORTS
from workbench.plots.theme import GREY, GRID, NAMES, colour, faded, figure, layer_step, looks, ordered


def layer_curves(means: pl.DataFrame, by: str, y_title: str, value: str = "mean") -> go.Figure:
    """One curve over layers per value of the column `by`, with its interval as a band where low and high exist."""
    fig = figure()
    for name, look in looks(ordered(means[by])).items():
        part = means.filter(pl.col(by) == name).sort("layer")
        if {"low", "high"} <= set(part.columns):
            fig.add_trace(interval_band(part, "low", "high", look.colour))
        fig.add_trace(_curve(part, value, NAMES.get(name, str(name)), look.colour, look.dash))
    return _layer_axes(fig, y_title)


def divergence_curves(divergence: pl.DataFrame) -> go.Figure:
    """JA/EN divergence per layer in bits, the within-language floor, and their difference, with 95% bands.

    `divergence` comes from `stats.divergence.language_divergence`.
    """
    looks = {
        "between": ("between languages", colour("ja"), "solid"),
        "floor": ("within a language (floor)", GREY, "dash"),
        "excess": ("excess over the floor", colour("en"), "dot"),
    }
    fig = figure()
    for name, (label, line_colour, dash) in looks.items():
        fig.add_trace(interval_band(divergence, f"{name}_low", f"{name}_high", line_colour))
        fig.add_trace(_curve(divergence, name, label, line_colour, dash))
    return _layer_axes(fig, "Jensen-Shannon divergence (bits)")


def contrast_forest(contrasts: pl.DataFrame, n_experts: int = 24) -> go.Figure:
    """The experts whose use differs most between languages: risk difference with its 95% interval, largest on top.

    `contrasts` comes from `stats.contrasts.language_contrasts`. Filled: adjusted p < 0.05; open: not.
    """
    top = contrasts.sort(pl.col("risk_difference").abs(), descending=True).head(n_experts).reverse()
    labels = [f"layer {layer} · expert {expert}" for layer, expert in top.select("layer", "expert").iter_rows()]
    sides = ["ja" if value > 0 else "en" for value in top["risk_difference"]]
    fig = figure(height=130 + 20 * len(top))
    for side in ("ja", "en"):
        here = [place for place, found in enumerate(sides) if found == side]
        fig.add_trace(_forest_points(top[here], [labels[place] for place in here], side))
    fig.add_vline(x=0, line={"color": GREY, "width": 1})
    fig.update_xaxes(title_text="JA - EN: mean difference in the share of tokens that use the expert")
    fig.update_yaxes(categoryorder="array", categoryarray=labels)
    return fig


def length_bars(lengths: pl.DataFrame, segment: str = "analysis") -> go.Figure:
    """Tokens written in one channel, per effort and language, with 95% intervals.

    `lengths` comes from `stats.summaries.segment_lengths`.
    """
    part = lengths.filter(pl.col("segment") == segment)
    fig = figure(height=340)
    for lang in ordered(part["lang"]):
        bars = part.filter(pl.col("lang") == lang)
        bars = bars.sort(pl.col("effort").replace_strict({name: rank for rank, name in enumerate(EFFORTS)}, default=-1))
        fig.add_trace(
            go.Bar(
                x=[effort or "none" for effort in bars["effort"]],
                y=bars["mean"],
                name=NAMES.get(lang, lang),
                marker_color=colour(lang),
                error_y={**_error_bars(bars, "mean"), "color": GREY},
                customdata=bars.select("low", "high", "n_groups").rows(),
                hovertemplate=f"{NAMES.get(lang, lang)}, effort %{{x}}<br>%{{y:.1f}} tokens "
                "[%{customdata[0]:.1f}, %{customdata[1]:.1f}]<br>%{customdata[2]} groups<extra></extra>",
            )
        )
    fig.update_layout(barmode="group", bargap=0.35)
    fig.update_xaxes(title_text="reasoning effort")
    fig.update_yaxes(title_text=f"{segment} tokens", rangemode="tozero")
    return fig


def _curve(frame: pl.DataFrame, value: str, name: str, line_colour: str, dash: str) -> go.Scatter:
    return go.Scatter(
        x=frame["layer"],
        y=frame[value],
        name=name,
        mode="lines+markers",
        line={"color": line_colour, "dash": dash, "width": 2},
        marker={"size": 6},
        hovertemplate=f"{name}<br>layer %{{x}}: %{{y:.4g}}<extra></extra>",
    )


def interval_band(frame: pl.DataFrame, low: str, high: str, line_colour: str, x: str = "layer") -> go.Scatter:
    """The area between two columns of a frame, over its column `x`, which must be in order."""
    return go.Scatter(
        x=[*frame[x], *frame[x].reverse()],
        y=[*frame[low], *frame[high].reverse()],
        fill="toself",
        fillcolor=faded(line_colour, 0.2),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def _layer_axes(fig: go.Figure, y_title: str) -> go.Figure:
    fig.update_xaxes(title_text="layer", tickformat="d", tick0=0, dtick=layer_step(_n_layers(fig)))
    fig.update_yaxes(title_text=y_title, zeroline=True, zerolinecolor=GRID)
    return fig


def _n_layers(fig: go.Figure) -> int:
    return max((max(trace.x, default=0) for trace in fig.data), default=0) + 1


def _forest_points(part: pl.DataFrame, labels: Sequence[str], side: str) -> go.Scatter:
    significant = [p < 0.05 for p in part["p_adjusted"]]
    return go.Scatter(
        x=part["risk_difference"],
        y=list(labels),
        mode="markers",
        name=f"more in {NAMES[side]}",
        error_x=_error_bars(part, "risk_difference"),
        marker={
            "color": colour(side),
            "size": 9,
            "line": {"color": colour(side), "width": 1.5},
            "symbol": ["circle" if found else "circle-open" for found in significant],
        },
        customdata=part.select("f_ja", "f_en", "low", "high", "p_adjusted").rows(),
        hovertemplate="%{y}<br>JA - EN %{x:+.3f} [%{customdata[2]:+.3f}, %{customdata[3]:+.3f}]<br>"
        "mean share of tokens: JA %{customdata[0]:.3f}, EN %{customdata[1]:.3f}<br>"
        "adjusted p %{customdata[4]:.4f}<extra></extra>",
    )


def _error_bars(frame: pl.DataFrame, value: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": (frame["high"] - frame[value]).to_list(),
        "arrayminus": (frame[value] - frame["low"]).to_list(),
        "thickness": 1.5,
        "width": 3,
    }
