from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.routes import route_regret


def draw_routes(better: float, n_groups: int = 16, n_tokens: int = 10, n_others: int = 6, seed: int = 0):
    """Routes of one nll on average, the router's `better` nats below; documents differ in how hard they are."""
    rng = np.random.default_rng(seed)
    rows, tokens = [], []
    for group in range(n_groups):
        hard = rng.normal(3, 1)
        for pos in range(n_tokens):
            tokens.append((f"d{group}", pos, f"g{group}", "ja" if pos % 2 else "en"))
            nll = hard + rng.normal(0, 0.5, n_others + 1)
            nll[0] -= better
            rows += [(f"d{group}", pos, 0, route, value) for route, value in enumerate(nll)]
    names = ["doc_id", "pos", "layer", "route", "nll"]
    return pl.DataFrame(rows, schema=names, orient="row"), pl.DataFrame(
        tokens, schema=["doc_id", "pos", "group_id", "lang"], orient="row"
    )


def test_by_hand() -> None:
    routes = pl.DataFrame(
        {"doc_id": "a", "pos": [0] * 4, "layer": 2, "route": [0, 1, 2, 3], "nll": [2.0, 1.0, 2.0, 5.0]}
    )
    tokens = pl.DataFrame({"doc_id": ["a"], "pos": [0], "group_id": ["a"]})
    row = route_regret(routes, tokens).row(0, named=True)
    assert row["gain"] == pytest.approx(8 / 3 - 2)
    assert (row["regret"], row["regret_null"], row["excess_regret"]) == (1.0, 1.5, -0.5)
    assert row["rank"] == pytest.approx((1 + 0.5) / 3)
    assert (row["n_units"], row["n_tokens"], row["n_routes"]) == (1, 1, 4)


def test_a_router_that_is_no_better_than_chance_still_has_regret_but_no_excess() -> None:
    errors, held, regrets = 0, 0, []
    for seed in range(40):
        found = route_regret(*draw_routes(0.0, seed=seed), n_resamples=199, seed=seed + 100).row(0, named=True)
        errors += found["p_adjusted"] <= 0.05
        held += (found["excess_regret_low"] <= 0 <= found["excess_regret_high"]) + (
            found["rank_low"] <= 0.5 <= found["rank_high"]
        )
        regrets.append(found["regret"])
    assert min(regrets) > 0.3  # the best of seven is better, by luck
    assert errors / 40 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 40)
    assert 0.85 <= held / 80 <= 1


def test_a_router_that_chooses_well_is_found() -> None:
    found = route_regret(*draw_routes(0.3), by=("layer", "lang"), n_resamples=499)
    assert found["lang"].to_list() == ["en", "ja"]
    assert found["n_tests"].unique().to_list() == [2]
    assert (found["gain_low"] > 0.1).all()
    assert (found["excess_regret_high"] < 0).all()
    assert (found["rank_high"] < 0.5).all()
    assert (found["p_adjusted"] <= 0.01).all()


def test_tokens_without_another_route_do_not_count_and_the_routers_own_must_be_there() -> None:
    routes, tokens = draw_routes(0.0)
    alone = routes.filter((pl.col("pos") > 0) | (pl.col("route") == 0))
    assert route_regret(alone, tokens)["n_tokens"].to_list() == [16 * 9]
    with pytest.raises(FrameError, match="expected one route 0"):
        route_regret(routes.filter(pl.col("route") > 0), tokens)
