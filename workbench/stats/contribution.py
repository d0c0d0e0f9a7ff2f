"""How much experts add, and which few carry the model: norms, REAP, direct logit attribution, super experts, sinks.

Being chosen often is not the same as mattering. These are descriptions too: no score here replaces knocking an expert
out (observational ranks did not predict effects in arXiv 2606.10703), but they say where to look.

Frames they take: routing with expert_norms (a run made with norms on); peaks, from `capture.expert_peaks`: layer,
expert, peak; and direct logit attributions, one row per token, routed expert and target: doc_id, pos, layer, expert,
target, dla, where dla is the part of the target's logit (or logit difference) that this expert's weighted output adds
through the final norm at the same position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.errors import FrameError
from workbench.stats.index import Frame, Ints, check_choices, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, block_jackknife, sign_flip_max_t, t_interval
from workbench.stats.specialisation import specialisation


def expert_contribution(
    tokens: Frame, routing: Frame, n_experts: int, segments: Sequence[str] = CONTENT_SEGMENTS
) -> pl.DataFrame:
    """What every expert adds where it is chosen: one row per layer and expert.

    Columns layer, expert, frequency (f, share of tokens), weight (mean g where chosen), weight_share (its share of all
    routing weights, gamma), norm (mean |E_e(x)|), reap (mean g |E_e(x)|, arXiv 2510.13999), reap_low, reap_high (95%,
    delete-a-group jackknife over groups), output_share (its share of the layer's summed norms), relative (reap over the
    layer's mean contribution per slot; 1 is the null, an expert like any other) with relative_low, relative_high by the
    same jackknife, n_slots, n_groups. What concerns an expert that was never chosen is null. Raises FrameError for a
    run without norms.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    schema = routing.lazy().collect_schema()
    if "expert_norms" not in schema or routing.lazy().select(pl.col("expert_norms").is_null().all()).collect().item():
        raise FrameError("routing: expected expert_norms, got none. Run the study with --norms.")
    layers, ids = token_array(kept, routing)
    check_choices(ids, n_experts)
    weights, norms = (token_array(kept, routing, name)[1] for name in ("routing_weights", "expert_norms"))
    group = codes(kept["group_id"])
    sums = np.stack(
        [
            _sums(ids, values, group, n_experts)
            for values in (np.ones(ids.shape), weights, norms, _ratio(norms, weights))
        ]
    )
    _, low, high = block_jackknife(lambda units: _reap(sums[:, units]), sums.shape[1])
    _, relative_low, relative_high = block_jackknife(lambda units: _relative(sums[:, units]), sums.shape[1])
    n, weight, norm, plain = sums.sum(1)  # [layer expert]
    reap = _reap(sums)
    columns = {
        "frequency": n / len(kept),
        "weight": _ratio(weight, n),
        "weight_share": _ratio(weight, np.broadcast_to(weight.sum(1, keepdims=True), weight.shape)),
        "norm": _ratio(plain, n),
        "reap": reap,
        "reap_low": low,
        "reap_high": high,
        "output_share": _ratio(norm, np.broadcast_to(norm.sum(1, keepdims=True), norm.shape)),
        "relative": _relative(sums),
        "relative_low": relative_low,
        "relative_high": relative_high,
        "n_slots": n.astype(np.int64),
    }
    return _layer_expert(layers, n_experts).with_columns(
        **{name: pl.Series(values.ravel(), nan_to_null=True) for name, values in columns.items()},
        n_groups=pl.lit(sums.shape[1]),
    )


def _sums(ids: np.ndarray, values: np.ndarray, group: Ints, n_experts: int) -> Floats:  # -> [group layer expert]
    n_layers, n_groups = ids.shape[1], int(group.max(initial=-1)) + 1
    keys = (group[:, None] * n_layers + np.arange(n_layers))[..., None] * n_experts + ids
    counts = np.bincount(keys.ravel(), values.ravel(), n_groups * n_layers * n_experts)
    return counts.astype(np.float64).reshape(n_groups, n_layers, n_experts)


def _reap(sums: Floats) -> Floats:
    n, _, norm, _ = sums.sum(1)
    return _ratio(norm, n)


def _relative(sums: Floats) -> Floats:
    n, _, norm, _ = sums.sum(1)
    mean = _ratio(norm.sum(1, keepdims=True), n.sum(1, keepdims=True))  # [layer 1]
    return _ratio(_reap(sums), np.broadcast_to(mean, n.shape))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    missing = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=missing, where=denominator > 0)


def _layer_expert(layers: list[int], n_experts: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
            "expert": np.tile(np.arange(n_experts), len(layers)),
        }
    )


