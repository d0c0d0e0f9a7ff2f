"""Losses by language find a planted difference, do not find one in noise, and draw facts rather than items."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.losses import (
    carries,
    choose_metric,
    family_of,
    holm,
    item_losses,
    judge,
    language_losses,
)

CONTROLS = [f"control {n}" for n in range(99)]


def items(costs: dict[str, tuple[float, float]], n: int = 40, noise: float = 0.3, copies: int = 1) -> pl.DataFrame:
    """Items of two families in both languages; `costs` is what a condition takes from (ja, en)."""
    rng = np.random.default_rng(5)
    base = {(task, item): rng.normal(-2, 1) for task in TASKS for item in range(n)}
    rows = []
    for condition, (ja, en) in {"baseline": (0.0, 0.0), **costs}.items():
        for (task, item), value in base.items():
            lang = task[-2:]
            loss = 0.0 if condition == "baseline" else {"ja": ja, "en": en}[lang] + rng.normal(0, noise)
            for copy in range(copies):
                group = f"{task[:4]}{item}"
                rows.append((condition, task, item * copies + copy, group, lang, "logprob", True, value - loss))
    names = ("condition", "task", "item", "group", "lang", "metric", "higher_is_better", "value")
    return pl.DataFrame(rows, schema=list(names), orient="row")


TASKS = ("facts_ja", "facts_en", "sums_ja", "sums_en")


def judged(costs: dict[str, tuple[float, float]], n_controls: int = 99) -> pl.DataFrame:
    controls = CONTROLS[:n_controls]
    losses = item_losses(items({**costs, **dict.fromkeys(controls, (0.2, 0.2))}))
    summary = language_losses(losses, "logprob")
    found = judge(losses, summary, dict.fromkeys(costs, controls), "logprob")
    return found.with_columns(carries=carries(found))


def test_a_planted_language_is_found_and_an_even_loss_is_not() -> None:
    found = judged({"ja set": (1.0, 0.2), "en set": (0.1, 0.9), "even": (0.8, 0.8)})
    assert found["carries"].to_list() == ["ja", "en", "none"]
    row = found.row(0, named=True)
    assert row["loss_ja"] == pytest.approx(1.0, abs=0.15)
    assert row["loss_en"] == pytest.approx(0.2, abs=0.15)
    assert row["selectivity"] == pytest.approx(0.8, abs=0.2)
    assert row["selectivity_low"] < row["selectivity"] < row["selectivity_high"]
    assert row["p_controls"] == 1 / 100
    assert row["p_holm"] == pytest.approx(3 / 100)  # of three tests
    assert found["n_tests"].to_list() == [3, 3, 3]


def test_too_few_controls_can_never_find_anything() -> None:
    targets = [f"set {n}" for n in range(4)]
    found = judged(dict.fromkeys(targets, (1.0, 0.2)), n_controls=39)
    assert (found["p_controls"] == 1 / 40).all()
    assert found["p_holm"].to_list() == pytest.approx([4 / 40] * 4)
    assert found["carries"].to_list() == ["none"] * 4


def test_p_values_of_noise_are_not_small_too_often() -> None:
    """A target that is one more control: its p is at most 0.1 about one time in ten."""
    small = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=40)
        rows = pl.DataFrame({"condition": [f"c{n}" for n in range(40)], "selectivity": values})
        losses = pl.DataFrame(
            schema={"condition": pl.String, "family": pl.String, "lang": pl.String, "group": pl.String,
                    "metric": pl.String, "loss": pl.Float64}
        )  # fmt: skip
        found = judge(losses, rows, {"c0": [f"c{n}" for n in range(1, 40)]}, "logprob")
        small += found["p_controls"][0] <= 0.1
    assert small <= 13  # 6 expected; more than 13 has probability 0.002


def test_copies_of_an_item_add_no_certainty() -> None:
    once = language_losses(item_losses(items({"set": (0.5, 0.1)})), "logprob").row(0, named=True)
    thrice = language_losses(item_losses(items({"set": (0.5, 0.1)}, copies=3)), "logprob").row(0, named=True)
    assert thrice["n_items_ja"] == 3 * once["n_items_ja"]
    assert thrice["n_groups"] == once["n_groups"]
    widths = [row["selectivity_high"] - row["selectivity_low"] for row in (once, thrice)]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)


def test_families_weigh_alike_and_those_of_one_language_are_left_out() -> None:
    frame = items({"set": (0.5, 0.5)}, noise=0.0)
    alone = frame.filter(pl.col("task") == "facts_ja").with_columns(task=pl.lit("only_ja"), value=pl.col("value") - 100)
    more = frame.filter(pl.col("task") == "sums_en", pl.col("item") < 10).with_columns(item=pl.col("item") + 1000)
    found = language_losses(item_losses(pl.concat([frame, alone, more])), "logprob").row(0, named=True)
    assert found["loss_ja"] == pytest.approx(0.5)
    assert found["loss_en"] == pytest.approx(0.5)
    assert found["n_items_ja"] == 80
    assert found["n_items_en"] == 90


def test_lower_is_better_turns_the_sign_and_one_language_has_no_selectivity() -> None:
    frame = items({"set": (0.5, 0.5)}, noise=0.0).filter(pl.col("lang") == "ja")
    turned = frame.with_columns(higher_is_better=pl.lit(False))
    (row,) = language_losses(item_losses(turned), "logprob").iter_rows(named=True)
    assert row["loss_ja"] == pytest.approx(-0.5)
    assert row["loss_en"] is None
    assert row["selectivity"] is None
    losses = item_losses(frame)
    found = judge(losses, language_losses(losses, "logprob"), {"set": []}, "logprob")
    assert found["p_controls"].to_list() == [None]
    assert carries(found).to_list() == ["none"]


def test_conditions_with_other_items_are_refused() -> None:
    frame = items({"set": (0.5, 0.5)})
    with pytest.raises(FrameError, match="expected the baseline's items"):
        item_losses(frame.filter((pl.col("condition") == "baseline") | (pl.col("item") > 3)))
    with pytest.raises(FrameError, match="expected one of logprob, got 'acc'"):
        choose_metric(frame, "acc")
    assert choose_metric(frame) == "logprob"


def test_names_and_holm() -> None:
    assert family_of("workbench_facts_ja") == "workbench_facts"
    assert family_of("workbench_reference_sums_en_low") == family_of("workbench_reference_sums_ja_low")
    assert family_of("mgsm_direct_ja") == "mgsm_direct"
    adjusted = holm(np.array([0.01, 0.04, 0.03, np.nan]))
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, np.nan])
