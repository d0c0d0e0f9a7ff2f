from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.contrasts import flag_experts, paired_contrasts
from workbench.stats.load import frequency_cube, slot_counts
from workbench.stats.matching import (
    fertility,
    match_length,
    match_tokens,
    matching_summary,
    select_tokens,
    with_position_bin,
)

BOTH = ("ja", "en")


def by_hand() -> pl.DataFrame:
    rows = [("ja", 7), ("ja", 7), ("ja", 7), ("ja", 1), ("en", 7), ("en", 2), ("en", 9), ("ja", 9)]
    return pl.DataFrame(rows, schema=["lang", "token_id"], orient="row").with_columns(
        doc_id="a-" + pl.col("lang"), group_id=pl.lit("a"), pos=pl.int_range(pl.len()), segment=pl.lit("user")
    )


def test_mantel_haenszel_weights_by_hand() -> None:
    matched = match_tokens(by_hand(), "lang", BOTH)
    # word 7: 3 and 1 tokens, w = 3/4; word 9: 1 and 1, w = 1/2; words 1 and 2 are in one language only
    assert sorted(matched.select("lang", "token_id", "weight").rows()) == [
        ("en", 7, 0.75), ("en", 9, 0.5), ("ja", 7, 0.25), ("ja", 7, 0.25), ("ja", 7, 0.25), ("ja", 9, 0.5),
    ]  # fmt: skip


def test_matched_frequencies_differ_by_the_stratified_risk_difference() -> None:
    tokens = by_hand()
    experts = [0, 1, 1, 0, 0, 0, 1, 0]  # word 7: ja 1/3, en 1 on expert 0; word 9: ja 1, en 0
    routing = tokens.select("doc_id", "pos", layer=pl.lit(0), expert_ids=pl.Series([[expert] for expert in experts]))
    counts = slot_counts(match_tokens(tokens, "lang", BOTH), routing, ["group_id", "lang"])
    _, _, cube = frequency_cube(counts, "lang", BOTH, n_experts=2)
    assert cube[0, 0, 0, 0] - cube[1, 0, 0, 0] == pytest.approx((0.75 * (1 / 3 - 1) + 0.5 * (1 - 0)) / 1.25)
    np.testing.assert_allclose(cube.sum(-1), 1)
    assert counts["n_tokens"].unique().sort().to_list() == [2, 4]  # tokens, not weights


def test_vocabulary_is_not_taken_for_language(words) -> None:
    """The planted confound: a frequent Japanese word owns expert 1; only expert 0 follows the language."""
    tokens, routing, _ = words(context=2.0, word=3.0)
    everything = paired_contrasts(slot_counts(tokens, routing, ["group_id", "lang"]), "lang", BOTH, 16)
    matched = match_tokens(tokens, "lang", BOTH)
    shared = paired_contrasts(slot_counts(matched, routing, ["group_id", "lang"]), "lang", BOTH, 16)
    assert set(everything.head(2)["expert"]) == {0, 1}
    assert flag_experts(shared, 0.1).filter("flagged")["expert"].to_list() == [0]
    word = shared.filter(pl.col("expert") == 1).row(0, named=True)
    assert word["low"] < 0.02
    assert everything.filter(pl.col("expert") == 1)["risk_difference"].item() > 0.25


def test_position_bins_grow_and_may_be_matched(words) -> None:
    tokens, _, _ = words(n_groups=2, fertility=2.0)
    binned = with_position_bin(tokens)
    lower = binned.filter(pl.col("pos").is_in([0, 1, 3, 4, 15, 16, 63, 64]))["position_bin"].unique().sort()
    assert lower.to_list() == [0, 1, 4, 16, 64]
    matched = match_tokens(binned, "lang", BOTH, strata=("position_bin",))
    assert matched["position_bin"].max() == 16  # English ends at 60
    sums = matched.group_by("group_id", "lang", "position_bin").agg(pl.col("weight").sum()).sort("position_bin")
    assert sums.group_by("group_id", "position_bin").agg(spread=pl.col("weight").std())["spread"].max() < 1e-9


def test_windows_are_as_long_as_the_shorter_condition(words) -> None:
    tokens, _, _ = words(n_groups=3, n_tokens=20, fertility=2.0)
    one_sided = tokens.filter((pl.col("group_id") != "0002") | (pl.col("lang") == "ja"))
    matched = match_length(one_sided, "lang", BOTH)
    assert matched.group_by("group_id", "lang").len()["len"].unique().to_list() == [20]
    assert matched["group_id"].unique().sort().to_list() == ["0000", "0001"]
    assert matched.filter(pl.col("lang") == "ja")["pos"].max() == 19
    summary = matching_summary(tokens, matched, "lang").rows(named=True)
    assert summary[1] == {
        "lang": "ja", "n_tokens": 120, "n_kept": 40, "share": pytest.approx(1 / 3), "n_units": 3, "n_units_kept": 2,
    }  # fmt: skip


def test_the_first_tokens_may_be_left_out(words) -> None:
    tokens, _, _ = words(n_groups=1, n_tokens=10)
    assert select_tokens(tokens, skip_first=4)["pos"].min() == 4
    assert select_tokens(tokens.with_columns(segment=pl.lit("control"))).is_empty()


def test_fertility_is_the_ratio_of_tokens_within_groups(words) -> None:
    tokens, _, _ = words(n_groups=6, n_tokens=40, fertility=1.5)
    found = fertility(tokens.with_columns(token=pl.lit(" ab")), "lang", BOTH).row(0, named=True)
    assert (found["first"], found["second"]) == (60, 40)
    assert [found[name] for name in ("ratio", "low", "high")] == pytest.approx([1.5] * 3)
    assert found["chars_per_token_first"] == 2
    assert found["n_groups"] == 6
    with pytest.raises(FrameError, match="expected a group_id with both ja and en, got none"):
        fertility(tokens.filter(pl.col("lang") == "ja").with_columns(token=pl.lit("a")), "lang", BOTH)
