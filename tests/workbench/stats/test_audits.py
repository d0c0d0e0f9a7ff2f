"""Corrected p values of an audit, by Holm's method within a kind of intervention."""

from __future__ import annotations

import polars as pl
import pytest

from workbench.stats.audits import adjust_audit


def test_holm_by_hand_within_each_kind() -> None:
    audit = pl.DataFrame(
        {"kind": ["a", "b", "a", "a"], "p_kl": [0.01, 0.04, 0.03, None], "p_selective": [None] * 4, "n_controls": 99},
        schema_overrides={"p_selective": pl.Float64},
    )
    found = adjust_audit(audit)
    assert found["kind"].to_list() == ["a", "b", "a", "a"]
    assert found["p_kl_adjusted"].to_list() == [pytest.approx(0.02), pytest.approx(0.04), pytest.approx(0.03), None]
    assert found["p_selective_adjusted"].null_count() == 4
    assert found["n_tests"].to_list() == [2, 1, 2, 2]
    assert found["least_p"].to_list() == pytest.approx([0.02, 0.01, 0.02, 0.02])
    together = adjust_audit(audit, by=())
    assert together["p_kl_adjusted"].to_list() == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06), None]


def test_with_few_controls_several_experts_cannot_be_judged_and_it_is_said() -> None:
    audit = pl.DataFrame({"kind": ["reroute"] * 32, "p_kl": [1 / 21] * 32, "p_selective": [0.5] * 32, "n_controls": 20})
    found = adjust_audit(audit)
    assert found["p_kl_adjusted"].to_list() == [1.0] * 32
    assert found["least_p"].to_list() == [1.0] * 32


def test_no_rows_stay_no_rows() -> None:
    names = {"kind": pl.String, "p_kl": pl.Float64, "p_selective": pl.Float64, "n_controls": pl.Int64}
    found = adjust_audit(pl.DataFrame(schema=names))
    assert found.is_empty()
    assert {"p_kl_adjusted", "p_selective_adjusted", "n_tests", "least_p"} <= set(found.columns)
