"""Figures from hand-made frames: what they draw is what the frame says."""

from __future__ import annotations

import json

import numpy as np
import plotly.express as px
import plotly.graph_objects as go
import polars as pl
import pytest

from workbench.plots.distributions import contrast_forest, divergence_curves, layer_curves, length_bars
from workbench.plots.heatmaps import contrast_map, load_map
from workbench.plots.theme import COLOURS, GREY, SERIES, TEMPLATE, colour, faded, ordered

LAYERS, EXPERTS = 3, 4


def load_frame() -> pl.DataFrame:
    rows = [
        {"lang": lang, "layer": layer, "expert": expert, "slots": expert, "load": expert / 6,
         "log2_ratio": None if expert == 0 else float(np.log2(expert / 6 * EXPERTS))}
        for lang in ("en", "ja") for layer in range(LAYERS) for expert in range(EXPERTS)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def contrast_frame() -> pl.DataFrame:
    rd = np.linspace(-0.3, 0.25, LAYERS * EXPERTS)
    return pl.DataFrame(
        {
            "layer": np.repeat(np.arange(LAYERS), EXPERTS),
            "expert": np.tile(np.arange(EXPERTS), LAYERS),
            "f_ja": 0.4 + rd / 2,
            "f_en": 0.4 - rd / 2,
            "risk_difference": rd,
            "low": rd - 0.05,
            "high": rd + 0.05,
            "p_adjusted": np.where(np.abs(rd) > 0.2, 0.001, 0.5),
        }
    )


def divergence_frame() -> pl.DataFrame:
    columns = {"layer": [0, 1, 2]}
    for place, name in enumerate(("between", "floor", "excess")):
        for offset, suffix in ((0.0, ""), (-0.01, "_low"), (0.01, "_high")):
            columns[f"{name}{suffix}"] = [0.1 * place + 0.02 * layer + offset for layer in range(3)]
    return pl.DataFrame(columns)


def test_load_map_has_a_panel_per_language_japanese_first() -> None:
    fig = load_map(load_frame(), "lang")
    assert [note.text for note in fig.layout.annotations] == ["Japanese", "English"]
    assert len(fig.data) == 2
    z = np.array(fig.data[0].z)
    assert z.shape == (LAYERS, EXPERTS)
    assert z[0, 3] == pytest.approx(1.0)  # half of all slots where a quarter is uniform
    assert z[0, 0] == -3.0  # never used: bottom of the scale
    assert fig.layout.coloraxis.cmin == -fig.layout.coloraxis.cmax
    assert fig.layout.yaxis.range == (LAYERS - 0.5, -0.5)  # layer 0 on top
    assert fig.layout.yaxis.dtick == 1  # few layers: all are named


def test_at_the_size_of_the_large_model_every_panel_has_the_whole_width() -> None:
    layers, experts = 32, 128
    load = load_frame().head(1).drop("layer", "expert")
    cells = pl.DataFrame(
        {"layer": np.repeat(np.arange(layers), experts), "expert": np.tile(np.arange(experts), layers)}
    )
    load = pl.concat([cells.join(load.with_columns(lang=pl.lit(lang)), how="cross") for lang in ("ja", "en")])
    fig = load_map(load, "lang")
    assert {panel.xaxis for panel in fig.data} == {"x", "x2"}
    assert fig.layout.xaxis2.domain == fig.layout.xaxis.domain  # one above the other
    assert fig.layout.yaxis2.domain[1] < fig.layout.yaxis.domain[0]
    assert fig.layout.xaxis.range == (-0.5, 127.5)
    assert fig.layout.yaxis.dtick == 4
    assert fig.data[0].xgap == 0
    assert (fig.layout.yaxis.domain[1] - fig.layout.yaxis.domain[0]) * fig.layout.height / layers > 10  # pixels a layer


def test_map_axes_end_at_the_cells_also_where_dots_are_drawn_over_them() -> None:
    fig = contrast_map(contrast_frame())
    assert fig.layout.xaxis.range == (-0.5, EXPERTS - 0.5)
    assert fig.layout.yaxis.range == (LAYERS - 0.5, -0.5)


def test_hover_tells_the_tokens_of_an_expert_literally() -> None:
    frame = load_frame().with_columns(tokens=pl.lit("<b>東京</b>\n"))
    panel = load_map(frame, "lang").data[0]
    assert panel.text[1][2] == "&lt;b&gt;東京&lt;/b&gt;↵"
    assert panel.hovertemplate.endswith("<br>%{text}<extra></extra>")
    assert load_map(load_frame(), "lang").data[0].text is None


def test_contrast_map_marks_what_is_significant() -> None:
    fig = contrast_map(contrast_frame().sample(fraction=1, shuffle=True, seed=0))  # row order does not matter
    heat, dots = fig.data
    assert np.array(heat.z)[0, 0] == pytest.approx(-0.3)
    marked = set(zip(dots.y, dots.x, strict=True))
    assert marked == {(0, 0), (0, 1), (2, 3)}


def test_forest_shows_the_largest_first_with_intervals() -> None:
    fig = contrast_forest(contrast_frame(), n_experts=4)
    labels = fig.layout.yaxis.categoryarray
    assert labels[-1] == "layer 0 · expert 0"
    japanese, english = fig.data
    assert all(x > 0 for x in japanese.x)
    assert all(x < 0 for x in english.x)
    assert english.error_x.array[0] == pytest.approx(0.05)
    assert set(english.marker.symbol) == {"circle"}
    assert japanese.name == "more in Japanese"


def test_divergence_has_three_curves_each_with_a_band() -> None:
    fig = divergence_curves(divergence_frame())
    curves = [trace for trace in fig.data if trace.fill != "toself"]
    assert [curve.name for curve in curves] == [
        "between languages",
        "within a language (floor)",
        "excess over the floor",
    ]
    assert [len({trace.line.dash for trace in curves})] == [3]  # told apart without colour
    band = fig.data[0]
    assert list(band.x) == [0, 1, 2, 2, 1, 0]
    assert band.y[0] == pytest.approx(-0.01)
    assert band.y[-1] == pytest.approx(0.01)


def test_layer_curves_keep_a_fixed_order_and_need_no_interval() -> None:
    frame = pl.DataFrame({"segment": ["final", "user", "analysis"], "layer": [0, 0, 0], "mean": [1.0, 2.0, 3.0]})
    fig = layer_curves(frame, "segment", "nats")
    assert [trace.name for trace in fig.data] == ["user", "analysis", "final"]
    assert fig.layout.yaxis.title.text == "nats"


def test_length_bars_go_from_low_to_high() -> None:
    rows = [
        {"lang": lang, "effort": effort, "segment": "analysis", "mean": mean, "low": mean - 1, "high": mean + 2,
         "n_groups": 9}
        for lang in ("en", "ja") for effort, mean in (("high", 30.0), ("low", 5.0), ("medium", 12.0))
    ]  # fmt: skip
    fig = length_bars(pl.DataFrame(rows))
    assert [trace.name for trace in fig.data] == ["Japanese", "English"]
    assert list(fig.data[0].x) == ["low", "medium", "high"]
    assert list(fig.data[0].y) == [5.0, 12.0, 30.0]
    assert list(fig.data[0].error_y.array) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "fig",
    [load_map(load_frame(), "lang"), contrast_map(contrast_frame()), contrast_forest(contrast_frame()),
     divergence_curves(divergence_frame())],
    ids=["load", "contrast_map", "forest", "divergence"],
)  # fmt: skip
def test_every_figure_is_transparent_and_in_the_fonts_that_have_japanese(fig: go.Figure) -> None:
    layout = json.loads(fig.to_json())["layout"]["template"]["layout"]
    assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert "Noto Sans CJK JP" in layout["font"]["family"]
    assert fig.layout.height >= 150


