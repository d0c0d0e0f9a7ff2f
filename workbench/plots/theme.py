"""One look for every figure: transparent, readable on light and dark pages, safe for colour-blind readers.

Colours are Okabe and Ito's (2008), a little lighter where the original is too dark for a dark page, each with a
contrast of at least 3 on either. Not every pair stays apart without red or green, so lines also differ in dash and
points in symbol.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from workbench.axes import EFFORTS, LANGUAGES, SEGMENTS

FONT_STACK = "'Noto Sans', 'Noto Sans CJK JP', 'Noto Sans JP', 'Hiragino Sans', 'Yu Gothic', Meiryo, sans-serif"
GREY = "#83888f"  # text: 3.6:1 on white and 4.6:1 on the dark page
GRID = "rgba(131, 136, 143, 0.25)"

COLOURS = {
    "ja": "#d55e00",
    "en": "#2b86c5",
    "mixed": "#9a7bc8",
    "user": "#83888f",
    "analysis": "#009e73",
    "commentary": "#b8860b",
    "final": "#c65b9b",
    "tool": "#9a7bc8",
    "plain": "#83888f",
    "low": "#5896d0",
    "medium": "#2b86c5",
    "high": "#2a66ab",
}
# For series without a colour of their own, plotly express included.
SERIES = ("#2b86c5", "#d55e00", "#009e73", "#c65b9b", "#b8860b", "#9a7bc8")
DASHES = {"ja": "solid", "en": "dot", "user": "dash", "analysis": "solid", "final": "dot", "plain": "solid"}
NAMES = {"ja": "Japanese", "en": "English", "mixed": "mixed"}

# Below the reference is blue, above it orange, the reference itself fades into the page, light or dark.
DIVERGING = (
    (0.0, "#0b5fa5"),
    (0.25, "#5aa2d6"),
    (0.5, "rgba(131, 136, 143, 0.10)"),
    (0.75, "#ec9a4b"),
    (1.0, "#c04a00"),
)

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT_STACK, "size": 13, "color": GREY},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": SERIES,
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#22262c", "font": {"color": "#f4f5f7", "family": FONT_STACK}, "bordercolor": GREY},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "xaxis": {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True},
        "yaxis": {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True},
    }
)


def ordered(names: Iterable[Any]) -> list[Any]:
    """Each name once, in the order of every figure: ja en, then segments as in a conversation, then anything else."""
    ranks = {name: rank for rank, name in enumerate((*LANGUAGES, "mixed", *EFFORTS, *SEGMENTS))}
    return sorted(set(names), key=lambda name: (ranks.get(name or "", len(ranks)), name or ""))


def colour(name: str | None) -> str:
    """The colour of a language, channel or effort; grey for anything else."""
    return COLOURS.get(name or "", GREY)


class Look(NamedTuple):
    """How a series is told from the others: by colour, dash and symbol at once."""

    colour: str
    dash: str
    symbol: str


_DASHES = ("solid", "dot", "dash", "dashdot")
_SYMBOLS = ("circle", "diamond", "square", "x", "triangle-up", "cross")


def looks(names: Sequence[Any]) -> dict[Any, Look]:
    """A look for each name: languages, channels and efforts have their own colour, others take turns."""
    taken = {COLOURS[name] for name in names if name in COLOURS}
    others = cycle(shade for shade in SERIES if shade not in taken)
    return {
        name: Look(
            COLOURS[name] if name in COLOURS else next(others),
            DASHES.get(name, _DASHES[place % len(_DASHES)]),
            _SYMBOLS[place % len(_SYMBOLS)],
        )
        for place, name in enumerate(names)
    }


def faded(hex_colour: str, opacity: float) -> str:
    """`#rrggbb` as an rgba() colour, for bands."""
    red, green, blue = (int(hex_colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def figure(height: int = 380) -> go.Figure:
    """An empty figure in the theme, as wide as its place."""
    return go.Figure(layout={"template": TEMPLATE, "height": height, "autosize": True})


def map_axes(fig: go.Figure) -> go.Figure:
    """The axes of every layer x expert map: layer 0 on top, cells to the edge, all layers named where they are few."""
    maps = [trace for trace in fig.data if trace.type == "heatmap"]
    layers = [layer for trace in maps for layer in trace.y]
    n_experts = max(np.shape(trace.z)[1] for trace in maps)
    fig.update_yaxes(
        autorange=None, range=[max(layers) + 0.5, min(layers) - 0.5], tick0=0, dtick=layer_step(len(set(layers)))
    )
    fig.update_xaxes(range=[-0.5, n_experts - 0.5], tick0=0, dtick=max(1, 2 ** (n_experts.bit_length() - 4)))
    gap = 1 if n_experts <= 64 else 0
    return fig.update_traces(selector={"type": "heatmap"}, xgap=gap, ygap=gap)


def layer_step(n_layers: int) -> int:
    """Every layer is named up to 16 of them, beyond that every fourth."""
    return 1 if n_layers <= 16 else 4
