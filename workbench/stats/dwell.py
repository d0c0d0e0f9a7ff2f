"""How long a token's experts stay chosen: the hazard of being left, by how long they have been chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.stats.dynamics import stretches
from workbench.stats.index import Frame, Ints, check_choices, codes, membership, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, deal_blocks, sums_jackknife


def leaving_hazard(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    max_age: int = 8,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Is an expert that was chosen for some tokens in a row chosen for the next one? One row per layer and age.

    age: for how many tokens in a row, exactly, up to this one; only runs whose next token is in the same stretch of one
    segment count (n_at_risk), so that the ends of texts cut nothing short. hazard: share of them that the next token
    leaves. Null: an expert is chosen with its own frequency f in the layer whatever came before, so that it is left
    with 1 - f; null is the mean of that over the runs at risk, which are those of ever busier experts as age grows: a
    hazard that falls with age is no sign of memory by itself. excess = null - hazard. low, high, excess_low,
    excess_high: 95%, delete-a-group jackknife over units. Also n_groups. Words that come in pairs keep experts too: see
    `dynamics.persistence` for the same two words elsewhere. Hazards of runs are this project's.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).sort("doc_id", "pos").collect()
    layers, ids = token_array(kept, routing)
    if not ids.size:
        return pl.DataFrame(schema=SCHEMA)
    check_choices(ids, n_experts)
    stretch, owner = stretches(kept), codes(kept[unit])
    block = deal_blocks(int(owner.max()) + 1)[owner]
    follows = np.append(stretch[:-1] == stretch[1:], False)  # the next row is the next token of the same stretch
    sums = np.stack(
        [_sums(membership(ids[:, place], n_experts), follows, block, max_age) for place in range(len(layers))]
    )
    at_risk, left, expected = np.moveaxis(sums, 1, 0)  # each [layer block age]
    parts = np.stack([at_risk, left, expected], axis=1).transpose(2, 1, 0, 3).reshape(-1, 3, len(layers) * max_age)
    columns: dict[str, np.ndarray] = {
        "layer": np.repeat(np.array(layers, dtype=np.int64), max_age),
        "age": np.tile(np.arange(1, max_age + 1), len(layers)),
        "n_at_risk": parts.sum(0)[0].astype(np.int64),
    }
    for name, statistic in (("hazard", _hazard), ("excess", _excess)):
        low, high = sums_jackknife(statistic, parts)
        columns |= {name: statistic(parts.sum(0)), f"{name}_low": low, f"{name}_high": high}
    columns["null"] = columns["hazard"] + columns["excess"]
    frame = pl.DataFrame(columns).rename({"hazard_low": "low", "hazard_high": "high"})
    return (
        frame.with_columns(pl.col(pl.Float64).fill_nan(None), n_groups=pl.lit(int(owner.max()) + 1))
        .select(list(SCHEMA))
        .cast(pl.Schema(SCHEMA))
    )


SCHEMA = {
    "layer": pl.Int64, "age": pl.Int64, "n_at_risk": pl.Int64, "hazard": pl.Float64, "low": pl.Float64,
    "high": pl.Float64, "null": pl.Float64, "excess": pl.Float64, "excess_low": pl.Float64, "excess_high": pl.Float64,
    "n_groups": pl.Int64,
}  # fmt: skip


def _sums(chosen: np.ndarray, follows: np.ndarray, block: Ints, max_age: int) -> Floats:
    """chosen [token expert] -> runs at risk, runs left, and what load alone expects to be left: [3 block age]."""
    leaves = 1 - chosen.mean(0)  # [expert]
    n_blocks = int(block.max()) + 1
    found = np.zeros((3, n_blocks, max_age))
    starts = np.insert(
        chosen[:-1] & follows[:-1, None], 0, False, axis=0
    )  # chosen for the token before, of one stretch
    run = chosen & ~starts  # runs of age 1 that reach this token
    for age in range(max_age):
        risk = run & follows[:, None]
        stays = risk & np.append(chosen[1:], chosen[:1], axis=0)
        for place, values in enumerate((risk.sum(1), (risk & ~stays).sum(1), risk @ leaves)):
            found[place, :, age] = np.bincount(block, weights=values, minlength=n_blocks)
        run = np.insert(stays[:-1], 0, False, axis=0)
    return found


def _hazard(sums: Floats) -> Floats:  # [... 3 cell] -> [... cell]
    at_risk, left = sums[..., 0, :], sums[..., 1, :]
    return np.divide(left, at_risk, out=np.full(at_risk.shape, np.nan), where=at_risk > 0)


def _excess(sums: Floats) -> Floats:
    at_risk, more = sums[..., 0, :], sums[..., 2, :] - sums[..., 1, :]
    return np.divide(more, at_risk, out=np.full(at_risk.shape, np.nan), where=at_risk > 0)
