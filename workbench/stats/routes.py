"""Is the router's choice a good one? Its route against others that it found plausible (`experiments.routes`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.errors import FrameError
from workbench.stats.index import Frame
from workbench.stats.resampling import sign_flip_max_t, t_interval

MEASURES = ("gain", "regret", "regret_null", "excess_regret", "rank")


def route_regret(
    routes: pl.DataFrame,
    tokens: Frame,
    by: Sequence[str] = ("layer",),
    n_resamples: int = 2000,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """How much a better route would have helped, and how much of that is luck: one row per value of `by`.

    routes: doc_id, pos, layer, route (0: the router's own), nll, as `experiments.routes` gives them; by: columns of
    routes or tokens, say ("layer", "lang"). Per token, in nats: gain = mean nll of the other routes - the router's;
    regret = the router's nll - the least of all (arXiv 2605.07260), which is never negative and grows with the number
    of routes tried; regret_null = the same with any of the routes in the router's place, mean nll - least;
    excess_regret = regret - regret_null; rank = share of the other routes that are better, ties as half. Means over the
    tokens of a unit, then over units, each with _low, _high: 95%, Student's t over units.

    Null: the router's route is exchangeable with the others it might have taken: gain 0, excess_regret 0, rank 0.5. t,
    p_adjusted: of gain, sign flips over units, max-T over all rows that all units have. Tokens without another route
    are left out. Other columns: n_units, n_tokens, n_routes (mean per token), n_tests. Raises FrameError when a token
    lacks the router's route.
    """
    per_token = _per_token(routes)
    keys, extra = list(by), [name for name in by if name not in per_token.columns]
    labels = tokens.lazy().select("doc_id", "pos", unit, *extra).collect()
    joined = per_token.join(labels.with_columns(pl.col("pos").cast(per_token.schema["pos"])), on=["doc_id", "pos"])
    means = {name: pl.col(name).mean() for name in (*MEASURES, "n_routes")}
    cells = joined.group_by(*keys, unit).agg(**means, n_tokens=pl.len()).sort(*keys, unit)
    rows = []
    for key, part in cells.group_by(keys, maintain_order=True):
        row = dict(zip(keys, key, strict=True))
        for name in MEASURES:
            low, high = t_interval(part[name].to_numpy())
            row |= {name: part[name].mean(), f"{name}_low": float(low), f"{name}_high": float(high)}
        sizes = {"n_units": len(part), "n_tokens": part["n_tokens"].sum(), "n_routes": part["n_routes"].mean()}
        rows.append(row | sizes)
    if not rows:
        return pl.DataFrame(schema=dict.fromkeys(keys, pl.String))
    values = cells.pivot(unit, index=keys, values="gain").drop(keys).to_numpy().astype(np.float64).T  # [unit row]
    whole = np.isfinite(values).all(0)
    t, p_adjusted = np.full((2, values.shape[1]), np.nan)
    if whole.any():
        t[whole], p_adjusted[whole] = sign_flip_max_t(values[:, whole], n_resamples, seed)
    return pl.DataFrame(rows, infer_schema_length=None).with_columns(
        t=pl.Series(t), p_adjusted=pl.Series(p_adjusted), n_tests=pl.lit(int(whole.sum()))
    )


def _per_token(routes: pl.DataFrame) -> pl.DataFrame:
    """One row per token and layer with the measures; tokens that have another route alone."""
    own, other = pl.col("nll").filter(pl.col("route") == 0), pl.col("nll").filter(pl.col("route") > 0)
    mine = own.first()
    table = routes.group_by("doc_id", "pos", "layer", maintain_order=True).agg(
        n_own=own.len(),
        n_routes=pl.len(),
        gain=other.mean() - mine,
        regret=mine - pl.col("nll").min(),
        regret_null=pl.col("nll").mean() - pl.col("nll").min(),
        rank=((other < mine).cast(pl.Float64) + 0.5 * (other == mine).cast(pl.Float64)).mean(),
    )
    if (table["n_own"] != 1).any():
        raise FrameError("routes: expected one route 0, the router's, per token and layer, got none or several.")
    return table.filter(pl.col("n_routes") > 1).with_columns(excess_regret=pl.col("regret") - pl.col("regret_null"))
