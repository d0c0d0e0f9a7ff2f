from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.balance import (
    auxiliary_loss,
    balance,
    balance_by_scope,
    balance_measures,
    load_interval,
    lorenz_curve,
    margin_summary,
)
from workbench.stats.load import expert_load, slot_counts


def test_measures_by_hand() -> None:
    found = balance_measures(np.array([4.0, 2.0, 2.0, 0.0]), k=2)
    assert found["entropy"] == pytest.approx(0.75)
    assert found["gini"] == pytest.approx((3 * 0.5 + 1 * 0.25 - 1 * 0.25) / 4)
    assert found["cv"] == pytest.approx(np.std([2, 1, 1, 0]))
    assert found["max_ratio"] == 2
    assert (found["n_idle"], found["n_dead"], found["n_hot"]) == (1, 1, 1)
    even = balance_measures(np.full(8, 5.0), k=2)
    assert (even["entropy"], even["gini"], even["cv"], even["max_ratio"]) == pytest.approx((1, 0, 0, 1))
    worst = balance_measures(np.array([10.0] * 8 + [0.0] * 120), k=8)
    assert worst["max_ratio"] == 16  # E / k of LLM-jp-4


def test_the_miller_madow_correction_takes_the_small_sample_bias_out() -> None:
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.full(32, 20.0))
    truth = balance_measures(q * 1e9, k=1)["entropy"]
    small = balance_measures(rng.multinomial(200, q, 400).astype(float), k=1)
    raw, corrected = small["entropy"].mean() - truth, small["entropy_corrected"].mean() - truth
    assert raw == pytest.approx(-31 / 400 / np.log(32), rel=0.15)
    assert abs(corrected) < abs(raw) / 8


def test_the_null_of_entropy_is_what_a_uniform_router_gives(draw) -> None:
    tokens, routing = draw(n_groups=40, n_tokens=5, n_layers=1, n_experts=16, k=1, seed=0, spread=0.0)
    frame = balance(slot_counts(tokens, routing, ["group_id", "lang"]), ["lang"], 16, k=1)
    entropy = frame.filter(pl.col("measure") == "entropy")
    np.testing.assert_allclose(entropy["value"], entropy["null"], atol=0.012)
    assert entropy["n_units"].to_list() == [40, 40]
    assert (entropy["null"] < 1).all()


def test_jackknife_intervals_of_the_entropy_cover_its_long_run_value(draw) -> None:
    def entropy(seed: int, n_groups: int) -> tuple[float, float, float]:
        tokens, routing = draw(n_groups=n_groups, n_tokens=6, n_layers=1, n_experts=8, k=2, seed=seed, shift=2.0)
        frame = balance(slot_counts(tokens, routing, ["group_id"]), [], 8, k=2)
        return frame.filter(pl.col("measure") == "gini").select("value", "low", "high").row(0)

    truth = np.mean([entropy(1000 + seed, 300)[0] for seed in range(3)])
    covered = np.mean([low <= truth <= high for _, low, high in (entropy(seed, 40) for seed in range(40))])
    assert covered >= 0.85


def test_pooling_over_layers_hides_what_every_layer_shows() -> None:
    rows = [(group, layer, layer, 10) for group in range(5) for layer in range(4)]
    counts = pl.DataFrame(rows, schema=["group_id", "layer", "expert", "slots"], orient="row")
    table = auxiliary_loss(counts, n_experts=4)
    values = {scope: (value, low, high) for scope, value, low, high, *_ in table.rows()}
    assert values["mean of layers"] == (4.0, 4.0, 4.0)
    assert values["layer 2"] == (4.0, 4.0, 4.0)
    assert values["pooled"] == (1.0, 1.0, 1.0)
    assert table["n_units"].unique().to_list() == [5]


def test_the_interval_of_a_load_holds_as_often_as_it_says(draw) -> None:
    """Experts of these texts are alike in the long run, so that every load is 1 / 8 with endless text."""
    held = []
    for seed in range(40):
        counts = slot_counts(*draw(n_groups=30, n_tokens=20, n_layers=2, n_experts=8, k=2, seed=seed), ["group_id"])
        found = load_interval(counts, [], 8)
        assert found.group_by("layer").agg(pl.col("load").sum())["load"].to_list() == pytest.approx([1.0, 1.0])
        held.append((found["low"] <= 1 / 8) & (found["high"] >= 1 / 8))
    assert 0.9 <= pl.concat(held).mean() <= 0.99  # type: ignore[operator]
    assert set(found["null"]) == {1 / 8}
    assert set(found["n_units"]) == {30}


