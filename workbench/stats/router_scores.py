"""What sends tokens to experts: router scores by component, as `experiments.router_scores` takes them apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.stats.index import Frame
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, sign_flip_max_t, t_interval

MEASURES = ("score", "influence", "rank_change")


def router_score_summary(
    scores: pl.DataFrame,
    tokens: Frame,
    by: Sequence[str] = (),
    segments: Sequence[str] = CONTENT_SEGMENTS,
    n_resamples: int = 2000,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """How much of the push towards the chosen experts comes from where: one row per *by, layer and component.

    scores: doc_id, pos, layer, component, expert, score, influence, rank_change (`experiments.router_scores`); by:
    columns of scores or tokens, say ("expert",) or ("lang",). score, in logits: mean over the chosen experts and tokens
    of a unit, then over units; its sum over components is the mean centred logit of a chosen expert, and `share` is the
    part of it. influence, in squared logits, and rank_change, in ranks, likewise (Influence and AARV of openreview
    BqyPLOkxFY; there without intervals). _low, _high: 95%, Student's t over units.

    t, p_adjusted: of score; sign flips over units, max-T over all rows that all units have. Null: 0, a component that
    pushes chosen experts as much as others. A component can matter for the order among experts without a push: read
    rank_change, which has no null but 0 for a component that is constant. Other columns: n_units, n_tokens, n_tests.
    """
    keys = [*by, "layer", "component"]
    columns = [name for name in by if name not in scores.columns]
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).select("doc_id", "pos", unit, *columns).collect()
    joined = scores.join(kept.with_columns(pl.col("pos").cast(scores.schema["pos"])), on=["doc_id", "pos"])
    means = {name: pl.col(name).mean() for name in MEASURES}
    cells = joined.group_by(*keys, unit).agg(**means, n_tokens=pl.struct("doc_id", "pos").n_unique()).sort(*keys, unit)
    rows = []
    for key, part in cells.group_by(keys, maintain_order=True):
        row = dict(zip(keys, key, strict=True))
        for name in MEASURES:
            values = part[name].to_numpy()
            low, high = t_interval(values)
            row |= {name: values.mean(), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row | {"n_units": len(part), "n_tokens": part["n_tokens"].sum()})
    if not rows:
        return pl.DataFrame(schema=dict.fromkeys(keys, pl.String))
    table = pl.DataFrame(rows, infer_schema_length=None)
    total = pl.col("score").sum().over([name for name in keys if name != "component"])
    t, p_adjusted, n_tests = _tests(cells, keys, unit, n_resamples, seed)
    return table.with_columns(
        share=pl.col("score") / total, t=pl.Series(t), p_adjusted=pl.Series(p_adjusted), n_tests=pl.lit(n_tests)
    ).sort(*[name for name in keys if name != "component"], "score", descending=[False] * (len(keys) - 1) + [True])


def _tests(cells: pl.DataFrame, keys: list[str], unit: str, n_resamples: int, seed: int) -> tuple[Floats, Floats, int]:
    """t and adjusted p of every row in the order of `cells`; NaN for a row that some unit lacks."""
    wide = cells.pivot(unit, index=keys, values="score")
    values = wide.drop(keys).to_numpy().astype(np.float64).T  # [unit row], NaN where a unit has none
    whole = np.isfinite(values).all(0)
    t, p_adjusted = np.full((2, values.shape[1]), np.nan)
    if whole.any():
        t[whole], p_adjusted[whole] = sign_flip_max_t(values[:, whole], n_resamples, seed)
    return t, p_adjusted, int(whole.sum())
