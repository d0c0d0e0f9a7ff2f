"""Do two languages use different experts? Divergence against a within-language floor, and the experts behind it.

The unit is the prompt group, whose Japanese and English versions say the same thing. Each group weighs the same however
many tokens it has, so a language that needs more tokens for the same content gains no weight by it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from workbench.axes import LANGUAGES
from workbench.stats.load import frequency_cube
from workbench.stats.resampling import Floats, bootstrap_mean, jackknife_interval, sign_flip_max_t

DIVERGENCE_COLUMNS = tuple(
    f"{name}{suffix}" for name in ("between", "floor", "excess") for suffix in ("", "_low", "_high")
)


def js_divergence(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence in bits over the last axis, in [0, 1] (Lin 1991, doi 10.1109/18.61115).

    JSD = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2. Both are normalised to sum to 1 first.
    """
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    middle = (p + q) / 2
    return np.maximum(_entropy_bits(middle) - (_entropy_bits(p) + _entropy_bits(q)) / 2, 0)


def _entropy_bits(p: Floats) -> Floats:
    return -(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(-1)


def language_divergence(counts: pl.DataFrame, n_experts: int, n_splits: int = 40, seed: int = 0) -> pl.DataFrame:
    """JA/EN divergence of expert use per layer beside what chance and content alone give: one row per layer.

    Columns: layer, between, floor and excess in bits, each with _low and _high (95%), n_groups. The groups are split at
    random into halves A and B; `between` = mean JSD(JA of A, EN of B) and JSD(JA of B, EN of A); `floor` = mean
    JSD(JA of A, JA of B) and JSD(EN of A, EN of B). Both compare n/2 groups with n/2 other groups, so sampling noise
    and difference of content enter both alike and cancel in `excess` = between - floor, all averaged over `n_splits`.
    Intervals: jackknife over groups. Null: excess 0, language makes no difference beyond different content.
    Measure: routing divergence of Bandarkar et al., arXiv 2510.04694, on load instead of router probabilities; the
    floor is this project's. Fewer than 4 paired groups give NaN.
    """
    groups, layers, frequency = frequency_cube(counts, "lang", LANGUAGES, n_experts)
    n_groups, n_layers = len(groups), len(layers)
    if n_groups < 4:
        values = np.full((len(DIVERGENCE_COLUMNS), n_layers), np.nan)
    else:
        divergences = _split_divergence(frequency, _random_halves(n_groups, n_splits, seed))
        estimate, low, high = jackknife_interval(divergences, n_groups)
        values = np.stack((estimate, low, high), axis=1).reshape(-1, n_layers)
    columns = dict(zip(DIVERGENCE_COLUMNS, values, strict=True))
    return pl.DataFrame({"layer": layers, **columns, "n_groups": np.full(n_layers, n_groups)})


def _random_halves(n_groups: int, n_splits: int, seed: int) -> Floats:
    """[half split group], 1 where a group is in a half; with an odd number half B has one group more."""
    ranks = np.random.default_rng(seed).random((n_splits, n_groups)).argsort(1)
    in_a = ranks < n_groups // 2
    return np.stack((in_a, ~in_a)).astype(np.float64)


def _split_divergence(frequency: Floats, halves: Floats) -> Callable[[int | None], Floats]:
    """A function of the group to leave out, giving (between, floor, excess) per layer over all splits: [3 layer]."""
    sums = np.tensordot(halves, frequency, axes=(2, 1)).transpose(2, 0, 1, 3, 4)  # [lang half split layer expert]

    def divergences(left_out: int | None) -> Floats:
        kept = sums
        if left_out is not None:
            taken = halves[:, :, left_out, None, None] * frequency[:, None, None, left_out]
            kept = np.maximum(sums - taken, 0)  # below 0 by rounding only
        (ja_a, ja_b), (en_a, en_b) = kept  # sums do for means: js_divergence normalises
        between = (js_divergence(ja_a, en_b) + js_divergence(ja_b, en_a)).mean(0) / 2
        floor = (js_divergence(ja_a, ja_b) + js_divergence(en_a, en_b)).mean(0) / 2
        return np.stack((between, floor, between - floor))

    return divergences


def language_contrasts(counts: pl.DataFrame, n_experts: int, n_resamples: int = 2000, seed: int = 0) -> pl.DataFrame:
    """Which experts Japanese and English text use differently: one row per (layer, expert), largest |RD| first.

    risk_difference = mean over groups of f_JA - f_EN, f being the share of a group's tokens that chose the expert
    (SteerMoE, arXiv 2509.09660, made paired, with the group as the unit). It lies in [-1, 1] and sums to 0 over
    the experts of a layer, so one expert's gain forces losses elsewhere. low, high: 95% bootstrap over groups.
    t, p_adjusted: sign flips over groups, max-T over every layer and expert. Null: swapping the languages of a group
    changes nothing. Other columns: f_ja, f_en, n_groups, n_tests.
    """
    groups, layers, frequency = frequency_cube(counts, "lang", LANGUAGES, n_experts)
    n_tests = len(layers) * n_experts
    if not groups:
        frequency = np.full((2, 1, len(layers), n_experts), np.nan)
    differences = (frequency[0] - frequency[1]).reshape(-1, n_tests)
    low, high = bootstrap_mean(differences, n_resamples, seed)
    t, p_adjusted = sign_flip_max_t(differences, n_resamples, seed)
    frame = pl.DataFrame(
        {
            "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
            "expert": np.tile(np.arange(n_experts), len(layers)),
            "f_ja": frequency[0].mean(0).ravel(),
            "f_en": frequency[1].mean(0).ravel(),
            "risk_difference": differences.mean(0),
            "low": low,
            "high": high,
            "t": t,
            "p_adjusted": p_adjusted,
            "n_groups": np.full(n_tests, len(groups)),
            "n_tests": np.full(n_tests, n_tests),
        }
    )
    return frame.sort(pl.col("risk_difference").abs(), descending=True, maintain_order=True)
