from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.baselines import _exchanged_labels, anchor_pmi, committee, geometry_baseline, translation_retrieval
from workbench.stats.load import slot_counts
from workbench.stats.logits import logit_cells


def test_a_committee_serves_every_condition(words, routed) -> None:
    tokens, _, [(_, layers, logits)] = words(n_groups=20, context=4.0)
    logits = logits.copy()
    logits[..., 10] += 4.0  # everywhere; expert 0 only in Japanese
    cells = logit_cells([(tokens, layers, logits)], tokens, ["group_id", "lang"])
    found = committee(cells, "lang", 16, k=2)
    assert found.filter("committee")["expert"].to_list() == [10]
    row = found.row(10, named=True)
    assert (row["mean_rank"], row["in_top"], row["size"], row["n_conditions"]) == (1.5, 1.0, 1, 2)
    assert row["coverage"] == pytest.approx(row["eci"])
    assert row["density_ratio"] > 5
    assert not found.row(0, named=True)["candidate"]
    assert found["eci"].sum() == pytest.approx(1)
    assert row["n_units"] == 20
    assert row["coverage_low"] < row["coverage"] < row["coverage_high"]
    assert row["density_ratio_low"] > 5
    assert found["stability"].min() == 1  # whichever groups are left out


def test_intervals_of_a_committees_coverage_hold_it(words, routed) -> None:
    """The long run: many groups. One expert has all of the extra probability."""

    def cells_of(n_groups: int, seed: int) -> pl.DataFrame:
        tokens, _, [(_, layers, logits)] = words(n_groups=n_groups, n_tokens=12, seed=seed)
        logits = logits.copy()
        logits[..., 10] += 3.0
        return logit_cells([(tokens, layers, logits)], tokens, ["group_id", "lang"])

    true = committee(cells_of(200, 1000), "lang", 16, k=2)["coverage"][0]
    held = 0
    for seed in range(25):
        row = committee(cells_of(16, seed), "lang", 16, k=2).row(10, named=True)
        held += row["coverage_low"] <= true <= row["coverage_high"]
    assert held >= 21


def test_anchor_information_by_hand() -> None:
    tokens = pl.DataFrame({"doc_id": "a", "group_id": "a", "pos": range(8), "segment": "analysis"})
    routing = tokens.select(
        "doc_id", "pos", layer=pl.lit(0), expert_ids=pl.Series([[1], [1], [0], [0], [0], [0], [0], [1]])
    )
    anchors = pl.DataFrame({"doc_id": "a", "pos": [0, 1], "event": "wait"})
    found = anchor_pmi(tokens, routing, anchors, 3)
    assert found["npmi"].to_list() == [None, pytest.approx((0 + np.log2(8 / 3)) / np.log2(8 / 2)), None]
    row = found.row(1, named=True)
    assert (row["rate"], row["base_rate"], row["n_anchors"], row["n_tokens"]) == (1.0, 3 / 8, 2, 8)


def test_anchors_of_chance_have_no_information_and_planted_ones_do(words) -> None:
    tokens, routing, _ = words()
    rng = np.random.default_rng(0)
    at = rng.random(len(tokens)) < 0.1
    anchors = tokens.filter(pl.Series(at)).select("doc_id", "pos", event=pl.lit("x"))
    null = anchor_pmi(tokens, routing, anchors, 16)
    covered = (null["low"] <= 0) & (null["high"] >= 0)
    assert covered.mean() > 0.8
    lists = [[7, 1] if mark else chosen for mark, chosen in zip(at, routing["expert_ids"].to_list(), strict=True)]
    planted = anchor_pmi(tokens, routing.with_columns(expert_ids=pl.Series(lists)), anchors, 16)
    top = planted.drop_nulls("npmi").sort("npmi", descending=True).row(0, named=True)
    assert top["expert"] in (1, 7)
    assert top["low"] > 0.2


