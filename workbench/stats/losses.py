"""What a change costs each language, paired by item, beside what matched controls cost.

An item is compared with itself without the change. Items that share a fact are one unit: intervals and tests are over
facts and not items (arXiv 2411.00640). Tasks that exist in both languages count alike, so that neither language is
measured on an easier mix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import stdtr, stdtrit

from workbench.axes import LANGUAGES
from workbench.errors import FrameError
from workbench.stats.resampling import Floats, sign_flip_max_t, squared_error

ITEM = ("task", "item", "metric")
MEASURES = (*(f"loss_{lang}" for lang in LANGUAGES), "selectivity")
JUDGED = {
    "p_controls": pl.Float64, "p_holm": pl.Float64, "p_items": pl.Float64, "control_selectivity": pl.Float64,
    "control_low": pl.Float64, "control_high": pl.Float64, "n_controls": pl.Int64, "n_tests": pl.Int64,
}  # fmt: skip


def item_losses(items: pl.DataFrame, baseline: str = "baseline") -> pl.DataFrame:
    """`loss` of every item under every other condition: how much worse its metric is than at the baseline.

    items: one row per condition, task, item and metric, with group, lang, higher_is_better and value. Added: family
    (the task without its language), base (the value without a change), loss (positive: worse). Raises FrameError when
    a condition lacks items that the baseline has, since it would then be compared with others.
    """
    base = items.filter(pl.col("condition") == baseline).select(*ITEM, base="value")
    changed = items.filter(pl.col("condition") != baseline).join(base, on=ITEM, how="left", nulls_equal=True)
    sizes = changed.group_by("condition").len()
    if base.is_empty() or changed["base"].null_count() or (sizes["len"] != len(base)).any():
        raise FrameError("items: expected the baseline's items under every condition, got others. Run them again.")
    sign = pl.when(pl.col("higher_is_better").fill_null(True)).then(1.0).otherwise(-1.0)
    families = {task: family_of(task) for task in changed["task"].unique()}
    family = pl.col("task").replace_strict(families, return_dtype=pl.String)
    return changed.with_columns(family=family, loss=sign * (pl.col("base") - pl.col("value")))


def family_of(task: str) -> str:
    """The task's name without the part that names its language."""
    parts = re.split(r"([_-])", task)
    kept = [part for part in parts if part not in (*LANGUAGES, "japanese")]
    return re.sub(r"[_-]+", "_", "".join(kept)).strip("_")


def choose_metric(items: pl.DataFrame, wanted: str | None = None) -> str:
    """The metric to judge by: `wanted`, else the graded "logprob" where there is one, else the most frequent."""
    counts = items["metric"].value_counts(sort=True)
    known = counts["metric"].to_list()
    if wanted is not None and wanted not in known:
        raise FrameError(f"metric: expected one of {', '.join(known)}, got {wanted!r}.")
    if not known:
        raise FrameError("items: expected a metric with a value per item, got none. Choose other tasks.")
    return wanted or ("logprob" if "logprob" in known else str(known[0]))


def language_losses(losses: pl.DataFrame, metric: str) -> pl.DataFrame:
    """One row per condition: what it costs Japanese, English, and the one more than the other.

    losses: from `item_losses`. loss_ja, loss_en: means over items, then over families that both languages have;
    selectivity = loss_ja - loss_en, in the metric's unit (items paired and clustered as in arXiv 2411.00640). Each with
    its 95% interval _low, _high: jackknife over groups, Student's t with the degrees of freedom that the error has
    (`resampling.half_width`). p_selectivity: of no difference, two-sided, from the same t, so that it is at most 0.05
    where the interval leaves out 0 and nowhere else; not adjusted for the number of conditions. With one language alone
    the other's columns and selectivity are null, as are intervals that rest on one group. n_items_ja, n_items_en,
    n_groups: what was counted.
    """
    cube = _cube(losses, metric)
    if not cube.conditions:
        return pl.DataFrame(schema={"condition": pl.String})
    columns: dict[str, Sequence[object] | Floats] = {"condition": cube.conditions}
    for name, (value, around, p) in zip(MEASURES, _jackknife(cube), strict=True):
        columns |= {name: value, f"{name}_low": value - around, f"{name}_high": value + around}
        columns |= {"p_selectivity": p} if name == "selectivity" else {}
    for lang in LANGUAGES:
        columns[f"n_items_{lang}"] = [int(cube.counts[cube.langs == lang].sum())] * len(cube.conditions)
    columns["n_groups"] = [cube.n_groups] * len(cube.conditions)
    return pl.DataFrame(columns).with_columns(pl.col(pl.Float64).fill_nan(None))


