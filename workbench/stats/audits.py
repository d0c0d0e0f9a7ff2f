"""p values of a causal audit, corrected for the number of experts that were audited.

An audit asks of each expert whether it does more than its random controls. With 20 controls no p is below 1 / 21, so
Holm's method, whose least p is (experts / 21), can find nothing among two experts or more: `holm_audit` says so. What
20 draws do allow is a comparison of each expert with all draws of all experts: `adjust_audit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.errors import FrameError
from workbench.stats.losses import holm
from workbench.stats.resampling import Floats

PLACE = ("kind", "layer", "expert")
OUTCOMES = {"kl": "p_kl", "contrast": "p_selective"}
FLOOR = 1e-3  # of the largest effect of a row: below, one effect is as good as none


def adjust_audit(draws: pl.DataFrame, by: Sequence[str] = ("kind",)) -> pl.DataFrame:
    """Family-wise corrected p of every audited expert: one row per kind, layer and expert.

    draws: one row per kind, layer, expert and draw, draw 0 being the expert itself and 1 .. n its controls, with kl and
    contrast, the absolute difference between what the edit costs the two languages (null where only one was read).
    Columns: *PLACE, p_kl and p_selective (share of the n + 1 draws that reach the expert's own, as in the audit),
    p_kl_adjusted and p_selective_adjusted, n_controls, n_tests (rows of the same `by` that have a value), least_p =
    1 / (n_controls + 1), below which no p can be however many experts there are.

    Null: an expert is one more draw of its own controls. Effects are put on a common scale, the logarithm less its mean
    over the expert's n + 1 draws in their standard deviations, which treats the expert as it treats a control. The
    adjusted p of an expert is the sum over all experts of the share of their draws that reach its value; experts are
    taken in order of it and leave the sum once they are judged (step-down; Westfall & Wolfinger
    1997, Am. Stat. 51, 3). The sum holds whatever the draws of different experts have in common, as they do in
    one layer; it bounds the chance of a single false finding in a family of one outcome, strongly. Its price: with 20
    controls an expert needs to lie above every control of every expert, and with 99 four may lie above it. One expert
    alone keeps its plain p. Raises FrameError when an expert has no draw 0, or not as many controls as the others.
    """
    table = draws.sort(*PLACE, "draw").group_by(PLACE, maintain_order=True).agg("draw", *OUTCOMES)
    n_draws = int(table["draw"].list.len().to_numpy().max(initial=0))
    if any(found != list(range(n_draws)) for found in table["draw"].to_list()) or n_draws == 1:
        raise FrameError(
            "draws: expected draw 0, the expert, and as many controls for each, numbered from 1, got others. "
            "Keep every draw of the audit."
        )
    frames = [_adjusted(part) for part in _families(table, by)]
    sizes = {"n_controls": pl.lit(n_draws - 1), "least_p": pl.lit(1 / max(n_draws, 1))}
    return pl.concat(frames).with_columns(**sizes)


def _families(table: pl.DataFrame, by: Sequence[str]) -> list[pl.DataFrame]:
    return table.partition_by(by, maintain_order=True) if by and len(table) else [table]


def _adjusted(table: pl.DataFrame) -> pl.DataFrame:
    columns: dict[str, Floats] = {}
    n_tests = 0
    for outcome, name in OUTCOMES.items():
        lists = [np.array(values, dtype=np.float64) for values in table[outcome].to_list()]  # null as NaN
        effects = np.stack(lists) if lists else np.zeros((0, 1))  # [row draw]
        known = np.isfinite(effects).all(1)
        plain, adjusted = np.full((2, len(table)), np.nan)
        plain[known] = (effects[known] >= effects[known, :1]).mean(1)
        adjusted[known] = _step_down(_common_scale(effects[known]))
        columns |= {name: plain, f"{name}_adjusted": adjusted}
        n_tests = max(n_tests, int(known.sum()))
    numbers = {name: pl.Series(values, nan_to_null=True, dtype=pl.Float64) for name, values in columns.items()}
    return table.select(PLACE).with_columns(**numbers, n_tests=pl.lit(n_tests))


def _common_scale(effects: Floats) -> Floats:  # [row draw], effects of at least 0 -> the same in standard deviations
    largest = effects.max(1, keepdims=True, initial=0)
    logs = np.log(np.maximum(effects, FLOOR * largest), out=np.zeros_like(effects), where=largest > 0)
    spread = logs.std(1, keepdims=True)
    return np.divide(logs - logs.mean(1, keepdims=True), spread, out=np.zeros_like(logs), where=spread > 1e-12)


def _step_down(scaled: Floats) -> Floats:  # [row draw], the first being the tested one -> adjusted p [row]
    adjusted, running = np.ones(len(scaled)), 0.0
    order = np.argsort(-scaled[:, 0], kind="stable") if len(scaled) else np.zeros(0, dtype=np.int64)
    for rank, row in enumerate(order):
        reached = scaled[order[rank:]] >= scaled[row, 0] - 1e-9
        running = max(running, float(reached.mean(1).sum()))
        adjusted[row] = min(running, 1.0)
    return adjusted


def holm_audit(audit: pl.DataFrame, by: Sequence[str] = ("kind",)) -> pl.DataFrame:
    """The audit with p_kl_holm and p_selective_holm: its own p values by Holm's method (1979) within each of `by`.

    audit: `experiments.audit.audit_experts`, or any frame with p_kl, p_selective, n_controls and the columns `by`. For
    an audit whose single draws were not kept. Also n_tests (rows of the same `by`) and least_p_holm = n_tests /
    (n_controls + 1): where it is above 0.05, no expert could have been found, and that none was says nothing. Null and
    interval as in the audit; a p that is not known stays null and counts as no test.
    """
    rows = audit.with_row_index("row")
    return pl.concat([_holm(part) for part in _families(rows, by)]).sort("row").drop("row")


def _holm(part: pl.DataFrame) -> pl.DataFrame:
    names = list(OUTCOMES.values())
    known = {name: part[name].cast(pl.Float64).to_numpy() for name in names}  # null as NaN
    adjusted = {f"{name}_holm": pl.Series(holm(values), nan_to_null=True) for name, values in known.items()}
    n_tests = max(int(np.isfinite(values).sum()) for values in known.values())
    least = (n_tests / (pl.col("n_controls") + 1)).clip(upper_bound=1.0)
    return part.with_columns(**adjusted, n_tests=pl.lit(n_tests), least_p_holm=least)
