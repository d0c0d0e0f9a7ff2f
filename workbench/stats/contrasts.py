"""Which experts do two conditions use differently? Selection frequencies and centred router logits side by side.

The unit is the prompt group, whose Japanese and English versions say the same thing. Each group weighs the same however
many tokens it has, so a language that needs more tokens for the same content gains no weight by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.axes import LANGUAGES
from workbench.stats.load import frequency_cube, n_tokens_of, unit_cube
from workbench.stats.resampling import Floats, sign_flip_max_t, t_interval


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
    the experts of a layer, so one expert's gain forces losses elsewhere. low, high: 95%, Student's t over units.
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
            "n_tokens": np.full(n_tests, n_tokens_of(counts, groups, axis, values, unit)),
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
    the model's own number of experts and k (`workbench calibrate`), never copied from another shape. Null and interval
    are those of the contrasts.
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
    low, high = t_interval(differences)
    t, p_adjusted = sign_flip_max_t(differences, n_resamples, seed)
    return differences, {"low": low, "high": high, "t": t, "p_adjusted": p_adjusted}


def logit_differences(
    cells: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int, unit: str = "group_id"
) -> tuple[Floats, Floats]:
    """Centred router logits of `logits.logit_cells`, first condition less second [unit layer expert], and their
    standard deviation over the tokens of both [layer expert]."""
    cube, squares = (
        unit_cube(cells, axis, values, n_experts, pl.col(name), unit)[2] for name in ("logit", "logit_square")
    )
    return cube[0] - cube[1], np.sqrt(np.maximum(_mean(squares.mean(0)) - _mean(cube.mean(0)) ** 2, 1e-12))


def _logit_contrasts(
    cells: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int, n_resamples: int, seed: int, unit: str
) -> pl.DataFrame:
    _, layers, cube = unit_cube(cells, axis, values, n_experts, pl.col("logit"), unit)
    differences, interval = _paired(cube, n_resamples, seed)
    spread = logit_differences(cells, axis, values, n_experts, unit)[1].ravel()
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
