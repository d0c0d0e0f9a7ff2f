from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.contrasts import flag_experts, paired_contrasts
from workbench.stats.load import slot_counts
from workbench.stats.logits import centred, logit_cells
from workbench.stats.matching import match_tokens

BOTH = ("ja", "en")


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3, 9)).astype(np.float32)
    np.testing.assert_allclose(centred(logits + 5), centred(logits), atol=1e-5)
    np.testing.assert_allclose(np.median(centred(logits), axis=-1), 0, atol=1e-7)


def test_means_by_hand_over_shards_with_weights(words) -> None:
    tokens, _, [(_, layers, logits)] = words(n_groups=3, n_tokens=40)
    halves = [(tokens[:90], layers, logits[:90]), (tokens[90:], layers, logits[90:])]
    matched = match_tokens(tokens, "lang", BOTH)
    cells = logit_cells(halves, matched, ["group_id", "lang"])
    place = tokens.with_row_index("row").join(matched.select("doc_id", "pos", "weight"), on=["doc_id", "pos"])
    unit = place.filter(pl.col("group_id") == "0001", pl.col("lang") == "ja")
    rows, weight = unit["row"].to_numpy(), unit["weight"].to_numpy()
    expected = (centred(logits)[rows, 0] * weight[:, None]).sum(0) / weight.sum()
    found = cells.filter(pl.col("group_id") == "0001", pl.col("lang") == "ja").sort("expert")
    np.testing.assert_allclose(found["logit"], expected, atol=1e-12)
    assert found["prob"].sum() == pytest.approx(1)
    assert found["n_tokens"].unique().to_list() == [len(rows)]


def test_the_contrast_in_logits_is_the_planted_shift_and_displaces_nobody(words) -> None:
    """Closure: selection frequencies of unplanted experts fall when expert 0 rises; their logits do not."""
    tokens, routing, shards = words(context=2.0)
    by = ["group_id", "lang"]
    contrasts = paired_contrasts(
        slot_counts(tokens, routing, by), "lang", BOTH, 16, logits=logit_cells(shards, tokens, by)
    )
    top = contrasts.row(0, named=True)
    assert top["expert"] == 0
    assert top["logit_difference"] == pytest.approx(2.0, abs=0.25)
    assert top["logit_low"] < top["logit_difference"] < top["logit_high"]
    others = contrasts.filter(pl.col("expert") != 0)
    assert others["risk_difference"].sum() == pytest.approx(-top["risk_difference"])
    assert (others["risk_difference"] < 0).sum() >= 13
    assert others["logit_d"].abs().max() < 0.35
    assert flag_experts(contrasts, 0.05, logit_floor=0.5).filter("flagged")["expert"].to_list() == [0]


def test_tokens_without_logits_are_left_out_and_none_at_all_gives_an_empty_frame(words) -> None:
    tokens, _, [(_, layers, logits)] = words(n_groups=2, n_tokens=5)
    some = logit_cells([(tokens[:10], layers, logits[:10])], tokens, ["group_id", "lang"])
    assert some["group_id"].unique().to_list() == ["0000"]
    assert logit_cells([], tokens, ["group_id"]).is_empty()


@pytest.mark.slow
def test_the_shared_token_pipeline_errs_in_one_family_of_twenty_at_most(words) -> None:
    """No language anywhere, but words and topics with experts of their own: frequencies and logits, 200 families."""
    by, n = ["group_id", "lang"], 200
    rejected = np.zeros(2)
    for seed in range(n):
        tokens, routing, shards = words(n_groups=16, n_tokens=30, n_experts=12, word=2.0, seed=seed)
        shared = match_tokens(tokens, "lang", BOTH)
        cells = logit_cells(shards, shared, by)
        found = paired_contrasts(slot_counts(shared, routing, by), "lang", BOTH, 12, logits=cells, n_resamples=400)
        rejected += [(found[name] <= 0.05).any() for name in ("p_adjusted", "logit_p_adjusted")]
    assert (rejected / n <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)).all()