def geometry(aligned: bool, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Routes follow the hidden state; or, not aligned, also the language, of which the states know nothing."""
    rng = np.random.default_rng(seed)
    n = 40
    states = rng.normal(size=(n, 12))
    language = np.arange(n) % 2
    logits = states @ rng.normal(size=(12, 16)) * 0.5
    if not aligned:
        logits[:, 0] += 3.0 * language
    routes = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    docs = [f"d{doc:02}" for doc in range(n)]
    counts = pl.DataFrame(
        {"doc_id": np.repeat(docs, 16), "layer": 0, "expert": np.tile(np.arange(16), n), "slots": routes.ravel()}
    )
    hidden = pl.DataFrame({"doc_id": docs, "layer": 0, "mean_in": states.tolist()})
    return counts, hidden, pl.DataFrame({"doc_id": docs, "lang": np.where(language, "ja", "en")})


def test_what_geometry_explains_is_not_called_language() -> None:
    plain = geometry_baseline(*geometry(aligned=True), "lang", 16, n_shuffles=199).row(0, named=True)
    assert plain["r2"] > 0.2
    assert plain["p"] > 0.05
    beyond = geometry_baseline(*geometry(aligned=False), "lang", 16, n_shuffles=199).row(0, named=True)
    assert beyond["p"] == pytest.approx(1 / 200)
    assert beyond["gap_residual"] > 0.01
    assert (beyond["n_docs"], beyond["n_pairs"]) == (40, 780)


def test_a_document_without_a_state_is_an_error() -> None:
    counts, hidden, labels = geometry(aligned=True)
    with pytest.raises(FrameError, match="got none for d39"):
        geometry_baseline(counts, hidden.head(39), labels, "lang", 16)


def test_translations_find_each_other_by_topic_only(draw) -> None:
    same = slot_counts(
        *draw(n_groups=12, n_tokens=200, n_layers=2, n_experts=16, k=2, seed=0, spread=0.0), ["group_id", "lang"]
    )
    chance = translation_retrieval(same, "lang", ("ja", "en"), 16)
    assert chance["hits"].max() < 0.4
    assert chance["chance"][0] == pytest.approx(1 / 12)
    content = draw(n_groups=12, n_tokens=200, n_layers=2, n_experts=16, k=2, seed=0, spread=1.5)[1]
    copy = content.filter(pl.col("doc_id").str.ends_with("ja"))
    twin = copy.with_columns(doc_id=pl.col("doc_id").str.replace("ja", "en"))
    tokens = draw(n_groups=12, n_tokens=200, n_layers=2, n_experts=16, k=2, seed=0)[0]
    found = translation_retrieval(
        slot_counts(tokens, pl.concat([copy, twin]), ["group_id", "lang"]), "lang", ("ja", "en"), 16
    )
    assert found["hits"].to_list() == [1, 1]
    assert (found["low"] < 1).all()


def test_texts_that_come_three_times_are_no_language() -> None:
    """Labels shuffled document by document called 28 of 40 such runs a finding: copies of a text kept no label."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        texts = [(f"g{group}", lang) for group in range(12) for lang in ("ja", "en")]
        counts, hidden, labels = [], [], []
        for group, lang in texts:
            routes, state = rng.dirichlet(np.full(16, 2.0)), rng.normal(size=8)  # of the text, whatever its language
            for effort in range(3):
                name = f"{group}-{lang}-{effort}"
                labels.append((name, lang, group))
                counts += [(name, 0, expert, int(n)) for expert, n in enumerate(rng.multinomial(400, routes))]
                hidden.append((name, 0, (state + rng.normal(size=8)).tolist()))
        frames = [
            pl.DataFrame(rows, schema=names, orient="row")
            for rows, names in (
                (counts, ["doc_id", "layer", "expert", "slots"]),
                (hidden, ["doc_id", "layer", "mean_in"]),
                (labels, ["doc_id", "lang", "group_id"]),
            )
        ]
        found.append(geometry_baseline(*frames, "lang", 16, n_shuffles=99, seed=seed)["p"][0])
    assert sum(p <= 0.05 for p in found) <= 4
    blind = geometry_baseline(*frames[:2], frames[2].drop("group_id"), "lang", 16, n_shuffles=99)["p"][0]
    assert blind < found[-1]


def test_a_label_that_a_unit_has_alone_is_exchanged_between_units() -> None:
    owner, topic = np.repeat([0, 1, 2, 3], 3), np.repeat([0, 0, 1, 1], 3)
    for shuffled in _exchanged_labels(topic, owner, 20, np.random.default_rng(0)):
        assert all(len(set(shuffled[owner == unit])) == 1 for unit in range(4))
        assert shuffled.sum() == topic.sum()
    assert any((part != topic).any() for part in _exchanged_labels(topic, owner, 20, np.random.default_rng(0)))