def test_documents_may_be_uneven_while_everything_together_is_even() -> None:
    tokens = pl.DataFrame(
        [(f"d{doc}", f"g{doc}", pos, "ja" if doc < 4 else "en", "user") for doc in range(8) for pos in range(200)],
        schema=["doc_id", "group_id", "pos", "lang", "segment"], orient="row",
    )  # fmt: skip
    owner = tokens["doc_id"].str.slice(1).cast(pl.Int64)
    routing = tokens.select("doc_id", "pos", layer=pl.lit(0), expert_ids=pl.concat_list(owner))
    scopes = balance_by_scope(tokens, routing, n_experts=8, k=1, window=400)
    found = {row["scope"]: row for row in scopes.rows(named=True)}
    assert found["document"]["entropy_corrected"] == 0
    assert found["window"]["entropy_corrected"] == pytest.approx(1 / 3, abs=0.01)
    assert found["language"]["entropy_corrected"] == pytest.approx(2 / 3, abs=0.01)
    assert found["global"]["entropy_corrected"] == pytest.approx(1, abs=0.01)
    assert (found["document"]["n_parts"], found["window"]["n_parts"], found["global"]["mean_tokens"]) == (8, 4, 1600)
    assert found["document"]["entropy_corrected_high"] == 0  # every document has one expert, whichever is left out
    assert found["global"]["n_units"] == 8


def test_documents_of_one_taste_leave_balance_uncertain_at_every_scope(draw) -> None:
    scopes = balance_by_scope(*draw(n_groups=12, n_tokens=40, n_layers=2, n_experts=8, k=2, seed=0), 8, 2, window=100)
    for name in ("entropy_corrected", "gini"):
        low, value, high = (scopes[f"{name}{end}"] for end in ("_low", "", "_high"))
        assert ((low < value) & (value < high)).all()
    wide = scopes.with_columns(width=pl.col("gini_high") - pl.col("gini_low")).group_by("scope").agg(pl.all().mean())
    assert dict(wide.select("scope", "n_units").rows())["window"] == 12
    assert (
        wide.filter(pl.col("scope") == "document")["gini"].item()
        > wide.filter(pl.col("scope") == "global")["gini"].item()
    )


def test_lorenz_runs_from_nothing_to_everything(tiny) -> None:
    load = expert_load(slot_counts(*tiny, by=["lang"]), by=["lang"], n_experts=4)
    curve = lorenz_curve(load, ["lang"]).filter(pl.col("lang") == "ja")
    assert curve["experts"].to_list() == [0, 0.25, 0.5, 0.75, 1]
    assert curve["slots"].to_list() == [0, 0, 0.25, 0.5, 1]


def test_margins_by_hand(tiny) -> None:
    tokens, routing = tiny
    routing = routing.with_columns(router_margin=pl.Series([9.0, 0.0, 0.05, 1.0]), router_mass=pl.lit(0.5))
    summary = margin_summary(tokens, routing, ["lang"])
    japanese = summary.row(by_predicate=pl.col("lang") == "ja", named=True)
    assert (japanese["ties"], japanese["near_0.01"], japanese["near_0.1"]) == (0.5, 0.5, 1.0)
    assert (japanese["n_tokens"], japanese["n_docs"], japanese["mass"]) == (2, 1, 0.5)
    none = margin_summary(tokens, routing.with_columns(router_margin=pl.lit(None, dtype=pl.Float64)))
    assert none.is_empty()


def test_the_interval_of_near_ties_holds_as_often_as_it_says(draw) -> None:
    def near(seed: int, n_groups: int) -> dict:
        frames = draw(n_groups=n_groups, n_tokens=20, n_layers=1, n_experts=8, k=2, seed=seed)
        return margin_summary(*frames).row(0, named=True)

    truth, found = near(999, 600), [near(seed, 30) for seed in range(40)]
    for name in ("near_0.1", "median", "mass"):
        covered = [one[f"{name}_low"] <= truth[name] <= one[f"{name}_high"] for one in found]
        assert np.mean(covered) >= 0.85
    assert found[0]["n_units"] == 30


def test_intervals_of_shares_end_at_0_and_1(draw) -> None:
    """Ties in one of 20 groups, and close choices in all but one: the plain intervals pass 0 and 1."""
    tokens, routing = draw(n_groups=20, n_tokens=10, n_layers=1, n_experts=8, k=2, seed=0)
    first, last = (pl.col("doc_id").str.starts_with(group) for group in ("0000", "0019"))
    routing = routing.with_columns(
        router_margin=pl.when(first).then(0.0).when(last).then(9.0).otherwise(0.05),
        router_mass=pl.when(last).then(0.2).otherwise(1.0),
    )
    found = margin_summary(tokens, routing).row(0, named=True)
    assert (found["ties_low"], found["near_0.01_low"], found["near_0.1_high"], found["mass_high"]) == (0, 0, 1, 1)
    assert found["ties"] == 0.05 < found["ties_high"] < 1
    logits = margin_summary(tokens, routing.with_columns(pl.col("router_margin") + 30)).row(0, named=True)
    assert logits["median_high"] > 30  # no share


def test_a_concentration_is_never_below_that_of_an_even_load(draw) -> None:
    tables = [
        auxiliary_loss(slot_counts(*draw(6, 12, 3, 8, 2, seed, spread=0.0), ["group_id"]), 8) for seed in range(10)
    ]
    for table in tables:
        assert (table["low"] >= 1).all()
        assert (table["low"] <= table["value"]).all()
    assert any((table["low"] == 1).any() for table in tables)  # the plain interval passes 1