def judge(
    losses: pl.DataFrame,
    summary: pl.DataFrame,
    controls: dict[str, list[str]],
    metric: str,
    seed: int = 0,
    n_flips: int = 5000,
) -> pl.DataFrame:
    """The rows of `language_losses` that have controls, with what the controls say.

    controls: by condition, the conditions that are its matched controls. control_selectivity: their mean, control_low,
    control_high: the smallest and largest. p_controls: how often a control is as far from the mean of all, the target
    included, as the target is, itself counted (never below 1 / (1 + n_controls)). p_holm: adjusted by Holm's method
    for all `n_tests` targets. p_items: whether the target costs the languages differently at all, adjusted for all
    targets: sign flips of the groups' pseudo-values, max-T (Westfall & Young 1993), and never below p_selectivity, so
    that a target with a p_items of at most 0.05 has an interval of selectivity without 0. A target is selective when
    both say so; p_items alone only says that the languages differ, not that this target is special. Nulls: a target is
    one more control; it costs both languages alike.
    """
    targets = [name for name in summary["condition"] if name in controls]
    values = dict(zip(summary["condition"], summary["selectivity"], strict=True))
    rows = [_against(values[name], [values[control] for control in controls[name]]) for name in targets]
    found = pl.DataFrame(rows, schema={name: JUDGED[name] for name in rows[0]} if rows else {})
    if not rows:
        return summary.clear().with_columns(**{name: pl.lit(None, kind) for name, kind in JUDGED.items()})
    kept = summary.filter(pl.col("condition").is_in(targets))
    extra: dict[str, pl.Series | pl.Expr] = {
        "p_holm": pl.Series(holm(found["p_controls"].to_numpy()), dtype=pl.Float64),
        "p_items": pl.Series(_items_p(losses, metric, targets, seed, n_flips), dtype=pl.Float64),
        "n_tests": pl.lit(len(targets), dtype=pl.Int64),
    }
    return kept.hstack(found).with_columns(**extra).with_columns(pl.col("p_holm", "p_items").fill_nan(None))


def carries(judged: pl.DataFrame, alpha: float = 0.05) -> pl.Series:
    """Which language each target carries: "ja", "en", or "none" where the tests do not say so.

    It costs that language something (interval above 0), more than the other (p_items), and more so than its matched
    controls (p_holm), each at `alpha`.
    """
    certain = (pl.col("p_holm") <= alpha) & (pl.col("p_items") <= alpha)
    ja = certain & (pl.col("selectivity") > pl.col("control_selectivity")) & (pl.col("loss_ja_low") > 0)
    en = certain & (pl.col("selectivity") < pl.col("control_selectivity")) & (pl.col("loss_en_low") > 0)
    more_ja, more_en = pl.col("selectivity") > 0, pl.col("selectivity") < 0
    verdict = pl.when(ja & more_ja).then(pl.lit("ja")).when(en & more_en).then(pl.lit("en")).otherwise(pl.lit("none"))
    return judged.select(carries=verdict)["carries"]


def holm(p_values: Floats) -> Floats:
    """Holm's step-down adjustment (1979): at most `alpha` of a false one among all; NaN stays and counts as no test."""
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(np.where(np.isnan(p_values), np.inf, p_values), kind="stable")
    n_tests, running = int((~np.isnan(p_values)).sum()), 0.0
    for rank, place in enumerate(order[:n_tests]):
        running = max(running, (n_tests - rank) * p_values[place])
        adjusted[place] = min(running, 1.0)
    return adjusted


def _against(own: float | None, controls: Sequence[float | None]) -> dict[str, object]:
    others = np.array([value for value in controls if value is not None], dtype=np.float64)
    if own is None or not len(others):
        unknown = ("control_selectivity", "control_low", "control_high", "p_controls")
        return {**{name: None for name in unknown}, "n_controls": 0}
    centre = np.append(others, own).mean()
    reached = np.abs(others - centre) >= abs(own - centre) * (1 - 1e-9)
    return {
        "control_selectivity": float(others.mean()),
        "control_low": float(others.min()),
        "control_high": float(others.max()),
        "p_controls": (1 + int(reached.sum())) / (1 + len(others)),
        "n_controls": len(others),
    }


