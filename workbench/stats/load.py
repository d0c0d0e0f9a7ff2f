"""Expert load: how the router spreads tokens over experts, and how evenly.

Notation: S[token, layer, expert] is 1 when the expert is one of the k chosen; slots = sum of S over tokens.
A `counts` frame is what everything else here and in `contrasts` starts from: one row per unit, layer and expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.axes import SEGMENTS

Frame = pl.DataFrame | pl.LazyFrame

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
    the frames.
    """
    keys = list(by)
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments))
    sizes = kept.group_by(keys).agg(n_tokens=pl.len().cast(pl.Int64))
    where = kept.select("doc_id", "pos", *(key for key in keys if key not in ("doc_id", "pos")))
    slots = (
        routing.lazy()
        .select("doc_id", "pos", "layer", "expert_ids")
        .join(where, on=["doc_id", "pos"])
        .select(*keys, "layer", pl.col("expert_ids").alias("expert"))
        .explode("expert")
        .group_by(*keys, "layer", "expert")
        .agg(slots=pl.len().cast(pl.Int64))
    )
    return slots.join(sizes, on=keys, nulls_equal=True).sort(*keys, "layer", "expert").collect()


def expert_load(counts: pl.DataFrame, by: Sequence[str], n_experts: int) -> pl.DataFrame:
    """Share of token-slots that each expert of a layer gets: columns *by, layer, expert, slots, load, log2_ratio.

    load[layer, expert] = slots / sum of slots over experts, so it sums to 1 and 1/E is uniform (OLMoE, arXiv
    2409.02060, section 5; here divided by k). log2_ratio = log2(load E): 0 uniform, +1 twice, -1 half; null where the
    expert got nothing. Tokens weigh equally: this describes the traffic. Contrasts weigh documents equally instead.
    """
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
    slots the entropy is too low by about (E - 1) / (2 slots) nats (Miller 1955): compare equal amounts of text.
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
    counts: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int
) -> tuple[list[str], list[int], np.ndarray]:
    """Selection frequencies of paired groups as one array: (group ids, layers, f [value group layer expert]).

    `counts` comes from `slot_counts(..., by=["group_id", axis])` with axis "lang", say. Only groups that have tokens
    for every one of `values` are kept, sorted by id; layers are those that route. f = slots / n_tokens of that group
    and value; it sums to k over experts.
    """
    layers = counts["layer"].unique().sort().to_list()
    units = counts.select("group_id", axis).unique().filter(pl.col(axis).is_in(list(values)))
    paired = units.group_by("group_id").len().filter(pl.col("len") == len(values)).sort("group_id")
    index = paired.select("group_id").with_row_index("group").with_columns(pl.col("group").cast(pl.Int64))
    depth = pl.col("layer").replace_strict({layer: place for place, layer in enumerate(layers)}, return_dtype=pl.Int64)
    cube = np.zeros((len(values), len(index), len(layers), n_experts))
    for place, value in enumerate(values):
        part = counts.filter(pl.col(axis) == value).join(index, on="group_id").with_columns(depth)
        group, layer, expert = (part[name].cast(pl.Int64).to_numpy() for name in ("group", "layer", "expert"))
        cube[place, group, layer, expert] = (part["slots"] / part["n_tokens"]).to_numpy()
    return index["group_id"].to_list(), layers, cube
