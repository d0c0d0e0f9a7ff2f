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


def test_top_sets_overlap_less_between_languages_than_within(words) -> None:
    tokens, routing, _ = words(context=3.0, n_groups=40)
    overlap = top_overlap(slot_counts(tokens, routing, ["group_id", "lang"]), "lang", BOTH, 16, sizes=(1, 4, 99))
    assert overlap["n"].to_list() == [1, 4]
    first = overlap.row(0, named=True)
    assert first["gap"] == pytest.approx(first["within"] - first["between"])
    assert first["gap_low"] > 0
    assert first["chance"] == pytest.approx(1 / 16)
