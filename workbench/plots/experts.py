"""Figures about experts: what removal does, how routing splits into factors, a timeline, two checkpoints."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from workbench.plots.distributions import interval_band, layer_curves
from workbench.plots.theme import GREY, colour, figure, layer_step, looks, ordered

FACTORS = {
    "token_id": ("token identity", "#2b86c5"),
    "lang": ("language, beyond the token", "#d55e00"),
    "segment": ("channel, beyond those", "#009e73"),
    "topic": ("topic, beyond those", "#c65b9b"),
    "residual": ("unexplained: context and noise", "#b4b9c0"),
}


def audit_points(audit: pl.DataFrame) -> go.Figure:
    """Each audited expert beside its controls: KL of the edit (filled) and the mean and largest control (open, line).

    `audit` comes from `experiments.audit.audit_experts`. Filled diamond: p <= 0.05, judged one
    by one; filled circle: not. The corrected p is in the hover.
    """
    places = audit.select("layer", "expert", "kind").rows()
    labels = [f"layer {layer} · expert {expert} · {kind}" for layer, expert, kind in places]
    fig = figure(height=140 + 26 * len(audit))
    fig.add_trace(
        go.Scatter(
            x=audit["control_kl"], y=labels, mode="markers", name="matched controls: mean, line to the largest",
            marker={"symbol": "circle-open", "size": 9, "color": GREY},
            error_x={
                "type": "data", "symmetric": False, "array": (audit["control_kl_max"] - audit["control_kl"]).to_list(),
                "arrayminus": [0.0] * len(audit), "color": GREY, "thickness": 1.5, "width": 3,
            },
        )
    )  # fmt: skip
    fig.add_trace(
        go.Scatter(
            x=audit["kl"], y=labels, mode="markers", name="the expert (diamond: p <= 0.05, one by one)",
            marker={
                "symbol": ["diamond" if p is not None and p <= 0.05 else "circle" for p in audit["p_kl"]],
                "size": 10, "color": colour("en"),
            },
            error_x={
                "type": "data", "symmetric": False, "array": (audit["kl_high"] - audit["kl"]).to_list(),
                "arrayminus": (audit["kl"] - audit["kl_low"]).to_list(), "thickness": 1.5, "width": 3,
            },
            customdata=audit.select("p_kl", "p_kl_adjusted", "selectivity", "p_selective").rows(),
            hovertemplate="%{y}<br>KL %{x:.4f} nats, p %{customdata[0]:.3f}, adjusted %{customdata[1]:.3f}<br>"
            "selectivity %{customdata[2]:+.2f}, p %{customdata[3]:.3f}<extra></extra>",
        )
    )  # fmt: skip
    fig.update_xaxes(title_text="KL of next-token distributions (nats per content token)", rangemode="tozero")
    fig.update_yaxes(categoryorder="array", categoryarray=labels[::-1])
    return fig


def factor_bars(bits: pl.DataFrame) -> go.Figure:
    """Bits of expert choice per layer, stacked by factor. `bits` comes from `stats.information.decompose_routing`."""
    fig = figure(height=380)
    for factor, (name, shade) in FACTORS.items():
        part = bits.filter(pl.col("factor") == factor).sort("layer")
        if len(part):
            value = "excess" if factor != "residual" else "bits"
            fig.add_trace(
                go.Bar(
                    x=part["layer"], y=part[value], name=name, marker={"color": shade},
                    hovertemplate=f"{name}<br>layer %{{x}}: %{{y:.3f}} bits<extra></extra>",
                )
            )  # fmt: skip
    fig.update_layout(barmode="stack", bargap=0.3)
    fig.update_xaxes(title_text="layer", dtick=1)
    fig.update_yaxes(title_text="bits per slot")
    return fig


AXES = {
    "lang": "language",
    "topic": "topic",
    "token_class": "kind of token",
    "segment": "part of the conversation",
    "effort": "effort",
    "phase": "read or written",
    "position_bin": "position",
}


def preference_bars(preferences: pl.DataFrame) -> go.Figure:
    """How many experts of a layer prefer some value of an axis: bars per layer, one colour per axis.

    preferences: rows of `stats.specialisation.specialisation` that count, with a column `axis`; an expert counts once.
    """
    counts = preferences.group_by("axis", "layer").agg(n=pl.col("expert").n_unique()).sort("layer")
    fig = figure(height=360)
    axes = [axis for axis in AXES if axis in set(counts["axis"])]
    for axis, look in looks(axes).items():
        part = counts.filter(pl.col("axis") == axis)
        fig.add_trace(
            go.Bar(
                x=part["layer"], y=part["n"], name=AXES[axis],
                marker={"color": look.colour, "pattern": {"shape": PATTERNS[axes.index(axis) % len(PATTERNS)]}},
                hovertemplate=f"{AXES[axis]}<br>layer %{{x}}: %{{y}} experts<extra></extra>",
            )
        )  # fmt: skip
    fig.update_layout(barmode="group", bargap=0.25)
    fig.update_xaxes(title_text="layer", dtick=layer_step(counts["layer"].n_unique()))
    fig.update_yaxes(title_text="experts")
    return fig


PATTERNS = ("", "/", "x", ".", "-", "+", "|")  # colours alone do not tell seven things apart


NULLS = {
    "word_overlap": "neighbours whose two words also meet elsewhere",
    "word_null": "the same two words, of different texts",
    "load_null": "by load alone",
}


def persistence_curves(persistence: pl.DataFrame) -> go.Figure:
    """Experts that neighbouring tokens share, beside what the two words and what load alone would give.

    `persistence` comes from `stats.dynamics.persistence`.
    """
    parts = [("overlap", "low", "high", "neighbours")]
    parts += [(name, name, name, text) for name, text in NULLS.items()]
    frames = [
        persistence.select("layer", mean=value, low=low, high=high, what=pl.lit(text))
        for value, low, high, text in parts
    ]
    return layer_curves(pl.concat(frames), "what", "share of experts in common")


def overlap_curves(overlap: pl.DataFrame, n: int) -> go.Figure:
    """Jaccard index of the n most used experts of two languages, within one, and by chance. `stats.top_overlap`."""
    part = overlap.filter(pl.col("n") == n)
    names = {"between": "between languages", "within": "within a language", "chance": "by chance"}
    frames = [part.select("layer", mean=value, what=pl.lit(name)) for value, name in names.items()]
    fig = layer_curves(pl.concat(frames), "what", f"overlap of the {n} most used (Jaccard)")
    fig.update_yaxes(range=[0, 1.02])
    return fig


def timeline_curves(timeline: pl.DataFrame, y_title: str) -> go.Figure:
    """A value along each channel, from its beginning to its end, one curve per channel, mean over layers.

    `timeline` comes from `stats.events.timeline`. With one layer, or values that are means over layers, the band is its
    interval; intervals of several layers cannot be averaged and are not drawn.
    """
    means = timeline.group_by("segment", "bin").agg(pl.col("mean").mean(), pl.col("n_groups").min()).sort("bin")
    fig = figure(height=340)
    n_bins = int(means["bin"].max() or 0) + 1  # type: ignore[arg-type]
    for segment in ordered(means["segment"]):
        part = means.filter(pl.col("segment") == segment)
        if timeline["layer"].n_unique() == 1:
            band = (
                timeline.filter(pl.col("segment") == segment).sort("bin").with_columns(x=(pl.col("bin") + 0.5) / n_bins)
            )
            fig.add_trace(interval_band(band, "low", "high", colour(segment), x="x"))
        fig.add_trace(
            go.Scatter(
                x=[(place + 0.5) / n_bins for place in part["bin"]], y=part["mean"], name=segment, mode="lines+markers",
                line={"color": colour(segment), "width": 2, "dash": "solid" if segment == "analysis" else "dot"},
                customdata=part["n_groups"].to_list(),
                hovertemplate=f"{segment}<br>%{{y:.3f}} at %{{x:.0%}}, %{{customdata}} groups<extra></extra>",
            )
        )  # fmt: skip
    fig.update_xaxes(title_text="place within the message", tickformat=".0%", range=[0, 1])
    fig.update_yaxes(title_text=y_title)
    return fig


def drift_curves(drift: pl.DataFrame) -> go.Figure:
    """Share of experts that two checkpoints choose alike per layer, beside the null. From `drift.routing_drift`."""
    chance = pl.col("null")
    both = pl.concat(
        [
            drift.select("layer", mean="overlap", low="low", high="high", what=pl.lit("chosen alike")),
            drift.select("layer", mean=chance, low=chance, high=chance, what=pl.lit("by chance, with these loads")),
        ]
    )
    fig = layer_curves(both, "what", "share of experts in common")
    fig.update_yaxes(range=[0, 1.02])
    return fig
