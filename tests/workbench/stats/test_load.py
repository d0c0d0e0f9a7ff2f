from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.load import CONTENT_SEGMENTS, expert_load, frequency_cube, load_balance, slot_counts


def test_counts_by_hand_and_template_tokens_left_out(tiny) -> None:
    counts = slot_counts(*tiny, by=["lang"])
    assert counts.rows() == [
        ("en", 0, 0, 1, 1),
        ("en", 0, 1, 1, 1),
        ("ja", 0, 0, 2, 2),
        ("ja", 0, 1, 1, 2),
        ("ja", 0, 2, 1, 2),
    ]


def test_template_tokens_are_counted_when_asked_for(tiny) -> None:
    counts = slot_counts(*tiny, by=["segment"], segments=(*CONTENT_SEGMENTS, "control"))
    assert counts.filter(pl.col("segment") == "control")["expert"].to_list() == [2, 3]
    assert {"bos", "system", "developer", "control"}.isdisjoint(CONTENT_SEGMENTS)


def test_counts_may_be_grouped_by_document_and_by_nothing(tiny) -> None:
    assert slot_counts(*tiny, by=["doc_id"])["slots"].sum() == 6
    assert slot_counts(tiny[0].lazy(), tiny[1].lazy(), by=["doc_id", "pos"])["n_tokens"].unique().to_list() == [1]


def test_a_null_effort_is_a_group_of_its_own(tiny) -> None:
    tokens = tiny[0].with_columns(effort=pl.lit(None, dtype=pl.String))
    assert slot_counts(tokens, tiny[1], by=["effort"])["slots"].sum() == 6
    load = expert_load(slot_counts(tokens, tiny[1], by=["effort"]), by=["effort"], n_experts=4)
    assert load["load"].sum() == pytest.approx(1)


def test_load_is_a_share_with_zero_rows_for_unused_experts(tiny) -> None:
    load = expert_load(slot_counts(*tiny, by=["lang"]), by=["lang"], n_experts=4)
    japanese = load.filter(pl.col("lang") == "ja")
    assert japanese["load"].to_list() == [0.5, 0.25, 0.25, 0.0]
    assert japanese["log2_ratio"].to_list() == [1.0, 0.0, 0.0, None]


def test_balance_by_hand(tiny) -> None:
    load = expert_load(slot_counts(*tiny, by=["lang"]), by=["lang"], n_experts=4)
    row = load_balance(load, by=["lang"]).row(by_predicate=pl.col("lang") == "ja", named=True)
    nats = 1.5 * np.log(2)  # entropy of (1/2, 1/4, 1/4)
    assert row["entropy"] == pytest.approx(nats / np.log(4))
    assert row["effective_experts"] == pytest.approx(2**1.5)
    assert row["max_ratio"] == 2
    assert row["n_idle"] == 1


def test_frequencies_sum_to_k_and_unpaired_groups_are_dropped(tiny, draw) -> None:
    tokens, routing = draw(n_groups=3, n_tokens=5, n_layers=2, n_experts=6, k=2, seed=0)
    tokens = tokens.filter(pl.col("doc_id") != "0001-en")
    counts = slot_counts(tokens, routing, ["group_id", "lang"])
    groups, layers, cube = frequency_cube(counts, "lang", ("ja", "en"), n_experts=6)
    assert groups == ["0000", "0002"]
    assert layers == [0, 1]
    assert cube.shape == (2, 2, 2, 6)
    np.testing.assert_allclose(cube.sum(-1), 2)
