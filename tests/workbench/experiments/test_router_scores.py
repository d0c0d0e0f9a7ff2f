"""Router scores by component: they sum to the router's logits, and planted experts are pushed by what was planted."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from workbench.errors import ConfigError
from workbench.experiments.router_scores import router_scores
from workbench.models import Qwen3Moe
from workbench.planted.design import Design
from workbench.planted.documents import language_documents, sequences
from workbench.planted.experts import plant
from workbench.stats.router_scores import router_score_summary

DESIGN = Design(n_experts=32, k=4, strength=0.5)


@pytest.fixture(scope="module")
def planted() -> Qwen3Moe:
    return plant(DESIGN)


@pytest.fixture(scope="module")
def documents() -> pl.DataFrame:
    return language_documents(12, 32, seed=5)


@pytest.fixture(scope="module")
def scores(planted: Qwen3Moe, documents: pl.DataFrame) -> pl.DataFrame:
    return router_scores(planted, documents)


@pytest.mark.parametrize("parts", ["component", "head"])
def test_the_components_sum_to_the_centred_logits(planted: Qwen3Moe, documents: pl.DataFrame, parts: str) -> None:
    doc = documents.filter(pl.col("doc_id") == documents["doc_id"][0])
    found = router_scores(planted, doc, layers=[1], parts=parts)
    _, cache = planted.run_with_cache(torch.tensor(sequences(doc)))
    logits = cache["router_logits", 1][0]
    centred = logits - logits.mean(-1, keepdim=True)
    summed = found.group_by("pos", "expert", maintain_order=True).agg(pl.col("score").sum())
    wanted = centred[summed["pos"].to_list(), summed["expert"].to_list()]
    torch.testing.assert_close(torch.tensor(summed["score"].to_list()), wanted, atol=1e-4, rtol=1e-4)
    assert len(summed) == len(doc) * DESIGN.k


def test_ranks_move_as_when_the_component_is_left_out_by_hand(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    doc = documents.filter(pl.col("doc_id") == documents["doc_id"][0])
    found = router_scores(planted, doc, layers=[0]).filter(component="embed", pos=7).row(0, named=True)
    _, cache = planted.run_with_cache(torch.tensor(sequences(doc)))
    x, embed = cache["resid_mid", 0][0, 7], cache["hook_embed"][0, 7]
    block = planted.blocks[0]
    with_it, without = (
        (part * x.pow(2).mean().add(planted.cfg.norm_eps).rsqrt() * block.ln2.weight) @ block.mlp.router.weight.T
        for part in (x, x - embed)
    )
    ranks = [int((side > side[found["expert"]]).sum()) for side in (with_it, without)]
    assert found["rank_change"] == abs(ranks[0] - ranks[1])
    score = (with_it - without).detach()
    assert found["score"] == pytest.approx(float(score[found["expert"]] - score.mean()), abs=1e-4)
    assert found["influence"] == pytest.approx(float(score.var(correction=0)), rel=1e-3)


def test_planted_experts_are_pushed_by_what_was_planted(scores: pl.DataFrame, documents: pl.DataFrame) -> None:
    """By the token: the embedding. By the context: attention. On a path: the layer before."""
    found = router_score_summary(scores, documents, by=["expert"], n_resamples=499)

    def pusher(role: str, layer: int) -> str:
        part = found.filter(pl.col("expert") == DESIGN.roles[role][0], pl.col("layer") == layer)
        return str(part.sort("score", descending=True)["component"][0])

    assert pusher("en_token", 0) == "embed"
    assert pusher("ja_context", 0).startswith("attn")
    assert pusher("receiver", 1) == "mlp.0"


def test_the_summary_counts_tests_and_adds_up(scores: pl.DataFrame, documents: pl.DataFrame) -> None:
    found = router_score_summary(scores, documents, n_resamples=499)
    assert found.filter(layer=1)["component"].sort().to_list() == ["attn.0", "attn.1", "embed", "mlp.0"]
    for _, part in found.group_by("layer"):
        assert part["share"].sum() == pytest.approx(1)
    assert found["n_tests"].unique().to_list() == [6]
    assert found["n_units"].unique().to_list() == [12]
    assert found["n_tokens"].unique().to_list() == [12 * 2 * 32]
    assert (found["score_low"] <= found["score"]).all()
    embed = found.filter(layer=0, component="embed").row(0, named=True)
    assert embed["p_adjusted"] <= 0.01
    assert embed["score_low"] > 0


def test_scores_without_a_direction_are_seldom_certain() -> None:
    """Null: pushes that are noise, of documents that each have a taste."""
    rng = torch.Generator().manual_seed(0)
    names = [f"c{number}" for number in range(5)]
    errors = 0
    for trial in range(40):
        rows = [
            (f"d{group}", pos, 0, name, 0, float(taste + torch.randn((), generator=rng)), 1.0, 0.0)
            for group in range(16)
            for name in names
            for taste in [torch.randn((), generator=rng)]
            for pos in range(3)
        ]
        columns = ["doc_id", "pos", "layer", "component", "expert", "score", "influence", "rank_change"]
        scores = pl.DataFrame(rows, schema=columns, orient="row")
        tokens = scores.select("doc_id", "pos").unique().with_columns(group_id="doc_id", segment=pl.lit("user"))
        found = router_score_summary(scores, tokens, n_resamples=199, seed=trial)
        errors += bool((found["p_adjusted"] <= 0.05).any())
    assert errors / 40 <= 0.05 + 3 * (0.05 * 0.95 / 40) ** 0.5


def test_what_does_not_exist_is_named(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    with pytest.raises(ConfigError, match="layers: expected some of 0, 1, got"):
        router_scores(planted, documents, layers=[7])
    with pytest.raises(ConfigError, match="parts: expected one of component, head, got 'neuron'"):
        router_scores(planted, documents, parts="neuron")