def luminance(hex_colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    channels = [int(hex_colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("name", sorted(COLOURS))
def test_line_colours_stand_out_on_a_white_and_on_a_dark_page(name: str) -> None:
    line = luminance(COLOURS[name])
    assert (1.05) / (line + 0.05) >= 3  # WCAG 1.4.11: graphics need 3:1
    assert (line + 0.05) / (luminance("#14171b") + 0.05) >= 3


@pytest.mark.parametrize("shade", SERIES)
def test_colours_of_any_series_stand_out_and_reach_plotly_express(shade: str) -> None:
    assert 3 <= 1.05 / (luminance(shade) + 0.05) <= 1.05 / (luminance("#14171b") + 0.05) / 3
    rows = {"x": [0] * len(SERIES), "y": [0] * len(SERIES), "name": list(SERIES)}
    drawn = px.line(pl.DataFrame(rows), x="x", y="y", color="name", template=TEMPLATE)
    assert drawn.data[SERIES.index(shade)].line.color == shade


def test_colours_and_order_of_unknown_names() -> None:
    assert colour("no such thing") == colour(None) == GREY
    assert faded("#ff8000", 0.5) == "rgba(255, 128, 0, 0.5)"
    assert ordered(["zz", None, "final", "en", "user", "ja", "ja"]) == ["ja", "en", "user", "final", None, "zz"]
