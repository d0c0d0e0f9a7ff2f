"""How far apart two conditions route: divergences with the within-condition floor subtracted, and overlap of top sets.

Any two samples differ. Each measure is taken between halves of different conditions and between halves of the same one,
at the same number of groups; only the difference of the two speaks of the conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from scipy.stats import hypergeom

from workbench.axes import LANGUAGES
from workbench.stats.load import n_tokens_of, unit_cube
from workbench.stats.resampling import Floats, jackknife_interval

Measure = Callable[[Floats, Floats], Floats]
DIVERGENCE_COLUMNS = tuple(
    f"{name}{suffix}" for name in ("between", "floor", "excess") for suffix in ("", "_low", "_high")
)
FREQUENCY = pl.col("slots") / pl.col("n_tokens")


def js_divergence(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence in bits over the last axis, in [0, 1] (Lin 1991, doi 10.1109/18.61115).

    JSD = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2. Both are normalised to sum to 1 first.
    """
    p, q = _normalised(p), _normalised(q)
    return np.maximum(entropy_bits((p + q) / 2) - (entropy_bits(p) + entropy_bits(q)) / 2, 0)


def h_js_divergence(p: Floats, q: Floats) -> Floats:
    """JSD / (ln E - mean entropy): the share of the available information (Bandarkar et al., arXiv 2510.04694).

    The denominator is what the two distributions know at all; uniform ones, which know nothing, give 0. In layers whose
    experts are used almost evenly it is sampling noise, and so is the ratio: read it beside its floor.
    """
    p, q = _normalised(p), _normalised(q)
    available = np.log2(p.shape[-1]) - (entropy_bits(p) + entropy_bits(q)) / 2
    return np.divide(js_divergence(p, q), available, out=np.zeros_like(available), where=available > 1e-12)


def total_variation(p: Floats, q: Floats) -> Floats:
    """Half the summed absolute difference, in [0, 1]: the share of slots that would have to move."""
    return np.abs(_normalised(p) - _normalised(q)).sum(-1) / 2


