"""Do two languages use different experts? Divergence against a within-language floor, and the experts behind it.

The unit is the prompt group, whose Japanese and English versions say the same thing. Each group weighs the same however
many tokens it has, so a language that needs more tokens for the same content gains no weight by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from workbench.axes import LANGUAGES
from workbench.stats.load import frequency_cube, unit_cube
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
    """`paired_contrasts` of Japanese and English: columns f_ja, f_en, and so on."""
    return paired_contrasts(counts, "lang", LANGUAGES, n_experts, n_resamples=n_resamples, seed=seed)


def paired_contrasts(
    counts: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    logits: pl.DataFrame | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Which experts two conditions use differently: one row per (layer, expert), largest |risk difference| first.

    counts: from `load.slot_counts(..., by=[unit, axis])`, of all tokens or of those of `matching.match_tokens`;
    values: the two conditions, first minus second.

    risk_difference = mean over units of f_first - f_second, f being the share of a unit's tokens that chose the expert
    (SteerMoE, arXiv 2509.09660, made paired, with the group as the unit). It lies in [-1, 1] and sums to 0 over
    the experts of a layer, so one expert's gain forces losses elsewhere. low, high: 95% bootstrap over units.
    t, p_adjusted: sign flips over units, max-T over every layer and expert. Null: swapping the conditions of a unit
    changes nothing. Other columns: f_<value> for both, n_groups, n_tokens (in both conditions), n_tests.

    With `logits` (`logits.logit_cells` of the same tokens and `by`), the same for centred router logits, which do not
    sum to anything: logit_difference, logit_low, logit_high in logits, logit_d (divided by the standard deviation over
    tokens), logit_t, logit_p_adjusted.
    """
    groups, layers, frequency = frequency_cube(counts, axis, values, n_experts, unit)
    difference, interval = _paired(frequency, n_resamples, seed)
    n_tests = len(layers) * n_experts
    frame = pl.DataFrame(
        {
            "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
            "expert": np.tile(np.arange(n_experts), len(layers)),
            **{f"f_{value}": _mean(frequency[place]).ravel() for place, value in enumerate(values)},
            "risk_difference": _mean(difference),
            **interval,
            "n_groups": np.full(n_tests, len(groups)),
            "n_tokens": np.full(n_tests, _n_tokens(counts, groups, axis, values, unit)),
            "n_tests": np.full(n_tests, n_tests),
        }
    )
    if logits is not None:
        frame = frame.join(
            _logit_contrasts(logits, axis, values, n_experts, n_resamples, seed, unit), on=["layer", "expert"]
        )
    return frame.sort(pl.col("risk_difference").abs(), descending=True, maintain_order=True)


def flag_experts(
    contrasts: pl.DataFrame, risk_floor: float, logit_floor: float | None = None, alpha: float = 0.05
) -> pl.DataFrame:
    """The contrasts with columns flagged and side (+1, -1 or 0): certain, and large enough to matter.

    flagged: p_adjusted <= alpha and |risk_difference| >= risk_floor; with `logit_floor` also logit_p_adjusted <= alpha,
    |logit_d| >= logit_floor and the same sign. Floors have no natural size: they are calibrated on planted models of
    the model's own number of experts and k (`workbench calibrate`), never copied from another shape.
    """
    sign = pl.col("risk_difference").sign()
    flagged = (pl.col("p_adjusted") <= alpha) & (pl.col("risk_difference").abs() >= risk_floor)
    if logit_floor is not None:
        agrees = (pl.col("logit_d") * sign) >= logit_floor
        flagged = flagged & (pl.col("logit_p_adjusted") <= alpha) & agrees
    flagged = flagged.fill_null(False)  # NaN compares as larger than any alpha
    return contrasts.with_columns(flagged=flagged, side=pl.when(flagged).then(sign.cast(pl.Int64)).otherwise(0))


def _paired(cube: Floats, n_resamples: int, seed: int) -> tuple[Floats, dict[str, Floats]]:
    """Differences [unit test] of [2 unit layer expert], and their interval and test."""
    if not cube.shape[1]:
        cube = np.full((2, 1, *cube.shape[2:]), np.nan)
    differences = (cube[0] - cube[1]).reshape(cube.shape[1], -1)
    low, high = bootstrap_mean(differences, n_resamples, seed)
    t, p_adjusted = sign_flip_max_t(differences, n_resamples, seed)
    return differences, {"low": low, "high": high, "t": t, "p_adjusted": p_adjusted}


def _logit_contrasts(
    cells: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int, n_resamples: int, seed: int, unit: str
) -> pl.DataFrame:
    _, layers, cube = unit_cube(cells, axis, values, n_experts, pl.col("logit"), unit)
    _, _, squares = unit_cube(cells, axis, values, n_experts, pl.col("logit_square"), unit)
    differences, interval = _paired(cube, n_resamples, seed)
    spread = np.sqrt(np.maximum(_mean(squares.mean(0)) - _mean(cube.mean(0)) ** 2, 1e-12)).ravel()
    difference = _mean(differences)
    return pl.DataFrame(
        {
            "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
            "expert": np.tile(np.arange(n_experts), len(layers)),
            "logit_difference": difference,
            "logit_d": difference / spread,
            **{f"logit_{name}": numbers for name, numbers in interval.items()},
        }
    )


def _mean(values: Floats) -> Floats:
    """Mean over units; NaN, without a warning, where there are none."""
    return values.mean(0) if len(values) else np.full(values.shape[1:], np.nan)


def _n_tokens(counts: pl.DataFrame, groups: Sequence[str], axis: str, values: Sequence[str], unit: str) -> int:
    kept = counts.filter(pl.col(unit).is_in(list(groups)), pl.col(axis).is_in(list(values)))
    return int(kept.unique([unit, axis])["n_tokens"].sum())
