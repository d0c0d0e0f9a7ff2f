"""Does a finding hold on other groups? Discovery and validation, split-half reliability, stability of the selection.

Choosing experts and testing them on the same documents makes any result look certain; groups are therefore split by a
hash of their id before anything is looked at (`split` in the tokens frame).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from scipy.stats import rankdata

from workbench.axes import SPLITS
from workbench.errors import FrameError
from workbench.stats.contrasts import flag_experts, logit_differences, paired_contrasts
from workbench.stats.divergence import chance_overlap, random_halves
from workbench.stats.load import frequency_cube
from workbench.stats.resampling import Floats, sign_flip_max_t, t_interval


def discover_and_validate(
    counts: pl.DataFrame,
    splits: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    risk_floor: float,
    alpha: float = 0.05,
    n_resamples: int = 2000,
    seed: int = 0,
    logits: pl.DataFrame | None = None,
    logit_floor: float | None = None,
) -> pl.DataFrame:
    """Flag experts on the discovery groups, then test only these on the validation groups.

    counts: slots by [group_id, axis]; splits: columns group_id, split. One row per expert flagged on discovery (see
    `flag_experts`): layer, expert, discovery_difference, risk_difference, low, high, t, p_adjusted (validation groups;
    max-T over the flagged experts only), replicated, n_groups, n_tests. replicated: p_adjusted <= alpha and the same
    sign. low, high: 95%, Student's t over the validation groups. Null: as `paired_contrasts`, on groups that had no
    part in choosing (sample splitting, Cox 1975).

    logits (`logits.logit_cells` by [group_id, axis]) and logit_floor: floors are calibrated as a pair, so a risk_floor
    of 0 says little without them. They take part in choosing; what is tested on validation is the share.
    """
    halves = splits.select("group_id", "split").unique()
    discovery, validation = (_of_split(counts, halves, split) for split in SPLITS)
    cells = None if logits is None else _of_split(logits, halves, SPLITS[0])
    found = paired_contrasts(discovery, axis, values, n_experts, cells, n_resamples=n_resamples, seed=seed)
    flagged = flag_experts(found, risk_floor, logit_floor, alpha).filter("flagged")
    groups, layers, cube = frequency_cube(validation, axis, values, n_experts)
    place = {layer: number for number, layer in enumerate(layers)}
    chosen = [(place[layer], expert) for layer, expert in flagged.select("layer", "expert").rows() if layer in place]
    at = tuple(np.array(chosen, dtype=np.int64).reshape(-1, 2).T)
    differences = (cube[0] - cube[1])[:, *at]  # [group flagged]
    low, high = t_interval(differences)
    t, p_adjusted = sign_flip_max_t(differences, n_resamples, seed) if chosen else (np.zeros(0), np.zeros(0))
    mean = differences.mean(0) if groups else np.full(len(chosen), np.nan)
    kept = flagged.filter(pl.col("layer").is_in(layers)).select(
        "layer", "expert", discovery_difference="risk_difference"
    )
    return kept.with_columns(
        risk_difference=pl.Series(mean, dtype=pl.Float64),
        low=pl.Series(low, dtype=pl.Float64),
        high=pl.Series(high, dtype=pl.Float64),
        t=pl.Series(t, dtype=pl.Float64),
        p_adjusted=pl.Series(p_adjusted, dtype=pl.Float64),
        replicated=pl.Series(
            (p_adjusted <= alpha) & (np.sign(mean) == np.sign(kept["discovery_difference"].to_numpy()))
        ),
        n_groups=pl.lit(len(groups)),
        n_tests=pl.lit(len(chosen)),
    )


def _of_split(frame: pl.DataFrame, halves: pl.DataFrame, split: str) -> pl.DataFrame:
    return frame.join(halves.filter(pl.col("split") == split).select("group_id"), on="group_id", how="semi")


def split_half_reliability(
    counts: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    n_splits: int = 100,
    top: int = 8,
    seed: int = 0,
) -> pl.DataFrame:
    """How alike two random halves of the groups rank the experts of a layer: one row per layer.

    Columns layer, spearman (mean rank correlation of the risk differences over splits), spearman_low, spearman_high
    (2.5% and 97.5% of the splits, which overlap, so no confidence interval), reliability (Spearman-Brown: of all groups
    together), top_overlap (Jaccard of the `top` largest |RD|), chance (of that), n_groups. Null: 0, and chance.
    Spearman 1910, Brown 1910. NaN for fewer than 4 groups.
    """
    groups, layers, cube = frequency_cube(counts, axis, values, n_experts)
    differences = cube[0] - cube[1]  # [group layer expert]
    halves = random_halves(len(groups), n_splits, seed) if len(groups) >= 4 else np.full((2, 1, len(groups)), np.nan)
    first, second = (np.tensordot(half, differences, axes=1) for half in halves)  # [split layer expert]
    enough = len(groups) >= 4
    rho = _spearman(first, second) if enough else np.full(first.shape[:2], np.nan)
    size = min(top, n_experts)
    mean = rho.mean(0)
    alike = _top_jaccard(np.abs(first), np.abs(second), size).mean(0) if enough else np.full(len(layers), np.nan)
    return pl.DataFrame(
        {
            "layer": layers,
            "spearman": mean,
            "spearman_low": np.quantile(rho, 0.025, axis=0),
            "spearman_high": np.quantile(rho, 0.975, axis=0),
            "reliability": 2 * mean / (1 + mean),
            "top_overlap": alike,
            "chance": np.full(len(layers), chance_overlap(size, n_experts)["jaccard"]),
            "n_groups": np.full(len(layers), len(groups)),
        }
    )


def selection_stability(
    counts: pl.DataFrame,
    axis: str,
    values: Sequence[str],
    n_experts: int,
    risk_floor: float,
    n_resamples: int = 100,
    seed: int = 0,
    logits: pl.DataFrame | None = None,
    logit_floor: float = 0.0,
) -> pl.DataFrame:
    """In what share of half-sized subsamples of the groups each expert passes the floors: layer, expert, stability.

    Stability selection (Meinshausen & Buhlmann 2010, doi 10.1111/j.1467-9868.2010.00740.x) with the rule |mean risk
    difference| >= floor and the sign of all groups together. With `logits` (`logits.logit_cells` by [group_id, axis])
    the centred router logit must also differ by logit_floor of its standard deviations over tokens, in the same sense.
    Keep experts of at least 0.8, which is the bound on false selections; a share of subsamples of one set of groups has
    no interval of its own. Null for fewer than 2 groups. Null hypothesis: a difference around 0, whose sign alone any
    half shares half of the time. Raises FrameError for floors of 0: about any half then has the sign of the whole.
    """
    if risk_floor <= 0 and (logits is None or logit_floor <= 0):
        raise FrameError(
            f"floors: expected one above 0, got risk_floor {risk_floor:g} and logit_floor "
            f"{'without logits' if logits is None else f'{logit_floor:g}'}. Pass logits and their floor too."
        )
    groups, layers, cube = frequency_cube(counts, axis, values, n_experts)
    halves = random_halves(len(groups), n_resamples, seed)[0]
    halves = halves / np.maximum(halves.sum(1, keepdims=True), 1)
    differences = cube[0] - cube[1]  # [group layer expert]
    sign = np.sign(differences.mean(0)) if groups else np.zeros(cube.shape[2:])
    passes = np.tensordot(halves, differences, axes=1) * sign >= risk_floor  # [resample layer expert]
    if logits is not None:
        difference, spread = logit_differences(logits, axis, values, n_experts)
        if len(difference) != len(groups):
            raise FrameError(
                f"logits: expected the {len(groups)} groups of the counts, got {len(difference)}. "
                "Pass cells of the same tokens."
            )
        passes &= np.tensordot(halves, difference, axes=1) / spread * sign >= logit_floor
    passed = passes.mean(0) if len(groups) > 1 else np.full(passes.shape[1:], np.nan)
    return pl.DataFrame(
        {
            "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
            "expert": np.tile(np.arange(n_experts), len(layers)),
            "stability": pl.Series(passed.ravel(), nan_to_null=True),
            "n_groups": np.full(passed.size, len(groups)),
        }
    )


def without_each(
    counts: pl.DataFrame, labels: pl.DataFrame, axis: str, values: Sequence[str], n_experts: int, label: str = "topic"
) -> pl.DataFrame:
    """Does a difference hang on one topic? The contrast with each value of `label` left out in turn.

    counts: `load.slot_counts` by [group_id, axis]; labels: group_id and `label`, one row per group. Columns layer,
    expert, risk_difference (all groups), least (the mean over the other groups, in the direction of all, where it is
    smallest: below 0 it turns round), without (the value left out there), n_labels, n_groups. Leave-one-topic-out is a
    sensitivity analysis: it has no interval. Null: topics do not matter, so that leaving one out changes a difference
    only by its sampling error. Null values where there are fewer than two labels. Its use here is the project's.
    """
    groups, layers, cube = frequency_cube(counts, axis, values, n_experts)
    of = dict(labels.select("group_id", label).unique("group_id").rows())
    names = sorted({str(of[group]) for group in groups if of.get(group) is not None})
    differences = cube[0] - cube[1]  # [group layer expert]
    mean = differences.mean(0) if groups else np.full(cube.shape[2:], np.nan)
    least, where = np.full(mean.shape, np.nan), np.zeros(mean.shape, dtype=np.int64)
    if len(names) > 1:
        outside = [np.array([str(of.get(group)) != name for group in groups]) for name in names]
        left = np.stack([differences[keep].mean(0) * np.sign(mean) for keep in outside])  # [label layer expert]
        least, where = left.min(0), left.argmin(0)
    columns = {
        "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
        "expert": np.tile(np.arange(n_experts), len(layers)),
        "risk_difference": pl.Series(mean.ravel(), nan_to_null=True),
        "least": pl.Series(least.ravel(), nan_to_null=True),
        "without": [names[place] if len(names) > 1 else None for place in where.ravel()],
    }
    schema = {"without": pl.String}
    sizes = {"n_labels": pl.lit(len(names)), "n_groups": pl.lit(len(groups))}
    return pl.DataFrame(columns, schema_overrides=schema).with_columns(**sizes)


def equivalent_experts(contrasts: pl.DataFrame, margin: float) -> pl.DataFrame:
    """The contrasts with column `shared`: the two conditions use the expert alike to within `margin`.

    An absent difference is a claim too. Two one-sided tests (Schuirmann 1987, doi 10.1007/BF01068419) in their interval
    form; the 95% interval within +-margin makes it conservative (level 0.025). Null: |RD| >= margin.
    """
    return contrasts.with_columns(shared=(pl.col("low") > -margin) & (pl.col("high") < margin))


def _spearman(first: Floats, second: Floats) -> Floats:  # [... expert] twice -> [...]
    a, b = (rankdata(x, axis=-1) - (x.shape[-1] + 1) / 2 for x in (first, second))
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    known = np.where(np.isfinite(first + second).all(-1), 0.0, np.nan)
    return np.divide((a * b).sum(-1), scale, out=known, where=(scale > 0) & (known == 0))


def _top_jaccard(first: Floats, second: Floats, size: int) -> Floats:
    tops = [np.argsort(-x, axis=-1, kind="stable")[..., :size] for x in (first, second)]
    shared = (tops[0][..., :, None] == tops[1][..., None, :]).any(-1).sum(-1)
    return shared / (2 * size - shared)
