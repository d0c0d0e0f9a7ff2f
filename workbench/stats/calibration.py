"""How good the pipeline is, on models whose answer is known: accuracy, family-wise error, coverage, effect floors.

Everything here reads a `trials` frame: many trials below each other, one row per trial, layer and expert, with columns
contrast, kind, strength, model, n_groups, draw, layer, expert, role, truth, sign, uses, and what the pipeline said
(risk_difference, low, high, p_adjusted, logit_difference, logit_d, logit_low, logit_high, logit_p_adjusted). The unit
is the trial. No torch: `workbench.planted.trials` makes such frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from scipy.stats import beta

from workbench.errors import ConfigError
from workbench.stats.contrasts import flag_experts

TRIAL = ("contrast", "kind", "strength", "model", "n_groups", "draw")
CELL = ("contrast", "strength", "n_groups")
RISK_GRID = (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
LOGIT_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
ALPHA = 0.05
MIN_USES = 0.5

# (risk_difference, logit_d) by (experts, k): chosen by `choose_floors` on half of the trials of `workbench calibrate`,
# see docs/calibration.md for what they give on the other half. They do not carry over to another shape.
FLOORS: dict[tuple[int, int], tuple[float, float]] = {(32, 4): (0.0, 0.8), (128, 8): (0.0, 0.8)}


def effect_floors(n_experts: int, k: int) -> tuple[float, float]:
    """The smallest |risk difference| and |logit d| worth a claim, for a model of this shape.

    Raises ConfigError for a shape that was never calibrated: floors do not carry over.
    """
    if (n_experts, k) not in FLOORS:
        known = ", ".join(f"{e} experts with k={n}" for e, n in FLOORS)
        raise ConfigError(
            f"effect floors: expected a calibrated shape ({known}), got {n_experts} experts with k={k}. "
            f"Run workbench calibrate --experts {n_experts} --k {k}."
        )
    return FLOORS[n_experts, k]


def accuracy(
    trials: pl.DataFrame, risk_floor: float = 0.0, logit_floor: float | None = None, n_resamples: int = 1000
) -> pl.DataFrame:
    """Precision and recall of flagging: one row per contrast, strength and number of groups.

    Columns: *CELL, n_trials, n_true and n_flagged (mean per trial), precision and recall with 95% bootstrap intervals
    over trials (_low, _high), wrong (roles flagged in error, most frequent first). Counts are pooled over trials before
    dividing. A flag counts as right only with the planted sign. precision is NaN where nothing was flagged.
    """
    rows = []
    for key, part in _flagged(trials, risk_floor, logit_floor).sort(*TRIAL).group_by(CELL, maintain_order=True):
        counts = part.group_by(TRIAL, maintain_order=True).agg(
            right=pl.col("right").sum(), flagged=pl.col("flagged").sum(), true=pl.col("truth").sum()
        )
        right, flagged, true = (counts[name].to_numpy().astype(float) for name in ("right", "flagged", "true"))
        weights = _trial_draws(len(counts), n_resamples)
        row = {**dict(zip(CELL, key, strict=True)), "n_trials": len(counts)}
        row |= {"n_true": true.mean(), "n_flagged": flagged.mean()}
        row |= _ratio("precision", right, flagged, weights) | _ratio("recall", right, true, weights)
        wrong = part.filter(pl.col("flagged") & ~pl.col("right"))["role"].value_counts(sort=True)
        row["wrong"] = ", ".join(f"{role} {n}" for role, n in wrong.rows())
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def average_precision(trials: pl.DataFrame) -> pl.DataFrame:
    """Ranking without a threshold: columns *CELL, score, average_precision (mean over trials), n_trials.

    score is risk_difference or logit_d, by absolute value. 1: every planted expert ranks above every other. Trials
    without a planted expert are left out.
    """
    rows = []
    for key, part in trials.group_by(TRIAL, maintain_order=True):
        truth = part["truth"].to_numpy()
        if truth.any():
            for score in ("risk_difference", "logit_d"):
                value = _average_precision(np.abs(part[score].to_numpy()), truth)
                rows.append((*(key[TRIAL.index(name)] for name in CELL), score, value))
    frame = pl.DataFrame(rows, schema=[*CELL, "score", "average_precision"], orient="row")
    means = {"average_precision": pl.col("average_precision").mean(), "n_trials": pl.len()}
    return frame.group_by(*CELL, "score").agg(**means).sort(*CELL, "score")


def family_wise_error(
    trials: pl.DataFrame, risk_floor: float = 0.0, logit_floor: float | None = None, alpha: float = ALPHA
) -> pl.DataFrame:
    """How often a family of tests without any effect yields one: columns test, n_trials, n_errors, rate, low, high.

    test: "risk_difference" and "logit" (any adjusted p at most alpha), "flagged" (with floors). low, high: exact 95%
    binomial interval (Clopper & Pearson 1934). Only trials of contrast "null" are read.
    """
    null = _flagged(trials.filter(pl.col("contrast") == "null"), risk_floor, logit_floor)
    by_trial = null.group_by(TRIAL).agg(
        risk_difference=(pl.col("p_adjusted") <= alpha).any(),
        logit=(pl.col("logit_p_adjusted") <= alpha).any(),
        flagged=pl.col("flagged").any(),
    )
    rows = []
    for test in ("risk_difference", "logit", "flagged"):
        n, errors = len(by_trial), int(by_trial[test].sum())
        rows.append((test, n, errors, errors / max(n, 1), *binomial_interval(errors, n)))
    return pl.DataFrame(rows, schema=["test", "n_trials", "n_errors", "rate", "low", "high"], orient="row")


def coverage(trials: pl.DataFrame, n_resamples: int = 1000) -> pl.DataFrame:
    """Do 95% intervals hold the true effect 95% of the time? One row per contrast, strength, groups and statistic.

    Columns: *CELL, statistic, experts, n_trials, n_intervals, coverage with its 95% bootstrap interval over trials. The
    true effect of a "null" is 0; that of anything else is the mean over the other trials with the same model, so cells
    need many draws of one model, and those with fewer than 20 are left out. experts: "used" by at least MIN_USES tokens
    of a group on average, or "rare": few groups use such an expert at all, and no interval from a few dozen groups
    holds for it. Intervals of width 0 (an expert that no document used) are not counted.
    """
    rows = []
    uses = pl.col("uses").mean().over(*CELL, "kind", "model", "layer", "expert")
    split = trials.with_columns(experts=pl.when(uses >= MIN_USES).then(pl.lit("used")).otherwise(pl.lit("rare")))
    for key, part in split.group_by(*CELL, "experts", maintain_order=True):
        for statistic, low, high in (
            ("risk_difference", "low", "high"),
            ("logit_difference", "logit_low", "logit_high"),
        ):
            by_trial = _covered(part, statistic, low, high)
            if len(by_trial) >= 20:
                weights = _trial_draws(len(by_trial), n_resamples)
                hits, n = by_trial["hits"].to_numpy().astype(float), by_trial["n"].to_numpy().astype(float)
                counts = {"n_trials": len(by_trial), "n_intervals": int(n.sum())}
                labels = dict(zip((*CELL, "experts"), key, strict=True))
                row = {**labels, "statistic": statistic, **counts}
                rows.append(row | _ratio("coverage", hits, n, weights))
    return pl.DataFrame(rows, infer_schema_length=None).sort(*CELL, "statistic", "experts") if rows else pl.DataFrame()


def floor_curve(trials: pl.DataFrame, alpha: float = ALPHA) -> pl.DataFrame:
    """Precision and recall of every pair of floors: columns *CELL, risk_floor, logit_floor, precision, recall."""
    sign = pl.col("risk_difference").sign()
    certain = trials.with_columns(
        sure=(pl.col("p_adjusted") <= alpha) & (pl.col("logit_p_adjusted") <= alpha),
        risk=pl.col("risk_difference").abs(),
        logit=pl.col("logit_d") * sign,
        right=pl.col("truth") & (sign == pl.col("sign")),
    )
    grid = []
    for risk_floor in RISK_GRID:
        for logit_floor in LOGIT_GRID:
            flag = pl.col("sure") & (pl.col("risk") >= risk_floor) & (pl.col("logit") >= logit_floor)
            found = certain.group_by(CELL).agg(
                right=(flag & pl.col("right")).sum(), flagged=flag.sum(), true=pl.col("truth").sum()
            )
            grid.append(found.with_columns(risk_floor=pl.lit(risk_floor), logit_floor=pl.lit(logit_floor)))
    ratios = {name: pl.col("right") / pl.col(over) for name, over in (("precision", "flagged"), ("recall", "true"))}
    return pl.concat(grid).select(*CELL, "risk_floor", "logit_floor", **ratios).sort(*CELL, "risk_floor", "logit_floor")


def choose_floors(
    trials: pl.DataFrame, contrasts: Sequence[str] = ("shared", "mode", "effort"), precision: float = 0.95
) -> tuple[float, float]:
    """The pair of floors with the best recall among those whose precision is at least `precision` in every cell.

    A stronger effect displaces more experts that have none, so the worst cell decides. Ties go to the lower floors.
    If no pair of the grid is precise enough, the one whose worst cell is best.
    """
    curve = floor_curve(trials.filter(pl.col("contrast").is_in(list(contrasts)), pl.col("strength") > 0))
    pairs = (
        curve.group_by("risk_floor", "logit_floor")
        .agg(worst=pl.col("precision").fill_nan(None).min(), recall=pl.col("recall").mean())
        .with_columns(enough=pl.min_horizontal("worst", pl.lit(precision)))
        .sort("enough", "recall", "risk_floor", "logit_floor", descending=[True, True, False, False])
    )
    best = pairs.row(0, named=True)
    return best["risk_floor"], best["logit_floor"]


def binomial_interval(n_hits: int, n: int) -> tuple[float, float]:
    """Exact 95% interval of a share (Clopper & Pearson 1934); (0, 1) for n = 0."""
    low = beta.ppf(0.025, n_hits, n - n_hits + 1) if n_hits else 0.0
    high = beta.ppf(0.975, n_hits + 1, n - n_hits) if n_hits < n else 1.0
    return float(low), float(high)


def _flagged(trials: pl.DataFrame, risk_floor: float, logit_floor: float | None) -> pl.DataFrame:
    flagged = flag_experts(trials, risk_floor, logit_floor)
    return flagged.with_columns(right=pl.col("flagged") & pl.col("truth") & (pl.col("side") == pl.col("sign")))


def _covered(part: pl.DataFrame, statistic: str, low: str, high: str) -> pl.DataFrame:
    """One row per trial: hits and n, the intervals that hold the true effect and those counted."""
    place = ["kind", "model", "layer", "expert"]
    others = (pl.col(statistic).sum() - pl.col(statistic)) / (pl.len() - 1)
    true = pl.when(pl.col("contrast") == "null").then(0.0).otherwise(others.over(place))
    enough = (pl.col("contrast") == "null") | (pl.len().over(place) >= 20)
    kept = part.with_columns(true=true, enough=enough).filter("enough", pl.col(high) - pl.col(low) > 1e-9)
    held = (pl.col(low) <= pl.col("true")) & (pl.col("true") <= pl.col(high))
    return kept.group_by(TRIAL).agg(hits=held.sum(), n=pl.len()).sort(TRIAL)


def _average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    hits = truth[np.argsort(-score, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def _trial_draws(n: int, n_resamples: int) -> np.ndarray:  # [resample trial], how often each trial is drawn
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(float)


def _ratio(name: str, over: np.ndarray, under: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    total = under.sum()
    if not total:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    below = weights @ under
    draws = np.divide(weights @ over, below, out=np.full(len(weights), np.nan), where=below > 0)
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return {name: float(over.sum() / total), f"{name}_low": float(low), f"{name}_high": float(high)}
