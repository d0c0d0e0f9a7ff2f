from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.drift import decompose_drift, margin_flips, match_experts, router_drift, routing_drift


def test_permuted_experts_are_found_again() -> None:
    rng = np.random.default_rng(0)
    rows = {layer: rng.normal(size=(32, 24)) for layer in (0, 3)}
    order = rng.permutation(32)
    moved = {layer: 1.7 * (part[order] + 0.1 * rng.normal(size=part.shape)) for layer, part in rows.items()}
    matches = match_experts(rows, moved)
    for layer in (0, 3):
        found = matches.filter(pl.col("layer") == layer)["matched"].to_numpy()
        np.testing.assert_array_equal(order[found], np.arange(32))
    assert matches["cosine"].min() > 0.95
    drift = router_drift(matches)
    assert drift["same"].max() < 0.2
    assert (drift["cosine"] > drift["next_cosine"] + 0.3).all()
    assert router_drift(match_experts(rows, rows))["cosine"].to_list() == pytest.approx([1.0, 1.0])
    with pytest.raises(FrameError, match="expected the same layers and shapes"):
        match_experts(rows, {0: rows[0]})


def test_the_matching_is_one_to_one_where_the_nearest_row_is_not() -> None:
    first = {0: np.array([[1.0, 0.0], [0.9, 0.1]])}
    second = {0: np.array([[1.0, 0.05], [0.0, 1.0]])}
    assert match_experts(first, second)["matched"].to_list() == [0, 1]


def test_overlap_interval_and_null(words, routed) -> None:
    tokens, first, _ = words(seed=0)
    same = routing_drift(tokens, first, first).row(0, named=True)
    assert [same[name] for name in ("overlap", "low", "high", "first_same")] == pytest.approx([1] * 4)
    _, other, _ = routed(tokens, np.random.default_rng(9).normal(size=(len(tokens), 1, 16)), 2)
    independent = routing_drift(tokens, first, other).row(0, named=True)
    assert independent["overlap"] == pytest.approx(independent["null"], abs=0.02)
    assert (independent["n_groups"], independent["n_tokens"]) == (30, len(tokens))
    with pytest.raises(FrameError, match="one row per token and layer"):
        routing_drift(tokens, first, other.head(10))


def test_numbers_are_translated_before_routes_are_compared(words, routed) -> None:
    tokens, first, [(_, _, logits)] = words(seed=0)
    order = np.random.default_rng(0).permutation(16)
    _, renamed, _ = routed(tokens, logits[..., order], 2)
    matches = pl.DataFrame({"layer": 0, "expert": order, "matched": np.arange(16)})
    assert routing_drift(tokens, first, renamed)["overlap"].item() < 0.5
    assert routing_drift(tokens, first, renamed, matches)["overlap"].item() == 1


def test_a_changed_router_is_told_from_changed_states(routed) -> None:
    rng = np.random.default_rng(0)
    tokens = pl.DataFrame(
        {
            "doc_id": np.repeat([f"d{doc}" for doc in range(20)], 30),
            "pos": np.tile(np.arange(30), 20),
            "segment": "user",
        }
    ).with_columns(group_id=pl.col("doc_id"))
    state = rng.normal(size=(600, 8))
    routers = {"a": rng.normal(size=(12, 8))}
    routers["b"] = routers["a"] + 1.5 * rng.normal(size=(12, 8))
    states = {"a": state, "b": state + 0.05 * rng.normal(size=state.shape)}
    routings = {
        f"{router}{hidden}": routed(tokens, (states[hidden] @ routers[router].T)[:, None], 3)[1]
        for router in "ab" for hidden in "ab"
    }  # fmt: skip
    drift = {row["part"]: row["overlap"] for row in decompose_drift(tokens, routings).rows(named=True)}
    assert drift["input"] > 0.9
    assert drift["router"] < 0.7
    assert drift["both"] == pytest.approx(drift["router"], abs=0.05)
    with pytest.raises(FrameError, match="got none for ba"):
        decompose_drift(tokens, {name: routings[name] for name in ("aa", "bb", "ab")})


def test_noise_flips_narrow_choices_only(words, routed) -> None:
    tokens, first, [(_, _, logits)] = words()
    noise = np.random.default_rng(5).uniform(-0.02, 0.02, logits.shape)
    _, second, _ = routed(tokens, logits + noise, 2)
    flips = margin_flips(tokens, first, second)
    by_margin = dict(flips.select("margin", "flips").rows())
    assert by_margin[0.0] > 0.15
    assert by_margin[0.1] == by_margin[1.0] == 0
    assert flips["flips"].is_sorted(descending=True)
    assert flips["n_tokens"].sum() == len(tokens)