@dataclass(frozen=True)
class _Cube:
    """Sums of losses [condition cell group] and numbers of items [cell group]; a cell is a family in one language."""

    conditions: list[str]
    sums: Floats
    counts: Floats
    langs: np.ndarray

    @property
    def n_groups(self) -> int:
        return self.counts.shape[1]


def _cube(losses: pl.DataFrame, metric: str) -> _Cube:
    kept = losses.filter(pl.col("metric") == metric, pl.col("lang").is_in(LANGUAGES))
    shared = kept.group_by("family").agg(pl.col("lang").n_unique()).filter(pl.col("lang") == len(LANGUAGES))
    if not shared.is_empty():
        kept = kept.filter(pl.col("family").is_in(shared["family"].to_list()))
    conditions = kept["condition"].unique(maintain_order=True).to_list()
    cells = kept.select("family", "lang").unique(maintain_order=True).sort("family", "lang").with_row_index("cell")
    groups = kept.select("group").unique(maintain_order=True).sort("group").with_row_index("place")
    names = pl.DataFrame({"condition": conditions}, schema={"condition": pl.String}).with_row_index("row")
    placed = kept.join(cells, on=["family", "lang"]).join(groups, on="group").join(names, on="condition")
    shape = (len(conditions), len(cells), len(groups))
    flat = np.ravel_multi_index([placed[name].to_numpy() for name in ("row", "cell", "place")], shape)
    sums = np.bincount(flat, placed["loss"].to_numpy(), minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)
    counts = np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)
    first = counts[0] if len(conditions) else np.zeros(shape[1:])
    return _Cube(conditions, sums, first.astype(np.float64), cells["lang"].to_numpy())


def _jackknife(cube: _Cube) -> list[tuple[Floats, Floats, Floats]]:
    """(value, half width of the 95% interval, two-sided p of 0) of each of MEASURES, [condition] each."""
    values = _measures(cube, cube.sums.sum(-1), cube.counts.sum(-1))
    found = []
    for value, pseudo in zip(values, _pseudo_values(cube), strict=True):
        error, freedom = squared_error(pseudo) if cube.n_groups > 1 else np.full((2, len(value)), np.nan)
        spread = np.sqrt(error)
        t = np.divide(np.abs(value), spread, out=np.where(value == 0, 0.0, np.inf), where=spread > 0)
        known = np.isfinite(value) & np.isfinite(spread)
        p = np.where(known, 2 * stdtr(freedom, -t), np.nan)
        found.append((value, np.where(known, stdtrit(freedom, 0.975) * spread, np.nan), p))
    return found


def _pseudo_values(cube: _Cube) -> Floats:
    """[measure group condition]; NaN where a measure needs the group that is left out."""
    sums, counts = cube.sums.sum(-1), cube.counts.sum(-1)
    without = [
        _measures(cube, sums - cube.sums[..., group], counts - cube.counts[:, group]) for group in range(cube.n_groups)
    ]
    whole, n = _measures(cube, sums, counts), cube.n_groups
    return n * whole[:, None] - (n - 1) * np.stack(without, axis=1)


def _measures(cube: _Cube, sums: Floats, counts: Floats) -> Floats:  # [condition cell], [cell] -> [measure condition]
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    sides = [_nanmean(means[:, cube.langs == lang]) for lang in LANGUAGES]
    return np.stack([*sides, sides[0] - sides[1]])


def _nanmean(values: Floats) -> Floats:  # over the last axis, NaN where there is nothing
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(-1)
    return np.divide(total, known.sum(-1), out=np.full(total.shape, np.nan), where=known.any(-1))


def _items_p(losses: pl.DataFrame, metric: str, targets: Sequence[str], seed: int, n_flips: int) -> Floats:  # [target]
    """Family-wise adjusted p of a difference between the languages, never below the p of the interval."""
    cube = _cube(losses.filter(pl.col("condition").is_in(list(targets))), metric)
    if not cube.conditions:
        return np.full(len(targets), np.nan)
    own = _jackknife(cube)[-1][2]
    known = np.isfinite(own)
    adjusted = np.full(len(own), np.nan)
    if known.any():
        adjusted[known] = sign_flip_max_t(_pseudo_values(cube)[-1][:, known], n_flips, seed)[1]
    by_name = dict(zip(cube.conditions, np.maximum(adjusted, own), strict=True))
    return np.array([by_name.get(name, np.nan) for name in targets])
