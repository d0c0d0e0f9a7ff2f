"""How evenly a router spreads its tokens, at every scope, with intervals; and why pooling over layers misleads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.stats.index import Frame, Ints, check_counts, codes, locate
from workbench.stats.load import CONTENT_SEGMENTS, slot_counts
from workbench.stats.resampling import Floats, block_jackknife

N_NULL = 200  # draws of a uniform router
DEAD, HOT = 0.001, 0.5  # selection frequencies f below and above which an expert counts as dead or hot
BY_SCOPE = ("entropy", "entropy_corrected", "gini")
MEASURES = ("entropy", "entropy_corrected", "effective_experts", "gini", "cv", "max_ratio", "n_idle", "n_dead", "n_hot")


def balance_measures(slots: Floats, k: int) -> dict[str, Floats]:
    """Concentration of token-slots [... expert] over the experts of a layer: name -> [...].

    With q = slots / sum and E experts: entropy = -sum q ln q / ln E (1 is uniform); entropy_corrected adds the
    (E' - 1) / (2 N) nats that N slots on E' used experts lose on average (Miller 1955); effective_experts =
    exp(corrected entropy in nats); gini in [0, 1); cv = sd / mean; max_ratio = E max q, at most E / k since an expert
    takes at most one of a token's k slots; n_idle: no slot; n_dead: selection frequency k q below 0.001; n_hot: above
    0.5 (definitions collected in arXiv 2601.03425). NaN without a slot; entropies NaN for one expert.
    """
    n_experts, total = slots.shape[-1], slots.sum(-1)
    log_experts = np.log(n_experts) or np.nan  # one expert is neither even nor uneven
    q = slots / np.maximum(total, 1)[..., None]
    nats = -(q * np.log(q, where=q > 0, out=np.zeros_like(q))).sum(-1)
    used = (q > 0).sum(-1)
    corrected = np.minimum(nats + (used - 1) / (2 * np.maximum(total, 1)), np.log(n_experts))
    ranks = 2 * np.arange(1, n_experts + 1) - n_experts - 1
    found = {
        "entropy": nats / log_experts,
        "entropy_corrected": corrected / log_experts,
        "effective_experts": np.exp(corrected),
        "gini": (np.sort(q, -1) * ranks).sum(-1) / n_experts,
        "cv": q.std(-1) * n_experts,
        "max_ratio": q.max(-1) * n_experts,
        "n_idle": (q == 0).sum(-1).astype(np.float64),
        "n_dead": (k * q < DEAD).sum(-1).astype(np.float64),
        "n_hot": (k * q > HOT).sum(-1).astype(np.float64),
    }
    return {name: np.where(total > 0, values, np.nan) for name, values in found.items()}


def balance(counts: pl.DataFrame, by: Sequence[str], n_experts: int, k: int, unit: str = "group_id") -> pl.DataFrame:
    """Every measure of `balance_measures` per layer with its interval: columns *by, layer, measure, value, low, high,
    ...

    counts: `load.slot_counts` by [unit, *by]; measures as in arXiv 2601.03425 and Miller 1955. Tokens weigh equally
    (this is traffic); intervals: 95%, delete-a-group jackknife over units. null: the mean under a uniform router with
    as many independent slots, the value that sampling alone gives (for entropy and cv by formula, for the others over
    N_NULL draws). Also n_units, n_slots.
    """
    check_counts(counts, n_experts)
    frames = []
    layers = counts["layer"].unique().sort().to_list()
    groups = counts.partition_by(list(by), as_dict=True, maintain_order=True) if by else {(): counts}
    for key, part in groups.items():
        cube = _slots_cube(part, layers, n_experts, unit)  # [unit layer expert]
        numbers = block_jackknife(_statistic(cube, k), len(cube))
        n_slots = cube.sum((0, 2))
        null = _uniform(n_slots, n_experts, k)
        frames.append(_balance_frame(dict(zip(by, key, strict=True)), layers, numbers, n_slots, null, len(cube)))
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


def _uniform(n_slots: Floats, n_experts: int, k: int) -> dict[str, Floats]:
    """Every measure under a uniform router with as many slots in a layer: name -> [layer]."""
    n = np.maximum(n_slots, 1)
    shares = np.full(n_experts, 1 / n_experts)
    drawn = np.random.default_rng(0).multinomial(n_slots.astype(np.int64), shares, (N_NULL, len(n_slots)))
    means = {name: values.mean(0) for name, values in balance_measures(drawn.astype(np.float64), k).items()}
    if n_experts == 1:
        return means
    return means | {"entropy": 1 - (n_experts - 1) / (2 * n) / np.log(n_experts), "cv": np.sqrt((n_experts - 1) / n)}


def _balance_frame(
    key: dict[str, object], layers: list[int], numbers: Sequence[Floats], n_slots: Floats, null: dict[str, Floats],
    n_units: int,
) -> pl.DataFrame:  # fmt: skip
    value, low, high = (part.ravel() for part in numbers)
    frame = pl.DataFrame(
        {
            "layer": np.tile(np.array(layers, dtype=np.int64), len(MEASURES)),
            "measure": np.repeat(MEASURES, len(layers)),
            "value": value,
            "low": low,
            "high": high,
            "null": np.concatenate([null[name] for name in MEASURES]),
            "n_slots": np.tile(n_slots, len(MEASURES)),
        }
    )
    labels = [pl.lit(value).alias(name) for name, value in key.items()]
    return frame.select(*labels, pl.all(), n_units=pl.lit(n_units))


def load_interval(counts: pl.DataFrame, by: Sequence[str], n_experts: int, unit: str = "group_id") -> pl.DataFrame:
    """`load.expert_load` with its interval: columns *by, layer, expert, load, low, high, null, n_slots, n_units.

    counts: `load.slot_counts` by [unit, *by]. Tokens weigh equally (this is traffic); low, high: 95%, delete-a-group
    jackknife over units. null: 1 / E, an even router. n_slots: of the layer. Shares as in OLMoE (arXiv 2409.02060).
    """
    check_counts(counts, n_experts)
    layers = counts["layer"].unique().sort().to_list()
    groups = counts.partition_by(list(by), as_dict=True, maintain_order=True) if by else {(): counts}
    frames = []
    for key, part in groups.items():
        cube = _slots_cube(part, layers, n_experts, unit)  # [unit layer expert]
        load, low, high = block_jackknife(lambda kept, cube=cube: _shares(cube[kept].sum(0)), len(cube))  # type: ignore[misc]
        frame = pl.DataFrame(
            {
                "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
                "expert": np.tile(np.arange(n_experts), len(layers)),
                "load": load.ravel(),
                "low": np.maximum(low, 0).ravel(),
                "high": np.minimum(high, 1).ravel(),
                "n_slots": np.repeat(cube.sum((0, 2)), n_experts),
            }
        )
        labels = [pl.lit(value).alias(name) for name, value in zip(by, key, strict=True)]
        frames.append(frame.select(*labels, pl.all(), null=pl.lit(1 / n_experts), n_units=pl.lit(len(cube))))
    return pl.concat(frames)


def _shares(slots: Floats) -> Floats:  # [... expert] -> [... expert]
    return slots / np.maximum(slots.sum(-1, keepdims=True), 1)


def auxiliary_loss(counts: pl.DataFrame, n_experts: int, unit: str = "group_id") -> pl.DataFrame:
    """Load concentration E sum q^2, by layer and pooled: one row per scope.

    q: shares of the token-slots. No training loss: that of Switch (arXiv 2101.03961) is E sum f P with the mean router
    probabilities P, which are not looked at here.

    counts: `load.slot_counts` by [unit] of one condition. Columns scope, value, low, high (delete-a-group jackknife
    over units, from 1 on), null (1, perfectly even; E / k is the worst), n_units. Scopes: one per layer ("layer 3"),
    "mean of layers", and "pooled", which sums the loads of all layers before squaring, as transformers'
    load_balancing_loss_func does. Expert 5 of one layer has nothing to do with expert 5 of another, so pooling lets
    their imbalances cancel: models with a mean of 3.6 and of 1.5 both pool to 1.00. Never report the pooled value as
    balance.
    """
    check_counts(counts, n_experts)
    layers = counts["layer"].unique().sort().to_list()
    cube = _slots_cube(counts, layers, n_experts, unit)  # [unit layer expert]

    def concentration(kept: NDArray[np.bool_]) -> Floats:  # [layer + 2]
        q = _shares(cube[kept].sum(0))
        each = n_experts * (q**2).sum(-1)
        return np.array([*each, each.mean(), n_experts * (q.mean(0) ** 2).sum()])

    value, low, high = block_jackknife(concentration, len(cube))
    scopes = [*(f"layer {layer}" for layer in layers), "mean of layers", "pooled"]
    columns = {"scope": scopes, "value": value, "low": np.maximum(low, 1), "high": high}
    return pl.DataFrame(columns).with_columns(null=pl.lit(1.0), n_units=pl.lit(len(cube)))


def balance_by_scope(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    k: int,
    window: int = 2048,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Balance within a document, a window of tokens, a language, and over everything: one row per layer and scope.

    Columns layer, scope, entropy, entropy_corrected and gini (means over the scope's parts) with _low and _high (95%,
    delete-a-group jackknife over units), null_entropy (of the plain entropy: uniform router at the same number of
    slots, by formula; that of the corrected one is about 1), n_parts, mean_tokens, n_units. A router may be even over
    everything and uneven in every document: global balance alone hides specialisation (arXiv 2505.16056).
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).sort("doc_id", "pos").collect()
    kept = kept.with_columns(window=pl.int_range(pl.len()) // window, everything=pl.lit(0))
    frames = []
    for scope, column in (("document", "doc_id"), ("window", "window"), ("language", "lang"), ("global", "everything")):
        counts = slot_counts(kept, routing, [unit, column], segments)
        check_counts(counts, n_experts)
        layers, owner = counts["layer"].unique().sort().to_list(), codes(counts[unit])
        n_units = int(owner.max(initial=-1)) + 1

        means = _mean_balance(counts, column, layers, n_experts, k, owner)
        numbers = block_jackknife(means, n_units)  # each [measure layer]
        n_slots = _slots_cube(counts, layers, n_experts, column).sum(-1)  # [part layer]
        lost = ((n_experts - 1) / (2 * np.maximum(n_slots, 1)) / (np.log(n_experts) or np.nan)).mean(0)
        columns = {
            f"{name}{end}": np.minimum(part[place], 1)
            for place, name in enumerate(BY_SCOPE)
            for end, part in zip(("", "_low", "_high"), numbers, strict=True)
        }
        columns |= {
            "null_entropy": 1 - lost,
            "n_parts": np.full(len(layers), len(n_slots)),
            "mean_tokens": n_slots.mean(0) / k,
        }
        frame = pl.DataFrame({"layer": layers}).with_columns(
            scope=pl.lit(scope), **{name: pl.Series(values) for name, values in columns.items()}
        )
        frames.append(frame.with_columns(n_units=pl.lit(n_units)))
    return pl.concat(frames)


def _mean_balance(
    counts: pl.DataFrame, column: str, layers: list[int], n_experts: int, k: int, owner: Ints
) -> Callable[[NDArray[np.bool_]], Floats]:
    """A function of the units to keep, giving the mean over parts of BY_SCOPE: [measure layer]."""

    def means(kept: NDArray[np.bool_]) -> Floats:
        part = _slots_cube(counts.filter(pl.Series(kept[owner])), layers, n_experts, column)
        found = balance_measures(part, k)
        return np.stack([found[name].mean(0) for name in BY_SCOPE])

    return means


def lorenz_curve(load: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Share of slots held by the least used share of experts: columns *by, layer, experts, slots, both from 0 to 1.

    Lorenz 1905. Null: slots = experts, an even router. A picture without an interval: `balance` has that of its Gini.
    """
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
    unit: str = "group_id",
) -> pl.DataFrame:
    """How narrowly experts were chosen: columns *by, layer, median, q05, ties, near_<eps> ..., mass, each but the first
    two with _low and _high; n_tokens, n_docs, n_units.

    The margin is the k-th minus the (k+1)-th router logit. ties: share of tokens with margin 0, whose choice is
    arbitrary; near_<eps>: share below eps, which numerical noise of that size may flip (bfloat16 runs differ by 0.1 to
    0.6 logits, arXiv 2606.03780); mass: mean probability of the k chosen together. Intervals: 95%, delete-a-group
    jackknife over units, which holds for quantiles too while blocks are large (Shao & Wu 1989), those of shares within
    [0, 1]. No null: a description. Empty when all experts are chosen.
    """
    wanted = dict.fromkeys([unit, *by])
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).select("doc_id", "pos", *wanted).collect()
    columns = ["doc_id", "pos", "layer", "router_margin", "router_mass"]
    rows = routing.lazy().select(columns).filter(pl.col("router_margin").is_not_null()).collect()
    place = locate(kept.select("doc_id", "pos"), rows)
    joined = rows.filter(pl.Series(place >= 0)).hstack(kept.select(*wanted)[place[place >= 0]])
    keys, names = [*by, "layer"], ["median", "q05", "ties", *(f"near_{eps:g}" for eps in near), "mass"]
    margin, owner = pl.col("router_margin"), codes(joined[unit])
    measures = [
        margin.median().alias("median"),
        margin.quantile(0.05).alias("q05"),
        (margin <= 0).mean().alias("ties"),
        *((margin < eps).mean().alias(f"near_{eps:g}") for eps in near),
        pl.col("router_mass").mean().alias("mass"),
    ]
    sizes = {"n_tokens": pl.len(), "n_docs": pl.col("doc_id").n_unique(), "n_units": pl.col(unit).n_unique()}
    cells = joined.group_by(keys).agg(**sizes).sort(keys)

    def summary(left: NDArray[np.bool_]) -> Floats:  # [cell measure], NaN where the units left have no such cell
        found = joined.filter(pl.Series(left[owner], dtype=pl.Boolean)).group_by(keys).agg(measures)
        return cells.join(found, on=keys, how="left", nulls_equal=True, maintain_order="left").select(names).to_numpy()

    numbers = block_jackknife(summary, int(owner.max(initial=-1)) + 1)
    labelled = zip(("", "_low", "_high"), numbers, strict=True)
    found = {f"{name}{end}": part[:, place] for end, part in labelled for place, name in enumerate(names)}
    shares = [name for name in found if not name.startswith(("median", "q05"))]  # the two are logits
    found |= {name: np.clip(found[name], 0, 1) for name in shares}
    ordered = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    return cells.with_columns(**{name: pl.Series(found[name]) for name in ordered}).select(*keys, *ordered, *sizes)