def attribution_summary(
    dla: pl.DataFrame, tokens: Frame, n_resamples: int = 2000, seed: int = 0, unit: str = "group_id"
) -> pl.DataFrame:
    """Mean direct logit attribution of every expert to every target: one row per target, layer and expert.

    dla: see the module's head; the exact linear part of a logit, as in Elhage et al. 2021. Columns target, layer,
    expert, mean (over a unit's tokens, an expert that was not chosen adding 0, then over units), when_chosen (mean over
    the tokens that chose it), low, high (95%, Student's t over units), t, p_adjusted (sign flips, max-T over all rows),
    n_chosen, n_units, n_tests. Null: 0. Only the direct path: what later layers make of an output is not in it.
    """
    labels = tokens.lazy().select("doc_id", "pos", unit).collect()
    measured = dla.select("doc_id", "pos").unique().join(labels, on=["doc_id", "pos"])
    sizes = measured.group_by(unit).agg(n=pl.len())
    sums = (
        dla.join(labels, on=["doc_id", "pos"])
        .group_by("target", "layer", "expert", unit)
        .agg(total=pl.col("dla").sum(), chosen=pl.len())
    )
    cells = sums.select("target", "layer", "expert").unique().sort("target", "layer", "expert")
    full = cells.join(sizes, how="cross").join(
        sums, on=["target", "layer", "expert", unit], how="left", maintain_order="left"
    )
    full = full.with_columns(pl.col("total", "chosen").fill_null(0)).sort("target", "layer", "expert", unit)
    shape = (len(cells), len(sizes))
    total, chosen, n = (full[name].to_numpy().reshape(shape).astype(np.float64) for name in ("total", "chosen", "n"))
    means = (total / n).T  # [unit cell]
    if not len(means):
        raise FrameError("dla: expected attributions of tokens of the frame, got none. Pass the tokens of that run.")
    low, high = t_interval(means)
    t, p_adjusted = sign_flip_max_t(means, n_resamples, seed)
    return cells.with_columns(
        mean=pl.Series(means.mean(0)), when_chosen=pl.Series(_ratio(total.sum(1), chosen.sum(1))),
        low=pl.Series(low), high=pl.Series(high), t=pl.Series(t), p_adjusted=pl.Series(p_adjusted),
        n_chosen=pl.Series(chosen.sum(1).astype(np.int64)), n_units=pl.lit(len(sizes)), n_tests=pl.lit(len(cells)),
    )  # fmt: skip


def super_experts(
    peaks: pl.DataFrame, quantile: float = 0.995, share: float = 0.1, depth: float = 0.75
) -> pl.DataFrame:
    """The few experts whose outputs make the massive activations: the peaks with columns ratio, threshold, super.

    peaks: one row per layer and expert with peak = max |component of the expert's output| over all tokens, BOS
    included. super: peak above the `quantile` of all peaks, above `share` of the largest peak, and in the first `depth`
    of the layers (arXiv 2507.23279, whose three super experts of Qwen3-30B-A3B peak at 744, 540 and 430 against 64 for
    the next). ratio: peak over the median of its layer. A screen without null, test or interval; being a maximum, a
    peak grows with the text. Keep super experts out of language and mode claims and of random controls.
    """
    if peaks.is_empty():
        raise FrameError("peaks: expected one per layer and expert, got none. Measure a mixture.")
    layers = peaks["layer"].unique().sort()
    early = layers.head(max(1, int(np.ceil(depth * len(layers)))))
    threshold = max(
        float(np.quantile(peaks["peak"].to_numpy(), quantile)), share * float(peaks["peak"].to_numpy().max())
    )
    return peaks.with_columns(
        ratio=pl.col("peak") / pl.col("peak").median().over("layer"),
        threshold=pl.lit(threshold),
        super=(pl.col("peak") > threshold) & pl.col("layer").is_in(early.to_list()),
    ).sort("peak", descending=True)


def sink_experts(
    tokens: Frame, routing: Frame, n_experts: int, n_first: int = 1, n_resamples: int = 1000, seed: int = 0
) -> pl.DataFrame:
    """Which experts belong to BOS and the first tokens: `specialisation` of pos < n_first against the rest of a text.

    Null, interval and source as there: first tokens are like any; 95%, t or Welch over documents; arXiv 2409.02060, and
    2507.23279 for sinks. Every segment counts. f_in near 1 and f_out near 0 is an expert of the attention sink: drop
    such positions from comparisons (`matching.select_tokens(skip_first=)`) and look at results with and without them.
    """
    marked = tokens.lazy().with_columns(
        place=pl.when(pl.col("pos") < n_first).then(pl.lit("first")).otherwise(pl.lit("rest"))
    )
    segments = marked.select("segment").unique().collect()["segment"].to_list()
    found = specialisation(
        marked.collect(), routing, "place", n_experts, segments, unit="doc_id", n_resamples=n_resamples, seed=seed
    )
    return found.filter(pl.col("value") == "first").drop("value")
