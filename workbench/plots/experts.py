"""Figures about experts: what removal does, how routing splits into factors, a timeline, two checkpoints."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from workbench.plots.distributions import layer_curves
from workbench.plots.theme import GREY, colour, figure, ordered

FACTORS = {
    "token_id": ("token identity", "#2b86c5"),
    "lang": ("language, beyond the token", "#d55e00"),
    "segment": ("channel, beyond those", "#009e73"),
    "topic": ("topic, beyond those", "#c65b9b"),
    "residual": ("unexplained: context and noise", "#b4b9c0"),
}


def audit_points(audit: pl.DataFrame) -> go.Figure:
    """Each audited expert beside its controls: KL of the edit (filled) and the mean and largest control (open, line).

    `audit` comes from `experiments.audit.audit_experts`. Filled diamond: p <= 0.05; filled circle: not.
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
            x=audit["kl"], y=labels, mode="markers", name="the expert (diamond: p <= 0.05)",
            marker={
                "symbol": ["diamond" if p <= 0.05 else "circle" for p in audit["p_kl"]],
                "size": 10, "color": colour("en"),
            },
            error_x={
                "type": "data", "symmetric": False, "array": (audit["kl_high"] - audit["kl"]).to_list(),
                "arrayminus": (audit["kl"] - audit["kl_low"]).to_list(), "thickness": 1.5, "width": 3,
            },
            customdata=audit.select("p_kl", "selectivity", "p_selective").rows(),
            hovertemplate="%{y}<br>KL %{x:.4f} nats, p %{customdata[0]:.3f}<br>"
            "selectivity %{customdata[1]:+.2f}, p %{customdata[2]:.3f}<extra></extra>",
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


def timeline_curves(timeline: pl.DataFrame, y_title: str) -> go.Figure:
    """A value along each channel, from its beginning to its end, one curve per channel, mean over layers.

    `timeline` comes from `stats.events.timeline`.
    """
    means = timeline.group_by("segment", "bin").agg(pl.col("mean").mean(), pl.col("n_groups").min()).sort("bin")
    fig = figure(height=340)
    n_bins = int(means["bin"].max() or 0) + 1  # type: ignore[arg-type]
    for segment in ordered(means["segment"]):
        part = means.filter(pl.col("segment") == segment)
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
