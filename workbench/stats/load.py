"""Expert load: how the router spreads tokens over experts, and how evenly.

Notation: S[token, layer, expert] is 1 when the expert is one of the k chosen; slots = sum of S over tokens.
A `counts` frame is what everything else here and in `contrasts` starts from: one row per unit, layer and expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.axes import SEGMENTS
from workbench.stats.index import Frame, Ints, check_experts, id_matrix, locate, unit_index

PART = 1_000_000  # routing rows counted at once

# Scaffolding is not content, and much of it is alike in all conditions: counting it would make them look more alike
# than they are (so in arXiv 2601.03425). System and developer text comes from the workbench or the researcher, not from
# the prompt; it is not quite constant, since the system text names the effort.
TEMPLATE_SEGMENTS = ("bos", "system", "developer", "control")
CONTENT_SEGMENTS = tuple(segment for segment in SEGMENTS if segment not in TEMPLATE_SEGMENTS)


def slot_counts(
    tokens: Frame, routing: Frame, by: Sequence[str], segments: Sequence[str] = CONTENT_SEGMENTS
) -> pl.DataFrame:
    """Count token-slots per unit, layer and expert: columns *by, layer, expert, slots, n_tokens.

    `by` are columns of the tokens frame (say group_id, lang); `n_tokens` is the number of tokens of the unit, so that
    slots / n_tokens is the selection frequency f (sums to k over experts) and slots / (k n_tokens) the load
    (sums to 1). Experts that a unit never used have no row. Only tokens of `segments` are counted; padding is never in
    the frames. Where the tokens carry a `weight` (matching.py), a token counts that much, scaled to 1 on average over
    its unit: n_tokens stays the number of tokens, slots are fractions then.
    """
    keys = list(by)
    units, where = unit_index(tokens.lazy().filter(pl.col("segment").is_in(segments)), keys)
    rows = routing.lazy().select("doc_id", "pos", "layer", "expert_ids").collect()
    place = locate(where, rows)
    slots = _count(rows, place, where, len(units))
    counted = slots.join(units, on="unit").select(*keys, "layer", "expert", "slots", "n_tokens")
    return counted.sort(*keys, "layer", "expert")


def _count(rows: pl.DataFrame, place: Ints, where: pl.DataFrame, n_units: int) -> pl.DataFrame:
    """Columns unit, layer, expert, slots: one pass of counting over flat integers, in parts that fit in memory."""
    unit, weight = where["unit"].to_numpy(), where["weight"].to_numpy()
    weighted = bool((weight != 1).any())
    n_layers, n_experts = (_largest(column) + 1 for column in (rows["layer"], rows["expert_ids"].list.max()))
    totals = np.zeros(n_units * n_layers * n_experts)
    for start in range(0, len(rows), PART):
        part, at = rows[start : start + PART], place[start : start + PART]
        known = at >= 0
        layer, ids = part["layer"].to_numpy()[known], id_matrix(part["expert_ids"])[known]  # [row k]
        keys = (unit[at[known]] * n_layers + layer)[:, None] * n_experts + ids
        weights = np.repeat(weight[at[known]], ids.shape[1]) if weighted else None
        totals += np.bincount(keys.ravel(), weights, len(totals))
    found = np.flatnonzero(totals)
    names = zip(("unit", "layer", "expert"), np.unravel_index(found, (n_units, n_layers, n_experts)), strict=True)
    slots = pl.Series(totals[found]).cast(pl.Float64 if weighted else pl.Int64)
    return pl.DataFrame({**dict(names), "slots": slots})


def _largest(numbers: pl.Series) -> int:
    return int(numbers.to_numpy().max(initial=0))


def expert_load(counts: pl.DataFrame, by: Sequence[str], n_experts: int) -> pl.DataFrame:
    """Share of token-slots that each expert of a layer gets: columns *by, layer, expert, slots, load, log2_ratio.

    load[layer, expert] = slots / sum of slots over experts, so it sums to 1 and 1/E is uniform (OLMoE, arXiv
    2409.02060, section 5; here divided by k). log2_ratio = log2(load E): 0 uniform, +1 twice, -1 half; null where the
    expert got nothing. Null 1/E; the interval is that of `balance.load_interval`. Tokens weigh equally: this describes
    the traffic. Contrasts weigh documents equally instead.
    """
    check_experts(counts["expert"].max(), n_experts)  # type: ignore[arg-type]
    keys = list(by)
    cells = counts.select(*keys, "layer").unique()
    every = cells.join(pl.DataFrame({"expert": range(n_experts)}), how="cross")
    sums = counts.group_by(*keys, "layer", pl.col("expert").cast(pl.Int64)).agg(pl.col("slots").sum())
    load = pl.col("slots") / pl.col("slots").sum().over(*keys, "layer")
    return (
        every.join(sums, on=[*keys, "layer", "expert"], how="left", nulls_equal=True)
        .with_columns(pl.col("slots").fill_null(0))
        .with_columns(load=load)
        .with_columns(log2_ratio=pl.when(pl.col("load") > 0).then((pl.col("load") * n_experts).log(2)))
        .sort(*keys, "layer", "expert")
    )


def load_balance(load: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """How even the load of each layer is: columns *by, layer, entropy, effective_experts, max_ratio, n_idle.

    entropy = -sum q ln q / ln E in [0, 1] (1 is uniform); effective_experts = exp(-sum q ln q) in [1, E], the number of
    equally used experts with the same entropy; max_ratio = E max q; n_idle = experts with no slot at all. From few
    slots the entropy is too low by about (E - 1) / (2 slots) nats (Miller 1955): compare equal amounts of text, or
    read `balance.balance`, which has the null and the interval.
    Never pooled over layers, where imbalances cancel.
    """
    q = pl.col("load")
    nats = -(q * pl.when(q > 0).then(q.log()).otherwise(0.0)).sum()
    return (
        load.group_by(*by, "layer")
        .agg(nats=nats, n_experts=pl.len(), max_ratio=q.max() * pl.len(), n_idle=(q == 0).sum())
        .select(
            *by,
            "layer",
            entropy=pl.col("nats") / pl.col("n_experts").log(),
            effective_experts=pl.col("nats").exp(),
            max_ratio="max_ratio",
            n_idle="n_idle",
        )
        .sort(*by, "layer")
    )


def frequency_cube(
    counts: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int, unit: str = "group_id"
) -> tuple[list[str], list[int], np.ndarray]:
    """Selection frequencies of paired groups as one array: (group ids, layers, f [value group layer expert]).

    `counts` comes from `slot_counts(..., by=["group_id", axis])` with axis "lang", say. f = slots / n_tokens of that
    group and value; it sums to k over experts. Groups, layers and order as in `unit_cube`.
    """
    return unit_cube(counts, axis, values, n_experts, pl.col("slots") / pl.col("n_tokens"), unit)


def unit_cube(
    cells: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int, value: pl.Expr, unit: str = "group_id"
) -> tuple[list[str], list[int], np.ndarray]:
    """One number per cell as an array: (unit ids, layers, [value unit layer expert]), 0 where there is no row.

    Only units that have rows for every one of `values` are kept, sorted by id; layers are all those of `cells`.
    """
    check_experts(cells["expert"].max(), n_experts)  # type: ignore[arg-type]
    layers = cells["layer"].unique().sort().to_list()
    present = cells.select(unit, axis).unique().filter(pl.col(axis).is_in(list(values)))
    paired = present.group_by(unit).len().filter(pl.col("len") == len(values)).sort(unit)
    index = paired.select(unit).with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    depth = pl.col("layer").replace_strict({layer: place for place, layer in enumerate(layers)}, return_dtype=pl.Int64)
    cube = np.zeros((len(values), len(index), len(layers), n_experts))
    for place, name in enumerate(values):
        part = cells.filter(pl.col(axis) == name).join(index, on=unit).select("row", depth, "expert", value=value)
        row, layer, expert = (part[name].cast(pl.Int64).to_numpy() for name in ("row", "layer", "expert"))
        cube[place, row, layer, expert] = part["value"].to_numpy()
    return index[unit].to_list(), layers, cube


def n_tokens_of(cells: pl.DataFrame, units: Sequence[str], axis: str, values: Sequence[str], unit: str) -> int:
    """How many tokens the cells of these units and conditions rest on."""
    kept = cells.filter(pl.col(unit).is_in(list(units)), pl.col(axis).is_in(list(values)))
    return int(kept.unique([unit, axis])["n_tokens"].sum())
