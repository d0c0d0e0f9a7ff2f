"""Figures of an evaluation under intervention: what a change costs each language, beside its matched controls."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import polars as pl

from workbench.plots.theme import DIVERGING, GREY, GRID, TEMPLATE, colour, figure, map_axes

CARRIED = {"ja": "carries Japanese", "en": "carries English", "none": "neither"}


def selectivity_forest(judged: pl.DataFrame, losses: pl.DataFrame, conditions: pl.DataFrame, unit: str) -> go.Figure:
    """Each target's selectivity with its 95% interval, above the grey points of its matched controls.

    judged, losses: from `stats.losses`; conditions: `condition`, `role` and `target`. Filled: it carries a language.
    """
    targets = judged["condition"].to_list()
    fig = figure(height=150 + 46 * len(targets))
    points = _controls(losses, conditions).filter(pl.col("target").is_in(targets))
    fig.add_trace(
        go.Scatter(
            x=points["selectivity"], y=points["target"], mode="markers", name="matched controls",
            marker={"symbol": "line-ns-open", "size": 11, "color": GREY, "line": {"width": 1.2, "color": GREY}},
            customdata=points.select("experts", "loss_ja", "loss_en").rows(),
            hovertemplate="control of %{y}<br>experts %{customdata[0]}<br>JA - EN %{x:+.3f}"
            "<br>loss JA %{customdata[1]:+.3f}, EN %{customdata[2]:+.3f}<extra></extra>",
        )
    )  # fmt: skip
    for verdict, name in CARRIED.items():
        part = judged.filter(pl.col("carries") == verdict)
        if not part.is_empty():
            fig.add_trace(_targets(part, verdict, name))
    fig.add_vline(x=0, line={"color": GREY, "width": 1})
    fig.update_xaxes(title_text=f"selectivity: loss in Japanese - loss in English ({unit})")
    fig.update_yaxes(categoryorder="array", categoryarray=targets[::-1], range=[-0.7, len(targets) - 0.3])
    return fig


def _targets(part: pl.DataFrame, verdict: str, name: str) -> go.Scatter:
    shade = colour(verdict)
    return go.Scatter(
        x=part["selectivity"], y=part["condition"], mode="markers", name=name,
        error_x={
            "type": "data", "symmetric": False, "thickness": 1.8, "width": 4,
            "array": (part["selectivity_high"] - part["selectivity"]).to_list(),
            "arrayminus": (part["selectivity"] - part["selectivity_low"]).to_list(),
        },
        marker={
            "size": 11, "color": shade, "line": {"color": shade, "width": 1.8},
            "symbol": "diamond-open" if verdict == "none" else "diamond",
        },
        customdata=part.select("selectivity_low", "selectivity_high", "p_controls", "p_holm", "p_items").rows(),
        hovertemplate="%{y}<br>JA - EN %{x:+.3f} [%{customdata[0]:+.3f}, %{customdata[1]:+.3f}]<br>"
        "p against controls %{customdata[2]:.3f} (Holm %{customdata[3]:.3f}), over items %{customdata[4]:.4f}"
        "<extra></extra>",
    )  # fmt: skip


def loss_scatter(losses: pl.DataFrame, conditions: pl.DataFrame, unit: str) -> go.Figure:
    """Loss in Japanese over loss in English: targets with 95% intervals, controls in grey, equal loss as a line."""
    fig = figure(height=460)
    points = _controls(losses, conditions)
    fig.add_trace(
        go.Scatter(
            x=points["loss_en"], y=points["loss_ja"], mode="markers", name="matched controls",
            marker={"symbol": "circle-open", "size": 7, "color": GREY}, text=points["target"],
            customdata=points["experts"],
            hovertemplate="control of %{text}<br>experts %{customdata}<br>EN %{x:+.3f}, JA %{y:+.3f}<extra></extra>",
        )
    )  # fmt: skip
    shown = losses.join(conditions.filter(pl.col("role") == "target"), on="condition", maintain_order="left")
    for place, row in enumerate(shown.iter_rows(named=True)):
        fig.add_trace(_loss_point(row, ("#d55e00", "#2b86c5", "#009e73", "#c65b9b", "#b8860b", "#9a7bc8")[place % 6]))
    ends = _span([*points["loss_en"], *points["loss_ja"], *shown["loss_en"], *shown["loss_ja"]])
    line = {"color": GRID, "dash": "dash"}
    fig.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal loss", hoverinfo="skip"))
    fig.update_xaxes(title_text=f"loss in English ({unit})")
    fig.update_yaxes(title_text=f"loss in Japanese ({unit})")
    return fig


def _loss_point(row: dict[str, object], shade: str) -> go.Scatter:
    values = {name: value if isinstance(value, float) else np.nan for name, value in row.items() if "loss_" in name}
    bars = {
        axis: {
            "type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
            "array": [values[f"loss_{lang}_high"] - values[f"loss_{lang}"]],
            "arrayminus": [values[f"loss_{lang}"] - values[f"loss_{lang}_low"]],
        }
        for axis, lang in (("x", "en"), ("y", "ja"))
    }  # fmt: skip
    return go.Scatter(
        x=[values["loss_en"]], y=[values["loss_ja"]], error_x=bars["x"], error_y=bars["y"], mode="markers",
        name=str(row["condition"]), marker={"symbol": "diamond", "size": 11, "color": shade},
        hovertemplate=f"{row['condition']}<br>EN %{{x:+.3f}}, JA %{{y:+.3f}}<extra></extra>",
    )  # fmt: skip


def scan_map(scan: pl.DataFrame, unit: str) -> go.Figure:
    """Selectivity of every expert taken out alone, layers down and experts across; orange costs Japanese more.

    scan: columns layer, expert, selectivity, its interval, loss_ja and loss_en. A dot marks intervals without zero,
    one by one, that is without any correction for how many experts were tried.
    """
    layers = scan["layer"].unique().sort().to_list()
    n_experts = int(scan["expert"].max()) + 1  # type: ignore[arg-type]
    place = {layer: row for row, layer in enumerate(layers)}
    names = ("selectivity", "selectivity_low", "selectivity_high", "loss_ja", "loss_en")
    values = np.full((len(names), len(layers), n_experts), np.nan)
    for row in scan.iter_rows(named=True):
        found = [np.nan if row[name] is None else row[name] for name in names]
        values[:, place[row["layer"]], row["expert"]] = found
    limit = float(np.nanmax(np.abs(values[0]))) if np.isfinite(values[0]).any() else 1.0
    fig = go.Figure(layout={"template": TEMPLATE, "height": 150 + max(26 * len(layers), 120)})
    fig.add_trace(
        go.Heatmap(
            z=values[0], y=layers, customdata=np.moveaxis(values[1:], 0, -1), zmin=-limit, zmax=limit,
            colorscale=DIVERGING, colorbar={"title": {"text": f"JA - EN ({unit})", "side": "right"}, "thickness": 12},
            hovertemplate="layer %{y}, expert %{x}<br>JA - EN %{z:+.3f} [%{customdata[0]:+.3f}, %{customdata[1]:+.3f}]"
            "<br>loss JA %{customdata[2]:+.3f}, EN %{customdata[3]:+.3f}<extra></extra>",
        )
    )  # fmt: skip
    rows, columns = np.nonzero((values[1] > 0) | (values[2] < 0))
    marker = {"size": 4, "color": "#ffffff", "line": {"color": "#22262c", "width": 1}}
    fig.add_trace(go.Scatter(x=columns, y=np.array(layers)[rows], mode="markers", marker=marker, hoverinfo="skip",
                             showlegend=False))  # fmt: skip
    fig.update_xaxes(title_text="expert", showgrid=False, zeroline=False)
    fig.update_yaxes(title_text="layer", showgrid=False, zeroline=False)
    return map_axes(fig)


def family_bars(by_family: pl.DataFrame, unit: str) -> go.Figure:
    """What each target costs in every family of tasks, Japanese beside English.

    by_family: columns condition, family, lang and loss (means over items).
    """
    fig = figure(height=380)
    for lang in ("ja", "en"):
        part = by_family.filter(pl.col("lang") == lang)
        fig.add_trace(
            go.Bar(
                x=[part["condition"].to_list(), part["family"].to_list()], y=part["loss"], marker_color=colour(lang),
                name={"ja": "Japanese", "en": "English"}[lang],
                hovertemplate="%{x}<br>loss %{y:+.3f}<extra></extra>",
            )
        )  # fmt: skip
    fig.update_layout(barmode="group")
    fig.update_yaxes(title_text=f"loss ({unit})")
    return fig


def _controls(losses: pl.DataFrame, conditions: pl.DataFrame) -> pl.DataFrame:
    chosen = conditions.filter(pl.col("role") == "control").select("condition", "target", "experts")
    return losses.join(chosen, on="condition", maintain_order="left")


def _span(values: list[float | None]) -> list[float]:
    known = [value for value in values if value is not None] or [0.0]
    return [min(known), max(known)]
