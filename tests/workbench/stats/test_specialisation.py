from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.specialisation import specialisation, top_tokens, vocabulary_specialisation


def test_a_language_expert_is_found_within_groups(words) -> None:
    tokens, routing, _ = words(context=2.0)
    found = specialisation(tokens, routing, "lang", 16)
    japanese = found.filter(pl.col("value") == "ja", pl.col("expert") == 0).row(0, named=True)
    assert japanese["design"] == "within"
    assert japanese["difference"] == pytest.approx(japanese["f_in"] - japanese["f_out"])
    assert japanese["low"] > 0.2
    assert japanese["p_adjusted"] < 0.05
    assert japanese["log2_ratio"] > 1
    english = found.filter(pl.col("value") == "en", pl.col("expert") == 0).row(0, named=True)
    assert english["difference"] == pytest.approx(-japanese["difference"])
    assert (japanese["n_units"], japanese["n_tests"]) == (30, 32)
    others = found.filter(pl.col("expert") > 0)
    assert others["difference"].abs().max() < 0.15  # displaced by expert 0, since a token has k places


def test_topics_differ_between_groups(words) -> None:
    tokens, routing, _ = words(n_groups=40)
    found = specialisation(tokens, routing, "topic", 16)
    assert found["design"].unique().to_list() == ["between"]
    best = found.filter(pl.col("p_adjusted") <= 0.05).select("value", "expert").rows()
    assert set(best) >= {(f"t{topic}", 2 + topic) for topic in range(5)}
    own = found.filter(pl.col("value") == "t0", pl.col("expert") == 2).row(0, named=True)
    assert own["low"] > 0.05
    assert own["n_units"] == 40


def test_no_value_is_special_on_null_data(words) -> None:
    rejected = 0
    for seed in range(12):
        tokens, routing, _ = words(n_groups=16, n_tokens=20, seed=seed)
        odd = tokens.with_columns(parity=pl.when(pl.col("pos") % 2 == 0).then(pl.lit("even")).otherwise(pl.lit("odd")))
        found = specialisation(odd, routing, "parity", 16, n_resamples=300)
        rejected += bool((found["p_adjusted"] <= 0.05).any())
    assert rejected <= 2


def test_a_value_with_one_token_of_a_group_is_not_special_by_chance(draw) -> None:
    rejected, missed = 0, []
    for seed in range(12):
        tokens, routing = draw(n_groups=20, n_tokens=20, n_layers=1, n_experts=64, k=4, seed=seed)
        first = tokens.with_columns(
            place=pl.when((pl.col("pos") == 7) & (pl.col("lang") == "ja"))
            .then(pl.lit("seventh"))
            .otherwise(pl.lit("other"))
        )
        found = specialisation(first, routing, "place", 64, n_resamples=300).filter(pl.col("value") == "seventh")
        rejected += bool((found["p_adjusted"] <= 0.05).any())
        missed.append(((found["low"] > 0) | (found["high"] < 0)).mean())
    assert rejected <= 2
    assert np.mean(missed) <= 0.05  # intervals too: an expert that met none of the twenty differs from nothing


def test_a_word_that_repeats_within_a_group_is_not_special_by_chance(draw) -> None:
    """Three tokens of a group that are one word take the same experts: they are not three observations."""
    rejected = 0
    for seed in range(12):
        tokens, routing = draw(n_groups=30, n_tokens=20, n_layers=1, n_experts=64, k=4, seed=seed)
        words = tokens.filter(pl.col("lang") == "ja").with_columns(
            place=pl.when(pl.col("pos") < 3).then(pl.lit("word")).otherwise(pl.lit("other"))
        )
        first = routing.group_by("doc_id", maintain_order=True).agg(again=pl.col("expert_ids").first())
        same = routing.join(first, on="doc_id", maintain_order="left").with_columns(
            expert_ids=pl.when(pl.col("pos") < 3).then("again").otherwise("expert_ids")
        )
        found = specialisation(words, same, "place", 64, n_resamples=300)
        rejected += bool((found["p_adjusted"] <= 0.05).any())
    assert rejected <= 2


def test_every_value_leaves_room_for_a_small_p(words) -> None:
    tokens, routing, _ = words(n_groups=60)
    many = tokens.with_columns(topic=pl.format("{}-{}", "topic", pl.col("group_id").str.tail(1)))
    found = specialisation(many, routing, "topic", 16, n_resamples=10)
    assert found["value"].n_unique() >= 10
    assert found["p_adjusted"].min() <= 0.05


def test_vocabulary_is_load_corrected(words) -> None:
    tokens, routing, _ = words(n_groups=40)
    by_word = tokens.select("doc_id", "pos", layer=pl.lit(0), expert_ids=pl.concat_list(pl.col("token_id") % 16))
    real = vocabulary_specialisation(tokens, by_word, 16).row(0, named=True)
    plain = vocabulary_specialisation(tokens, routing, 16).row(0, named=True)
    assert real["specialisation"] == real["excess"] == 1
    assert abs(plain["excess"]) < 0.08
    assert real["low"] == real["high"] == 1
    assert plain["low"] < plain["excess"] < plain["high"] < plain["low"] + 0.2
    assert (real["role"], real["n_docs"]) == ("input", 80)
    skewed = routing.with_columns(
        expert_ids=pl.Series([[0, 1] if x > 0.01 else [1, 0] for x in np.random.default_rng(0).random(len(routing))])
    )
    imbalanced = vocabulary_specialisation(tokens, skewed, 16).row(0, named=True)
    assert imbalanced["specialisation"] > 0.98  # as naive upcycling publishes it
    assert abs(imbalanced["excess"]) < 0.3
    assert imbalanced["null"] == pytest.approx(imbalanced["specialisation"], abs=0.005)


def test_the_next_word_is_of_the_same_document() -> None:
    tokens = pl.DataFrame(
        {"doc_id": ["a", "a", "b", "b"], "pos": [0, 1, 0, 1], "token_id": [1, 2, 1, 2], "segment": "user"}
    ).with_columns(group_id="doc_id")
    routing = tokens.select("doc_id", "pos", layer=pl.lit(0), expert_ids=pl.Series([[0], [1], [0], [1]]))
    found = vocabulary_specialisation(tokens, routing, 2, role="next", min_count=1).row(0, named=True)
    assert found["n_tokens"] == 2
    with pytest.raises(ValueError, match="expected one of input, next"):
        vocabulary_specialisation(tokens, routing, 2, role="previous")


def test_top_tokens_name_the_planted_word(words) -> None:
    tokens, routing, _ = words(word=6.0)
    tokens = tokens.with_columns(token=pl.format("w{}", "token_id"))
    best = top_tokens(tokens, routing, 16, n=3).filter(pl.col("expert") == 1)
    first = best.row(0, named=True)
    assert first["token"] == "w3"
    assert first["rate"] > 0.9
    assert first["log2_lift"] > 1
    assert len(best) <= 3


def test_words_with_one_lift_come_in_the_order_of_their_ids() -> None:
    """Ties are many among rare words, and a table that is made again must be the same."""
    ids = [word for word in range(40) for _ in range(5)]
    tokens = pl.DataFrame({"doc_id": "a", "pos": range(200), "token_id": ids, "segment": "user"})
    tokens = tokens.with_columns(token=pl.format("w{}", "token_id"), group_id="doc_id")
    routing = tokens.select("doc_id", "pos", layer=pl.lit(0), expert_ids=pl.concat_list(pl.lit(0)))
    assert top_tokens(tokens, routing, 1, n=7)["token_id"].to_list() == list(range(7))
