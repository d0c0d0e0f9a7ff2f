from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.contribution import attribution_summary, expert_contribution, sink_experts, super_experts


@pytest.fixture
def run(words) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Expert 4 writes three times as much as any other; expert 5 writes nothing."""
    tokens, routing, _ = words()
    size = np.r_[[1.0] * 4, 3.0, 0.0, [1.0] * 10]
    weights = np.stack(routing["routing_weights"].to_list())
    norms = weights * size[np.stack(routing["expert_ids"].to_list())]
    return tokens, routing.with_columns(expert_norms=pl.Series(norms.tolist()))


def test_contribution_tells_load_from_what_is_written(run) -> None:
    tokens, routing = run
    found = expert_contribution(tokens, routing, 16)
    rows = {row["expert"]: row for row in found.rows(named=True)}
    assert rows[4]["norm"] == pytest.approx(3)
    assert rows[4]["reap"] == pytest.approx(3 * rows[4]["weight"])
    assert rows[4]["reap_low"] < rows[4]["reap"] < rows[4]["reap_high"]
    assert rows[4]["relative"] > 2
    assert (rows[5]["reap"], rows[5]["output_share"]) == (0, 0)
    assert rows[5]["frequency"] > 0.1  # idle, and much used
    assert found["output_share"].sum() == pytest.approx(1)
    assert found["weight_share"].sum() == pytest.approx(1)
    assert found["frequency"].sum() == pytest.approx(2)


def test_a_run_without_norms_is_refused(run) -> None:
    tokens, routing = run
    with pytest.raises(FrameError, match=r"expected expert_norms, got none.*--norms"):
        expert_contribution(tokens, routing.drop("expert_norms"), 16)
    with pytest.raises(FrameError, match="expected expert_norms"):
        expert_contribution(tokens, routing.with_columns(expert_norms=None), 16)


def test_attribution_counts_an_unchosen_expert_as_nothing() -> None:
    tokens = pl.DataFrame({"doc_id": ["a", "a", "b", "b"], "pos": [0, 1, 0, 1], "group_id": ["a", "a", "b", "b"]})
    rows = [("a", 0, 0, 3, "x", 2.0), ("a", 0, 0, 1, "x", 0.0), ("a", 1, 0, 1, "x", 0.0), ("b", 0, 0, 3, "x", 4.0),
            ("b", 1, 0, 1, "x", 0.0)]  # fmt: skip
    dla = pl.DataFrame(rows, schema=["doc_id", "pos", "layer", "expert", "target", "dla"], orient="row")
    three = attribution_summary(dla, tokens).row(by_predicate=pl.col("expert") == 3, named=True)
    assert three["mean"] == pytest.approx((2 / 2 + 4 / 2) / 2)
    assert three["when_chosen"] == 3
    assert (three["n_chosen"], three["n_units"], three["n_tests"]) == (2, 2, 2)


def test_a_planted_writer_is_the_only_one_with_a_direct_effect() -> None:
    rng = np.random.default_rng(0)
    n, experts = 30 * 20, 6
    tokens = pl.DataFrame(
        {"doc_id": np.repeat([f"d{doc:02}" for doc in range(30)], 20), "pos": np.tile(np.arange(20), 30)}
    ).with_columns(group_id=pl.col("doc_id"))
    expert = rng.integers(0, experts, n)
    dla = tokens.select("doc_id", "pos", layer=pl.lit(1), expert=pl.Series(expert), target=pl.lit("ja - en"),
                        dla=pl.Series(rng.normal(size=n) + 1.5 * (expert == 2)))  # fmt: skip
    found = attribution_summary(dla, tokens)
    assert found.filter(pl.col("p_adjusted") <= 0.05)["expert"].to_list() == [2]


def test_super_experts_need_all_three_conditions() -> None:
    rng = np.random.default_rng(0)
    peaks = pl.DataFrame(
        {"layer": np.repeat(np.arange(8), 64), "expert": np.tile(np.arange(64), 8), "peak": rng.uniform(1, 5, 512)}
    )
    at = pl.struct("layer", "expert")
    size = (
        pl.when(at == pl.struct(layer=pl.lit(1), expert=pl.lit(60))).then(744.0)
        .when(at == pl.struct(layer=pl.lit(7), expert=pl.lit(3))).then(500.0)
        .otherwise("peak")
    )  # fmt: skip
    found = super_experts(peaks.with_columns(peak=size))
    assert found.filter("super").select("layer", "expert").rows() == [(1, 60)]  # the other is in a late layer
    assert found.row(0, named=True)["ratio"] > 100
    assert not super_experts(peaks)["super"].all()


def test_an_expert_of_the_first_token_is_found(words) -> None:
    tokens, routing, _ = words()
    first = tokens["pos"].to_numpy() == 0
    lists = [[9, 8] if at else chosen for at, chosen in zip(first, routing["expert_ids"].to_list(), strict=True)]
    found = sink_experts(tokens, routing.with_columns(expert_ids=pl.Series(lists)), 16)
    top = found.sort("difference", descending=True).head(2)
    assert sorted(top["expert"]) == [8, 9]
    assert (top["f_in"] == 1).all()
    assert (top["low"] > 0.5).all()
