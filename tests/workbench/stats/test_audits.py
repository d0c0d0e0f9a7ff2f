"""Corrected p values of an audit: family-wise error on nulls, power with few draws, what Holm's method cannot do."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.audits import adjust_audit, holm_audit


def draws(kl: np.ndarray, contrast: np.ndarray | None = None, kind: str = "reroute") -> pl.DataFrame:
    """kl, contrast [expert draw], all in one layer."""
    contrast = kl if contrast is None else contrast
    expert, draw = np.indices(kl.shape).reshape(2, -1)
    return pl.DataFrame(
        {"kind": kind, "layer": 3, "expert": expert, "draw": draw, "kl": kl.ravel(), "contrast": contrast.ravel()}
    ).with_columns(pl.col("contrast").fill_nan(None))


def effects(rng: np.random.Generator, n_experts: int, n_controls: int, shared: bool = True) -> np.ndarray:
    """Skewed effects; controls are drawn from one pool of experts, as in one layer, so that rows share draws."""
    pool = rng.lognormal(size=24)
    if not shared:
        return rng.lognormal(size=(n_experts, n_controls + 1))
    return rng.choice(pool, (n_experts, n_controls + 1)) * rng.lognormal(0, 0.2, (n_experts, n_controls + 1))


@pytest.mark.parametrize("shared", [True, False])
def test_audits_of_nothing_find_an_expert_in_one_of_twenty(shared: bool) -> None:
    rng = np.random.default_rng(0)
    found = [adjust_audit(draws(effects(rng, 8, 99, shared))) for _ in range(200)]
    errors = sum(frame["p_kl_adjusted"].min() <= 0.05 for frame in found)
    assert errors <= 19  # 10 expected at most; more than 19 has probability 0.003
    plain = sum((frame["p_kl"] <= 0.05).any() for frame in found)
    assert plain > 45  # without a correction


def test_experts_that_matter_are_found_with_twenty_draws_and_holm_finds_none() -> None:
    rng = np.random.default_rng(2)
    kl = np.exp(0.5 * rng.normal(size=(32, 21)))
    kl[:4, 0] = 60.0
    found = adjust_audit(draws(kl)).sort("p_kl_adjusted", "expert")
    assert found["expert"].head(4).to_list() == [0, 1, 2, 3]
    assert found["p_kl_adjusted"].head(4).to_list() == pytest.approx([1 / 21] * 4)
    assert found["p_kl_adjusted"][4] > 0.05
    assert found.select("n_tests", "n_controls").row(0) == (32, 20)
    audit = found.select("kind", "layer", "expert", "p_kl", "p_selective", "n_controls")
    by_holm = holm_audit(audit)
    assert by_holm["p_kl_holm"].min() > 0.5
    assert by_holm["least_p_holm"][0] == 1.0  # 32 / 21: no draw could have helped


def test_one_expert_keeps_its_plain_p_and_ties_count_as_reached() -> None:
    found = adjust_audit(draws(np.array([[3.0, 3.0, 1.0, 2.0]]))).row(0, named=True)
    assert found["p_kl"] == found["p_kl_adjusted"] == 0.5
    dead = adjust_audit(draws(np.zeros((3, 21))))  # idle experts and controls
    assert dead["p_kl_adjusted"].to_list() == [1.0] * 3


def test_kinds_are_families_of_their_own_and_one_language_has_no_contrast() -> None:
    kl = np.exp(np.random.default_rng(2).normal(size=(5, 21)))
    nothing = np.full(kl.shape, np.nan)
    both = pl.concat([draws(kl, nothing), draws(kl, kind="force")])
    found = adjust_audit(both)
    forced = found.filter(pl.col("kind") == "force")["p_kl_adjusted"].to_list()
    assert found.filter(pl.col("kind") == "reroute")["p_kl_adjusted"].to_list() == forced
    assert found.filter(pl.col("kind") == "reroute")["p_selective_adjusted"].null_count() == 5
    together = adjust_audit(both, by=())
    assert together["n_tests"].to_list() == [10] * 10
    assert (together["p_kl_adjusted"] >= found["p_kl_adjusted"] - 1e-12).all()


def test_draws_that_were_lost_are_an_error_and_none_are_no_rows() -> None:
    whole = draws(np.ones((2, 21)))
    for part in (whole.filter(pl.col("draw") > 0), whole.head(40), whole.filter(pl.col("draw") == 0)):
        with pytest.raises(FrameError, match="expected draw 0"):
            adjust_audit(part)
    assert adjust_audit(whole.clear()).is_empty()
    empty = pl.DataFrame(
        schema={"kind": pl.String, "p_kl": pl.Float64, "p_selective": pl.Float64, "n_controls": pl.Int64}
    )
    assert holm_audit(empty).is_empty()


def test_holm_by_hand() -> None:
    audit = pl.DataFrame(
        {"kind": ["a", "b", "a", "a"], "p_kl": [0.01, 0.04, 0.03, None], "p_selective": [None] * 4, "n_controls": 99},
        schema_overrides={"p_selective": pl.Float64},
    )
    found = holm_audit(audit)
    assert found["kind"].to_list() == ["a", "b", "a", "a"]
    assert found["p_kl_holm"].to_list() == [pytest.approx(0.02), pytest.approx(0.04), pytest.approx(0.03), None]
    assert found["p_selective_holm"].null_count() == 4
    assert found["least_p_holm"].to_list() == pytest.approx([0.02, 0.01, 0.02, 0.02])
