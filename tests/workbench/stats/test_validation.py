from __future__ import annotations

import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.contrasts import paired_contrasts
from workbench.stats.load import slot_counts
from workbench.stats.logits import logit_cells
from workbench.stats.validation import (
    discover_and_validate,
    equivalent_experts,
    selection_stability,
    split_half_reliability,
    without_each,
)

BOTH = ("ja", "en")


@pytest.fixture
def counts(words) -> pl.DataFrame:
    tokens, routing, _ = words(context=1.5, n_groups=40)
    return slot_counts(tokens, routing, ["group_id", "lang"])


def halves(counts: pl.DataFrame) -> pl.DataFrame:
    groups = counts.select("group_id").unique().sort("group_id")
    return groups.with_columns(split=pl.Series(["discovery", "validation"] * (len(groups) // 2)))


def test_what_is_found_on_one_half_is_tested_on_the_other_alone(counts: pl.DataFrame) -> None:
    found = discover_and_validate(counts, halves(counts), "lang", BOTH, 16, risk_floor=0.1)
    row = found.filter(pl.col("expert") == 0).row(0, named=True)
    assert row["replicated"]
    assert row["low"] < row["risk_difference"] < row["high"]
    assert (row["n_groups"], row["n_tests"]) == (20, len(found))


def test_a_chance_find_does_not_replicate(draw) -> None:
    """On null data a lax floor and alpha flag experts in discovery; validation must reject nearly all of them."""
    flagged = replicated = 0
    for seed in range(12):
        counts = slot_counts(
            *draw(n_groups=24, n_tokens=15, n_layers=2, n_experts=8, k=2, seed=seed), ["group_id", "lang"]
        )
        discovery = counts.join(halves(counts).filter(pl.col("split") == "discovery"), on="group_id").drop("split")
        lax = paired_contrasts(discovery, "lang", BOTH, 8).with_columns(p_adjusted=pl.lit(0.0))
        flagged += lax.filter(pl.col("risk_difference").abs() > 0.05).height
        found = discover_and_validate(counts, halves(counts), "lang", BOTH, 8, risk_floor=0.05, alpha=0.9)
        replicated += found.filter(pl.col("p_adjusted") <= 0.05).height
    assert flagged > 20
    assert replicated <= 3


def test_nothing_flagged_gives_an_empty_frame_of_the_same_columns(counts: pl.DataFrame) -> None:
    found = discover_and_validate(counts, halves(counts), "lang", BOTH, 16, risk_floor=0.99)
    assert found.is_empty()
    assert {"replicated", "p_adjusted", "n_tests"} <= set(found.columns)


def test_halves_agree_where_there_is_something_to_agree_on(counts: pl.DataFrame, words) -> None:
    real = split_half_reliability(counts, "lang", BOTH, 16, top=1).row(0, named=True)
    assert real["top_overlap"] == 1.0
    assert real["chance"] == pytest.approx(1 / 16)
    tokens, routing, _ = words(n_groups=40, seed=3)
    null = split_half_reliability(slot_counts(tokens, routing, ["group_id", "lang"]), "lang", BOTH, 16).row(
        0, named=True
    )
    assert abs(null["spearman"]) < 0.5
    assert real["n_groups"] == 40


def test_stability_tells_a_planted_expert_from_noise(counts: pl.DataFrame) -> None:
    stability = selection_stability(counts, "lang", BOTH, 16, risk_floor=0.1)
    assert stability.filter(pl.col("expert") == 0)["stability"].item() == 1.0
    assert stability.filter(pl.col("expert") > 0)["stability"].max() < 0.8


def test_where_the_floor_of_the_share_is_nothing_the_logit_decides(words) -> None:
    """Floors are calibrated as a pair, and that of the share may be 0 (docs/calibration.md)."""
    tokens, routing, shards = words(context=1.5, n_groups=40)
    counts = slot_counts(tokens, routing, ["group_id", "lang"])
    cells = logit_cells(shards, tokens, ["group_id", "lang"])
    with pytest.raises(FrameError, match="expected one above 0, got risk_floor 0 and logit_floor without logits"):
        selection_stability(counts, "lang", BOTH, 16, 0.0)
    stability = selection_stability(counts, "lang", BOTH, 16, 0.0, logits=cells, logit_floor=0.8)
    assert dict(stability.select("expert", "stability").rows()) == {0: 1.0} | dict.fromkeys(range(1, 16), 0.0)
    lax = discover_and_validate(counts, halves(counts), "lang", BOTH, 16, 0.0)
    found = discover_and_validate(counts, halves(counts), "lang", BOTH, 16, 0.0, logits=cells, logit_floor=0.8)
    assert found["expert"].to_list() == [0]  # the others are displaced by it, and no push of their own differs
    assert set(lax["expert"]) > {0}
    assert found["replicated"].all()
    some = cells.filter(pl.col("group_id") < "0020")
    with pytest.raises(FrameError, match="expected the 40 groups of the counts, got 20"):
        selection_stability(counts, "lang", BOTH, 16, 0.0, logits=some, logit_floor=0.8)


def test_sharing_is_a_claim_of_its_own(counts: pl.DataFrame) -> None:
    contrasts = equivalent_experts(paired_contrasts(counts, "lang", BOTH, 16), margin=0.1)
    shared = dict(contrasts.select("expert", "shared").rows())
    assert not shared[0]
    assert sum(shared.values()) >= 10
    assert not equivalent_experts(contrasts, margin=0.001)["shared"].any()


def test_a_difference_of_one_topic_goes_with_it(counts: pl.DataFrame) -> None:
    groups = counts.select("group_id").unique().sort("group_id").with_row_index("row")
    labels = groups.select("group_id", topic=pl.when(pl.col("row") < 10).then(pl.lit("law")).otherwise(pl.lit("food")))
    law = labels.filter(topic="law").select("group_id")
    swap = pl.col("lang").replace({"ja": "en", "en": "ja"})
    alike = pl.concat([counts.join(law, on="group_id"), *(  # outside law both languages have the Japanese counts
        counts.join(law, on="group_id", how="anti").filter(lang="ja").with_columns(lang=lang)
        for lang in (pl.col("lang"), swap)
    )])  # fmt: skip
    found = without_each(alike, labels, "lang", BOTH, 16).filter(expert=0)
    assert found["least"].to_list() == pytest.approx([0.0] * len(found))
    assert found["without"].unique().to_list() == ["law"]
    whole = without_each(counts, labels, "lang", BOTH, 16).filter(expert=0)
    rest = (
        paired_contrasts(counts.join(law, on="group_id", how="anti"), "lang", BOTH, 16).filter(expert=0).sort("layer")
    )
    other = paired_contrasts(counts.join(law, on="group_id"), "lang", BOTH, 16).filter(expert=0).sort("layer")
    smallest = [min(abs(a), abs(b)) for a, b in zip(rest["risk_difference"], other["risk_difference"], strict=True)]
    assert whole["least"].to_list() == pytest.approx(smallest)
    assert whole["n_labels"].unique().to_list() == [2]


def test_one_topic_cannot_be_left_out(counts: pl.DataFrame) -> None:
    labels = counts.select("group_id").unique().with_columns(topic=pl.lit("all"))
    found = without_each(counts, labels, "lang", BOTH, 16)
    assert found["least"].null_count() == found["without"].null_count() == len(found)
