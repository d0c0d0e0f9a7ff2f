"""p values of a causal audit, corrected for the number of experts that were audited."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.stats.losses import holm

OUTCOMES = ("p_kl", "p_selective")


def adjust_audit(audit: pl.DataFrame, by: Sequence[str] = ("kind",)) -> pl.DataFrame:
    """The audit with p_kl_adjusted and p_selective_adjusted: its p values by Holm's method (1979) within each of `by`.

    audit: rows of one expert each with p_kl, p_selective (null where only one language was read), n_controls and the
    columns `by`. Also n_tests (rows of the same `by`) and least_p = n_tests / (n_controls + 1), at most 1: where it is
    above 0.05 no expert could have been found, and that none was says nothing. Null and interval as in the audit.

    Holm's method holds whatever the tests have in common, and experts of a layer share their controls. Methods that
    take thresholds from the draws of all experts at once gain power and do not hold then: a control that two experts
    share is seen to be one, so that an expert and its controls are no longer alike (four audited experts that were like
    any other were found in 10% of simulated audits instead of 5%).
    """
    rows = audit.with_row_index("row")
    parts = rows.partition_by(by, maintain_order=True) if by and len(rows) else [rows]
    return pl.concat([_adjusted(part) for part in parts]).sort("row").drop("row")


def _adjusted(part: pl.DataFrame) -> pl.DataFrame:
    known = {name: part[name].cast(pl.Float64).to_numpy() for name in OUTCOMES}  # null as NaN
    adjusted = {
        f"{name}_adjusted": pl.Series(holm(values), nan_to_null=True, dtype=pl.Float64)
        for name, values in known.items()
    }
    n_tests = max(int(np.isfinite(values).sum()) for values in known.values())
    least = (n_tests / (pl.col("n_controls") + 1)).clip(upper_bound=1.0)
    return part.with_columns(**adjusted, n_tests=pl.lit(n_tests, pl.Int64), least_p=least)