def entropy_bits(p: Floats) -> Floats:
    """Entropy in bits over the last axis, which sums to 1."""
    return -(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(-1)


def _normalised(p: Floats) -> Floats:
    return p / p.sum(-1, keepdims=True)


MEASURES: dict[str, Measure] = {"jsd": js_divergence, "h_js": h_js_divergence, "tv": total_variation}


def paired_divergence(
    cells: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    measure: str = "jsd",
    value: pl.Expr = FREQUENCY,
    n_splits: int = 40,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Divergence of expert use between two conditions beside what chance and content alone give: one row per layer.

    cells: `load.slot_counts` by [unit, axis], or `logits.logit_cells` with value=pl.col("prob") (the original measure
    of arXiv 2510.04694, on router probabilities). measure: "jsd" in bits, "h_js" or "tv", all in [0, 1].

    Columns: layer, between, floor and excess, each with _low and _high (95%), n_groups. The units are split at random
    into halves A and B; `between` = mean D(first of A, second of B) and D(first of B, second of A); `floor` = mean
    D(first of A, first of B) and D(second of A, second of B). Both compare n/2 units with n/2 other units, so sampling
    noise and difference of content enter both alike and cancel in `excess` = between - floor, all averaged over
    `n_splits`. Intervals: jackknife over units. Null: excess 0, the conditions make no difference beyond different
    content. Also n_tokens (in both conditions) and n_tests (layers, each judged by itself). The floor is this
    project's. Fewer than 4 paired units give NaN.
    """
    units, layers, cube = unit_cube(cells, axis, values, n_experts, value, unit)
    n_units, n_layers = len(units), len(layers)
    if n_units < 4:
        numbers = np.full((len(DIVERGENCE_COLUMNS), n_layers), np.nan)
    else:
        halves = random_halves(n_units, n_splits, seed)
        estimate, low, high = jackknife_interval(_split_divergence(cube, halves, MEASURES[measure]), n_units)
        numbers = np.stack((estimate, low, high), axis=1).reshape(-1, n_layers)
    columns = dict(zip(DIVERGENCE_COLUMNS, numbers, strict=True))
    n_tokens = n_tokens_of(cells, units, axis, values, unit)
    counted = {"n_groups": n_units, "n_tokens": n_tokens, "n_tests": n_layers}
    return pl.DataFrame({"layer": layers, **columns, **{name: np.full(n_layers, n) for name, n in counted.items()}})


def language_divergence(counts: pl.DataFrame, n_experts: int, n_splits: int = 40, seed: int = 0) -> pl.DataFrame:
    """`paired_divergence` of Japanese and English in bits, with its floor (the null), interval and source."""
    return paired_divergence(counts, "lang", LANGUAGES, n_experts, n_splits=n_splits, seed=seed)


def random_halves(n_units: int, n_splits: int, seed: int) -> Floats:
    """[half split unit], 1 where a unit is in a half; with an odd number half B has one unit more."""
    ranks = np.random.default_rng(seed).random((n_splits, n_units)).argsort(1)
    in_a = ranks < n_units // 2
    return np.stack((in_a, ~in_a)).astype(np.float64)


def _split_divergence(cube: Floats, halves: Floats, measure: Measure) -> Callable[[int | None], Floats]:
    """A function of the unit to leave out, giving (between, floor, excess) per layer over all splits: [3 layer]."""
    sums = np.tensordot(halves, cube, axes=(2, 1)).transpose(2, 0, 1, 3, 4)  # [value half split layer expert]

    def divergences(left_out: int | None) -> Floats:
        kept = sums
        if left_out is not None:
            taken = halves[:, :, left_out, None, None] * cube[:, None, None, left_out]
            kept = np.maximum(sums - taken, 0)  # below 0 by rounding only
        (first_a, first_b), (second_a, second_b) = kept  # sums do for means: measures normalise
        between = (measure(first_a, second_b) + measure(first_b, second_a)).mean(0) / 2
        floor = (measure(first_a, first_b) + measure(second_a, second_b)).mean(0) / 2
        return np.stack((between, floor, between - floor))

    return divergences


def top_overlap(
    cells: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    sizes: Sequence[int] = (4, 8, 16, 32),
    n_splits: int = 40,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Jaccard index of the n most used experts of two conditions: one row per layer and n.

    Columns layer, n, between, within, gap with _low and _high, chance, n_groups. between and within as in
    `paired_divergence` (halves of different and of the same condition; within is the ceiling that sampling allows, gap
    = within - between, null 0). Sizes of all experts and more are left out. chance: of two random sets of n experts,
    see `chance_overlap`. gap_low, gap_high: 95%, jackknife over units. Always read several n. Overlap of top sets as in
    arXiv 2601.14050; the ceiling is this project's.
    """
    units, layers, cube = unit_cube(cells, axis, values, n_experts, FREQUENCY, unit)
    frames = []
    for size in (size for size in sizes if size < n_experts):
        numbers = np.full((3, 3, len(layers)), np.nan)
        if len(units) >= 4:
            halves = random_halves(len(units), n_splits, seed)
            numbers = np.stack(jackknife_interval(_split_divergence(cube, halves, _top_measure(size)), len(units)), 1)
        (between, _, _), (within, _, _), (gap, low, high) = numbers
        frames.append(
            pl.DataFrame({"layer": layers, "between": between, "within": within, "gap": -gap,
                          "gap_low": np.maximum(-high, -1), "gap_high": np.minimum(-low, 1),
                          "n_groups": np.full(len(layers), len(units))})
            .with_columns(n=pl.lit(size), chance=pl.lit(chance_overlap(size, n_experts)["jaccard"]))
        )  # fmt: skip
    names = ["layer", "n", "between", "within", "gap", "gap_low", "gap_high", "chance", "n_groups"]
    if not frames:
        return pl.DataFrame(schema=dict.fromkeys(names, pl.Float64) | {"layer": pl.Int64, "n": pl.Int64})
    return pl.concat(frames).select(names)


def _top_measure(size: int) -> Measure:
    def jaccard(p: Floats, q: Floats) -> Floats:
        tops = [np.argsort(-x, axis=-1, kind="stable")[..., :size] for x in (p, q)]
        member = [np.zeros(x.shape, dtype=bool) for x in (p, q)]
        for found, top in zip(member, tops, strict=True):
            np.put_along_axis(found, top, True, axis=-1)
        return (member[0] & member[1]).sum(-1) / (member[0] | member[1]).sum(-1)

    return jaccard


def weighted_jaccard(p: Floats, q: Floats) -> Floats:
    """Sum of minima over sum of maxima of two distributions over the last axis, in [0, 1] (as in arXiv 2606.22798)."""
    p, q = _normalised(p), _normalised(q)
    return np.minimum(p, q).sum(-1) / np.maximum(p, q).sum(-1)


def chance_overlap(n: int, n_experts: int) -> dict[str, float]:
    """What two independent uniform sets of n of E experts share: mean `shared`, mean `jaccard`, P(any) `any`.

    The size of the intersection is hypergeometric. For 8 of 128: 0.5 experts, 0.0343, 0.412.
    """
    shared = np.arange(n + 1)
    p = hypergeom(n_experts, n, n).pmf(shared)
    return {
        "shared": float(p @ shared),
        "jaccard": float(p @ (shared / (2 * n - shared))),
        "any": float(1 - p[0]),
    }
