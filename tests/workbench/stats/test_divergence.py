from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.divergence import (
    chance_overlap,
    h_js_divergence,
    js_divergence,
    paired_divergence,
    top_overlap,
    total_variation,
    weighted_jaccard,
)
from workbench.stats.load import slot_counts
from workbench.stats.logits import logit_cells

BOTH = ("ja", "en")


def test_chance_overlap_of_8_of_128() -> None:
    chance = chance_overlap(8, 128)
    assert chance["shared"] == pytest.approx(0.5)
    assert chance["jaccard"] == pytest.approx(0.0343, abs=5e-5)
    assert chance["any"] == pytest.approx(0.412, abs=5e-4)
    rng = np.random.default_rng(0)
    sets = rng.random((2, 20_000, 24)).argsort(-1)[..., :4]
    shared = (sets[0][:, :, None] == sets[1][:, None, :]).any(-1).sum(-1)
    assert (shared / (8 - shared)).mean() == pytest.approx(chance_overlap(4, 24)["jaccard"], abs=0.003)


def test_normalised_variants_by_hand() -> None:
    p, q = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0, 0.0])
    assert h_js_divergence(p, q) == pytest.approx(0.5)  # 1 bit of the 2 bits that E = 4 allows
    assert h_js_divergence(np.ones(4), np.ones(4)) == 0
    assert total_variation(p, q) == 1
    assert total_variation(np.array([0.5, 0.5]), np.array([0.8, 0.2])) == pytest.approx(0.3)
    assert weighted_jaccard(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == pytest.approx(0.5 / 1.5)


def test_more_even_layers_look_closer_by_jsd_but_not_by_the_normalised_measure() -> None:
    """Why H-JS: mixing both with the uniform distribution shrinks JSD much faster than what is left to know."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(64), 2)
    mixed = [0.1 * x + 0.9 / 64 for x in (p, q)]
    assert js_divergence(*mixed) < 0.1 * js_divergence(p, q)
    assert h_js_divergence(*mixed) > 0.5 * h_js_divergence(p, q)


@pytest.mark.parametrize("measure", ["jsd", "h_js", "tv"])
def test_each_measure_has_its_floor_taken_off(draw, measure: str) -> None:
    counts = slot_counts(
        *draw(n_groups=30, n_tokens=20, n_layers=2, n_experts=8, k=2, seed=0, shift=3.0), ["group_id", "lang"]
    )
    frame = paired_divergence(counts, "lang", BOTH, 8, measure=measure)
    assert (frame["floor"] > 0).all()
    # experts used almost evenly hold next to no information, and a share of that is mostly noise
    assert frame["excess"][0] > 0 if measure == "h_js" else frame["excess_low"][0] > 0
    assert frame["excess_low"][1] < 0 < frame["excess_high"][1]


def test_the_divergence_of_probabilities_takes_the_logits(words) -> None:
    tokens, _, shards = words(context=2.0)
    cells = logit_cells(shards, tokens, ["group_id", "lang"])
    frame = paired_divergence(cells, "lang", BOTH, 16, measure="h_js", value=pl.col("prob"))
    assert frame["excess_low"].item() > 0.001


def test_where_every_expert_is_chosen_there_are_no_top_sets(words) -> None:
    tokens, routing, _ = words()
    overlap = top_overlap(slot_counts(tokens, routing, ["group_id", "lang"]), "lang", BOTH, 16, sizes=(16, 32))
    assert overlap.is_empty()
    assert {"layer", "n", "between", "gap_low"} <= set(overlap.columns)


def test_top_sets_overlap_less_between_languages_than_within(words) -> None:
    tokens, routing, _ = words(context=3.0, n_groups=40)
    overlap = top_overlap(slot_counts(tokens, routing, ["group_id", "lang"]), "lang", BOTH, 16, sizes=(1, 4, 99))
    assert overlap["n"].to_list() == [1, 4]
    first = overlap.row(0, named=True)
    assert first["gap"] == pytest.approx(first["within"] - first["between"])
    assert first["gap_low"] > 0
    assert first["chance"] == pytest.approx(1 / 16)


def test_between_and_floor_by_hand_when_one_language_varies_more() -> None:
    """Four groups; Japanese documents are alike, English ones use expert 0 or 1 by turns."""
    rows = []
    for group in range(4):
        rows.append((f"g{group}", "ja", 0, 2, 8, 8))
        rows.append((f"g{group}", "en", 0, group % 2, 8, 8))
    names = ["group_id", "lang", "layer", "expert", "slots", "n_tokens"]
    counts = pl.DataFrame(rows, schema=names, orient="row")
    n_splits, seed = 25, 3
    found = paired_divergence(counts, "lang", BOTH, 3, n_splits=n_splits, seed=seed).row(0, named=True)
    # a half with both kinds of English is (1/2, 1/2); one with a single kind leaves the other kind to the other half,
    # at a JSD of 1 bit; and Japanese against English is 1 bit always
    ranks = np.random.default_rng(seed).random((n_splits, 4)).argsort(1)
    apart = [set(np.flatnonzero(rank < 2) % 2) for rank in ranks]
    share = np.mean([len(kinds) == 1 for kinds in apart])
    assert 0 < share < 1
    assert found["between"] == pytest.approx(1.0)
    assert found["floor"] == pytest.approx(share / 2)  # half of it is English, half Japanese, which is 0
    assert found["excess"] == pytest.approx(1 - share / 2)
    swapped = counts.with_columns(lang=pl.when(pl.col("lang") == "ja").then(pl.lit("en")).otherwise(pl.lit("ja")))
    again = paired_divergence(swapped, "lang", BOTH, 3, n_splits=n_splits, seed=seed).row(0, named=True)
    assert again["floor"] == pytest.approx(share / 2)


def test_published_chance_levels() -> None:
    """Mixtral, top 2 of 8: 46% share an expert by chance (arXiv 2401.04088, table 5)."""
    assert chance_overlap(2, 8)["any"] == pytest.approx(0.464, abs=5e-4)
    assert chance_overlap(1, 8)["any"] == pytest.approx(0.125)


def test_small_samples_diverge_by_themselves() -> None:
    """100 tokens of 8 slots from documents around one distribution: about 0.4, 0.07 and 0.008 bits at 1, 10, 100."""
    rng = np.random.default_rng(0)
    base = rng.dirichlet(np.ones(128))

    def sample(n_docs: int) -> np.ndarray:
        return sum(rng.multinomial(800, q) for q in rng.dirichlet(60 * base, n_docs)).astype(float)

    means = [np.mean([js_divergence(sample(n), sample(n)) for _ in range(20)]) for n in (1, 10, 100)]
    assert means == pytest.approx([0.40, 0.072, 0.008], rel=0.15)
