from __future__ import annotations

import numpy as np
import polars as pl
import polars.selectors as cs
import pytest

from workbench.stats.contrasts import language_contrasts
from workbench.stats.divergence import js_divergence, language_divergence
from workbench.stats.load import slot_counts

SHAPE = {"n_layers": 2, "n_experts": 8}


def paired_counts(draw, **changes) -> pl.DataFrame:
    settings = {"n_groups": 30, "n_tokens": 20, "k": 2, "seed": 0, **SHAPE, **changes}
    return slot_counts(*draw(**settings), by=["group_id", "lang"])


def test_js_divergence_by_hand() -> None:
    assert js_divergence(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1)
    assert js_divergence(np.array([0.2, 0.8]), np.array([0.4, 1.6])) == pytest.approx(0, abs=1e-12)
    # m = (3/4, 1/4): H(m) - H(1/2, 1/2) / 2 = 0.811278 - 0.5
    assert js_divergence(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == pytest.approx(0.3112781)


def test_risk_difference_by_hand(tiny) -> None:
    contrasts = language_contrasts(slot_counts(*tiny, ["group_id", "lang"]), n_experts=4).sort("expert")
    assert contrasts["f_ja"].to_list() == [1.0, 0.5, 0.5, 0.0]
    assert contrasts["risk_difference"].to_list() == [0.0, -0.5, 0.5, 0.0]
    assert contrasts["p_adjusted"].is_nan().all()  # one group: no uncertainty can be given
    assert contrasts["n_groups"].unique().to_list() == [1]


def test_groups_weigh_the_same_whatever_their_length(draw) -> None:
    tokens, routing = draw(n_groups=2, n_tokens=4, n_layers=1, n_experts=4, k=1, seed=1)
    routing = routing.with_columns(
        expert_ids=pl.when(pl.col("doc_id") == "0000-ja").then([0]).otherwise([1]).cast(pl.List(pl.Int64))
    )
    short = tokens.filter((pl.col("group_id") == "0001") | (pl.col("pos") == 0))
    contrasts = language_contrasts(slot_counts(short, routing, ["group_id", "lang"]), n_experts=4)
    assert contrasts.filter(pl.col("expert") == 0)["risk_difference"].item() == 0.5


def test_a_planted_expert_is_found_and_only_in_its_layer(draw) -> None:
    contrasts = language_contrasts(paired_counts(draw, shift=3.0), n_experts=8)
    top = contrasts.row(0, named=True)
    assert (top["layer"], top["expert"]) == (0, 0)
    assert top["p_adjusted"] < 0.01
    assert top["low"] > 0.2
    assert contrasts.filter(pl.col("layer") == 1)["p_adjusted"].min() > 0.05
    sums = contrasts.group_by("layer").agg(pl.col("risk_difference").sum())["risk_difference"]
    np.testing.assert_allclose(sums, 0, atol=1e-12)


def test_no_expert_is_called_different_on_null_data(draw) -> None:
    # Documents differ from each other far more than chance over tokens allows; languages do not.
    rejected = 0
    for seed in range(30):
        counts = paired_counts(draw, n_groups=16, seed=seed, spread=1.0)
        rejected += bool((language_contrasts(counts, n_experts=8, n_resamples=400)["p_adjusted"] <= 0.05).any())
    assert rejected <= 5  # 30 families at 0.05: P(more than 5) = 0.003


def test_divergence_equals_its_floor_on_null_data(draw) -> None:
    covered = 0
    for seed in range(30):
        frame = language_divergence(paired_counts(draw, seed=seed, spread=1.0, n_groups=16), n_experts=8, n_splits=20)
        assert (frame["floor"] > 0).all()
        covered += ((frame["excess_low"] <= 0) & (frame["excess_high"] >= 0)).sum()
    assert covered >= 54  # 60 intervals at 95%


def test_planted_divergence_stands_out_of_the_floor_in_its_layer_only(draw) -> None:
    frame = language_divergence(paired_counts(draw, shift=3.0), n_experts=8)
    assert frame["excess_low"][0] > 0.01
    assert abs(frame["excess"][1]) < frame["excess"][0] / 10
    np.testing.assert_allclose(frame["excess"], frame["between"] - frame["floor"])
    assert ((frame["between_low"] < frame["between"]) & (frame["between"] < frame["between_high"])).all()


def test_excess_does_not_depend_on_the_number_of_documents(draw) -> None:
    # The raw divergence is inflated by small samples; subtracting the floor takes that out.
    def mean(n_groups: int, column: str, layer: int) -> float:
        draws = (paired_counts(draw, shift=3.0, n_groups=n_groups, seed=seed) for seed in range(8))
        return float(
            np.mean([language_divergence(counts, n_experts=8, n_splits=20)[column][layer] for counts in draws])
        )

    assert mean(8, "between", layer=1) > 2 * mean(32, "between", layer=1)
    assert mean(8, "excess", layer=0) == pytest.approx(mean(32, "excess", layer=0), rel=0.2)


def test_too_few_groups_give_nan_not_a_number(draw) -> None:
    frame = language_divergence(paired_counts(draw, n_groups=3), n_experts=8)
    assert frame["excess"].is_nan().all()
    assert frame["n_groups"].to_list() == [3, 3]


def test_one_language_alone_gives_an_empty_answer(draw) -> None:
    tokens, routing = draw(n_groups=5, n_tokens=4, k=2, seed=0, **SHAPE)
    counts = slot_counts(tokens.filter(pl.col("lang") == "ja"), routing, ["group_id", "lang"])
    assert language_contrasts(counts, n_experts=8)["risk_difference"].is_nan().all()
    assert language_divergence(counts, n_experts=8)["between"].is_nan().all()


@pytest.mark.slow
def test_excess_intervals_cover_a_planted_effect_and_spare_the_null(draw) -> None:
    def excess(n_groups: int, seed: int) -> pl.DataFrame:
        counts = paired_counts(draw, shift=1.5, n_groups=n_groups, seed=seed)
        return language_divergence(counts, n_experts=8, n_splits=20).select(cs.starts_with("excess"))

    truth = np.mean([excess(150, 1000 + seed)["excess"][0] for seed in range(4)])
    frames = [excess(12, seed) for seed in range(100)]
    covered = np.mean([frame["excess_low"][0] <= truth <= frame["excess_high"][0] for frame in frames])
    above = np.mean([frame["excess_low"][1] > 0 for frame in frames])
    assert covered >= 0.86  # 95% less three Monte-Carlo errors, and twelve groups are few
    assert above <= 0.025 + 3 * 0.016
