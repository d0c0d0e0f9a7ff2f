"""Counterfactual routes against the same routes forced by hand, and on experts that are all alike."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from workbench.errors import ConfigError
from workbench.experiments.routes import counterfactual_routes
from workbench.models import Qwen3Moe
from workbench.planted.design import Design
from workbench.planted.documents import language_documents, sequences
from workbench.planted.experts import plant
from workbench.stats.routes import route_regret

DESIGN = Design(n_experts=32, k=4, strength=0.25)


@pytest.fixture(scope="module")
def planted() -> Qwen3Moe:
    return plant(DESIGN)


@pytest.fixture(scope="module")
def documents() -> pl.DataFrame:
    return language_documents(4, 20, seed=3)


@pytest.fixture(scope="module")
def routes(planted: Qwen3Moe, documents: pl.DataFrame) -> pl.DataFrame:
    return counterfactual_routes(planted, documents, layers=[1], n_positions=3, n_alternatives=4, seed=1)


def test_the_losses_are_those_of_the_same_routes_forced_by_hand(
    planted: Qwen3Moe, documents: pl.DataFrame, routes: pl.DataFrame
) -> None:
    doc = documents.filter(pl.col("doc_id") == documents["doc_id"][0])
    ids = torch.tensor(sequences(doc))
    for row in routes.filter(doc_id=doc["doc_id"][0]).iter_rows(named=True):

        def force(chosen, hook, row=row):
            chosen = chosen.clone()
            chosen[0, row["pos"]] = torch.tensor(row["expert_ids"])
            return chosen

        hooks = [("blocks.1.mlp.hook_expert_ids", force)] if row["route"] else []
        with torch.inference_mode():
            logits = planted.run_with_hooks(ids, fwd_hooks=hooks)
        wanted = -logits.log_softmax(-1)[0, row["pos"], ids[0, row["pos"] + 1]]
        assert row["nll"] == pytest.approx(float(wanted), abs=1e-4)


def test_routes_are_sets_of_k_all_different_at_content_tokens(routes: pl.DataFrame, documents: pl.DataFrame) -> None:
    assert routes.group_by("doc_id", "pos").len()["len"].unique().to_list() == [5]
    assert len(routes) == 8 * 3 * 5
    for _, part in routes.group_by("doc_id", "pos"):
        sets = [frozenset(experts) for experts in part["expert_ids"].to_list()]
        assert len(set(sets)) == len(sets)
        assert {len(experts) for experts in sets} == {DESIGN.k}
    kept = documents.join(routes.select("doc_id", "pos").unique(), on=["doc_id", "pos"], how="semi")
    assert set(kept["segment"]) == {"analysis", "final"}
    assert (routes["margin"] > 0).all()


def test_experts_that_are_all_alike_leave_nothing_to_regret(documents: pl.DataFrame) -> None:
    upcycled = plant(Design(n_experts=32, k=4, kind="upcycled"))
    found = route_regret(counterfactual_routes(upcycled, documents, n_positions=2, n_alternatives=3), documents)
    assert found["layer"].to_list() == [0, 1]
    assert np.abs(found["regret"].to_numpy()).max() < 1e-5
    assert np.abs(found["gain"].to_numpy()).max() < 1e-5


def test_a_layer_without_experts_is_named(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    with pytest.raises(ConfigError, match="layers: expected some of 0, 1, got"):
        counterfactual_routes(planted, documents, layers=[4])
