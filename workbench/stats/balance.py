"""How evenly a router spreads its tokens, at every scope, with intervals; and why pooling over layers misleads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.stats.index import Frame, locate
from workbench.stats.load import CONTENT_SEGMENTS, slot_counts
from workbench.stats.resampling import Floats, block_jackknife

DEAD, HOT = 0.001, 0.5  # selection frequencies f below and above which an expert counts as dead or hot
MEASURES = ("entropy", "entropy_corrected", "effective_experts", "gini", "cv", "max_ratio", "n_idle", "n_dead", "n_hot")


def balance_measures(slots: Floats, k: int) -> dict[str, Floats]:
    """Concentration of token-slots [... expert] over the experts of a layer: name -> [...].

    With q = slots / sum and E experts: entropy = -sum q ln q / ln E (1 is uniform); entropy_corrected adds the
    (E' - 1) / (2 N) nats that N slots on E' used experts lose on average (Miller 1955); effective_experts =
    exp(corrected entropy in nats); gini in [0, 1); cv = sd / mean; max_ratio = E max q, at most E / k since an expert
    takes at most one of a token's k slots; n_idle: no slot; n_dead: selection frequency k q below 0.001; n_hot: above
    0.5 (definitions collected in arXiv 2601.03425).
    """
    n_experts, total = slots.shape[-1], slots.sum(-1)
    q = slots / np.maximum(total, 1)[..., None]
    nats = -(q * np.log(q, where=q > 0, out=np.zeros_like(q))).sum(-1)
    used = (q > 0).sum(-1)
    corrected = np.minimum(nats + (used - 1) / (2 * np.maximum(total, 1)), np.log(n_experts))
    ranks = 2 * np.arange(1, n_experts + 1) - n_experts - 1
    return {
        "entropy": nats / np.log(n_experts),
        "entropy_corrected": corrected / np.log(n_experts),
        "effective_experts": np.exp(corrected),
        "gini": (np.sort(q, -1) * ranks).sum(-1) / n_experts,
        "cv": q.std(-1) * n_experts,
        "max_ratio": q.max(-1) * n_experts,
        "n_idle": (q == 0).sum(-1).astype(np.float64),
        "n_dead": (k * q < DEAD).sum(-1).astype(np.float64),
        "n_hot": (k * q > HOT).sum(-1).astype(np.float64),
    }


def balance(counts: pl.DataFrame, by: Sequence[str], n_experts: int, k: int, unit: str = "group_id") -> pl.DataFrame:
    """Every measure of `balance_measures` per layer with its interval: columns *by, layer, measure, value, low, high,
    ...

    counts: `load.slot_counts` by [unit, *by]. Tokens weigh equally (this is traffic); intervals: delete-a-group
    jackknife over units. null: the mean under a uniform router with as many independent slots, the value that sampling
    alone gives (for entropy and cv by formula, NaN for the others). Also n_units, n_slots.
    """
    frames = []
    layers = counts["layer"].unique().sort().to_list()
    groups = counts.partition_by(list(by), as_dict=True, maintain_order=True) if by else {(): counts}
    for key, part in groups.items():
        cube = _slots_cube(part, layers, n_experts, unit)  # [unit layer expert]
        numbers = block_jackknife(_statistic(cube, k), len(cube))
        n_slots = cube.sum((0, 2))
        frames.append(_balance_frame(dict(zip(by, key, strict=True)), layers, numbers, n_slots, n_experts, len(cube)))
    return pl.concat(frames)


def _statistic(cube: Floats, k: int) -> Callable[[NDArray[np.bool_]], Floats]:
    return lambda kept: np.stack(list(balance_measures(cube[kept].sum(0), k).values()))  # [measure layer]


def _slots_cube(part: pl.DataFrame, layers: list[int], n_experts: int, unit: str) -> Floats:
    names = part[unit].unique().sort()
    row = part[unit].replace_strict(names, pl.int_range(len(names), eager=True)).to_numpy()
    depth = np.searchsorted(layers, part["layer"].to_numpy())
    cube = np.zeros((len(names), len(layers), n_experts))
    np.add.at(cube, (row, depth, part["expert"].cast(pl.Int64).to_numpy()), part["slots"].to_numpy())
    return cube


def _balance_frame(
    key: dict[str, object], layers: list[int], numbers: Sequence[Floats], n_slots: Floats, n_experts: int, n_units: int
) -> pl.DataFrame:
    n = np.maximum(n_slots, 1)
    lost = (n_experts - 1) / (2 * n) / np.log(n_experts)
    nulls = {"entropy": 1 - lost, "cv": np.sqrt((n_experts - 1) / n)}
    missing = np.full(len(layers), np.nan)
    value, low, high = (part.ravel() for part in numbers)
    frame = pl.DataFrame(
        {
            "layer": np.tile(np.array(layers, dtype=np.int64), len(MEASURES)),
            "measure": np.repeat(MEASURES, len(layers)),
            "value": value,
            "low": low,
            "high": high,
            "null": np.concatenate([nulls.get(name, missing) for name in MEASURES]),
            "n_slots": np.tile(n_slots, len(MEASURES)),
        }
    )
    labels = [pl.lit(value).alias(name) for name, value in key.items()]
    return frame.select(*labels, pl.all(), n_units=pl.lit(n_units))


def auxiliary_loss(load: pl.DataFrame) -> pl.DataFrame:
    """E sum q^2, the load part of the Switch auxiliary loss, per layer and over pooled layers: columns scope, value.

    1 is perfectly even, E / k the worst. Rows: one per layer ("layer 3"), "mean of layers", and "pooled", which sums
    the loads of all layers before squaring, as transformers' load_balancing_loss_func does. Expert 5 of one layer has
    nothing to do with expert 5 of another, so pooling lets their imbalances cancel: models with a mean of 3.6 and of
    1.5 both pool to 1.00. Never report the pooled value as balance. load: `load.expert_load` of one condition.
    """
    n_experts = load["expert"].n_unique()
    square = (pl.col("load") ** 2).sum() * n_experts
    layers = load.group_by("layer").agg(value=square).sort("layer")
    pooled = load.group_by("expert").agg(pl.col("load").mean()).select(square).item()
    rows = [(f"layer {layer}", value) for layer, value in layers.rows()]
    rows += [("mean of layers", float(layers["value"].mean())), ("pooled", pooled)]  # type: ignore[arg-type]
    return pl.DataFrame(rows, schema=["scope", "value"], orient="row")


def balance_by_scope(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    k: int,
    window: int = 2048,
    segments: Sequence[str] = CONTENT_SEGMENTS,
) -> pl.DataFrame:
    """Balance within a document, a window of tokens, a language, and over everything: one row per layer and scope.

    Columns layer, scope, entropy_corrected and gini (means over the scope's units), null_entropy (uniform router at the
    same number of slots, by formula), n_units, mean_tokens. A router may be even over everything and uneven in every
    document: global balance alone hides specialisation (arXiv 2505.16056).
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).sort("doc_id", "pos").collect()
    kept = kept.with_columns(window=pl.int_range(pl.len()) // window, everything=pl.lit(0))
    frames = []
    for scope, column in (("document", "doc_id"), ("window", "window"), ("language", "lang"), ("global", "everything")):
        counts = slot_counts(kept, routing, [column], segments)
        layers = counts["layer"].unique().sort().to_list()
        cube = _slots_cube(counts, layers, n_experts, column)  # [unit layer expert]
        found = balance_measures(cube, k)
        n_slots = cube.sum(-1)
        null = 1 - ((n_experts - 1) / (2 * np.maximum(n_slots, 1)) / np.log(n_experts)).mean(0)
        numbers = {name: found[name].mean(0) for name in ("entropy_corrected", "gini")}
        shape = {"n_units": np.full(len(layers), len(cube)), "mean_tokens": n_slots.mean(0) / k}
        frames.append(
            pl.DataFrame({"layer": layers, "scope": [scope] * len(layers), **numbers, "null_entropy": null, **shape})
        )
    return pl.concat(frames)


def lorenz_curve(load: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Share of slots held by the least used share of experts: columns *by, layer, experts, slots, both from 0 to 1."""
    ordered = load.sort(*by, "layer", "load")
    places = pl.int_range(1, pl.len() + 1).over(*by, "layer") / pl.len().over(*by, "layer")
    curve = ordered.select(*by, "layer", experts=places, slots=pl.col("load").cum_sum().over(*by, "layer"))
    origin = curve.select(*by, "layer").unique().with_columns(experts=pl.lit(0.0), slots=pl.lit(0.0))
    return pl.concat([origin, curve]).sort(*by, "layer", "experts")


def margin_summary(
    tokens: Frame,
    routing: Frame,
    by: Sequence[str] = (),
    near: Sequence[float] = (0.01, 0.1),
    segments: Sequence[str] = CONTENT_SEGMENTS,
) -> pl.DataFrame:
    """How narrowly experts were chosen: columns *by, layer, median, q05, ties, near_<eps> ..., mass, n_tokens, n_docs.

    The margin is the k-th minus the (k+1)-th router logit. ties: share of tokens with margin 0, whose choice is
    arbitrary; near_<eps>: share below eps, which numerical noise of that size may flip (bfloat16 runs differ by 0.1 to
    0.6 logits, arXiv 2606.03780); mass: mean probability of the k chosen together. Empty when all experts are chosen.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).select("doc_id", "pos", *by).collect()
    columns = ["doc_id", "pos", "layer", "router_margin", "router_mass"]
    rows = routing.lazy().select(columns).filter(pl.col("router_margin").is_not_null()).collect()
    place = locate(kept.select("doc_id", "pos"), rows)
    known = pl.Series(place >= 0)
    labels = kept.select(by)[place[place >= 0]] if by else pl.DataFrame()
    joined = rows.filter(known).hstack(labels)
    margin = pl.col("router_margin")
    return (
        joined.group_by(*by, "layer")
        .agg(
            median=margin.median(),
            q05=margin.quantile(0.05),
            ties=(margin <= 0).mean(),
            **{f"near_{eps:g}": (margin < eps).mean() for eps in near},
            mass=pl.col("router_mass").mean(),
            n_tokens=pl.len(),
            n_docs=pl.col("doc_id").n_unique(),
        )
        .sort(*by, "layer")
    )
