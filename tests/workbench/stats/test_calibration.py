"""Scores of the pipeline on trials written by hand, whose right answers are plain."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import ConfigError
from workbench.stats.calibration import (
    accuracy,
    average_precision,
    binomial_interval,
    choose_floors,
    coverage,
    effect_floors,
    family_wise_error,
    floor_curve,
)


def trial(draw: int, effects: list[float], truth: list[bool], p: list[float], **other: object) -> pl.DataFrame:
    """One trial of one layer; signs are positive, logits twice the effects, intervals of half-width 0.1."""
    n = len(effects)
    values = np.array(effects)
    columns = {
        "contrast": "shared", "kind": "planted", "strength": 0.25, "model": 0, "n_groups": 40, "draw": draw,
        "layer": 0, "expert": range(n), "role": [f"role{e}" for e in range(n)], "truth": truth,
        "sign": [1 if t else 0 for t in truth], "uses": 5.0, "risk_difference": values, "low": values - 0.1,
        "high": values + 0.1, "p_adjusted": p, "logit_difference": 2 * values, "logit_d": 2 * values,
        "logit_low": 2 * values - 0.1, "logit_high": 2 * values + 0.1, "logit_p_adjusted": p,
    }  # fmt: skip
    return pl.DataFrame(columns | other)


def test_accuracy_counts_right_wrong_and_missed() -> None:
    trials = pl.concat(
        [
            trial(0, [0.5, 0.2, 0.0], [True, False, True], [0.01, 0.01, 0.9]),
            trial(1, [0.4, 0.0, 0.3], [True, False, True], [0.01, 0.90, 0.01]),
        ]
    )
    row = accuracy(trials).row(0, named=True)
    assert (row["n_trials"], row["n_true"], row["n_flagged"]) == (2, 2.0, 2.0)
    assert row["precision"] == pytest.approx(3 / 4)
    assert row["recall"] == pytest.approx(3 / 4)
    assert row["wrong"] == "role1 1"
    assert row["precision_low"] == pytest.approx(1 / 2)
    assert row["precision_high"] == 1
    floored = accuracy(trials, risk_floor=0.25).row(0, named=True)
    assert (floored["precision"], floored["recall"], floored["wrong"]) == (1, pytest.approx(3 / 4), "")


def test_a_flag_with_the_wrong_sign_is_wrong() -> None:
    trials = trial(0, [-0.5, 0.5], [True, True], [0.01, 0.01])
    row = accuracy(trials).row(0, named=True)
    assert (row["precision"], row["recall"]) == (0.5, 0.5)


def test_logits_must_agree_when_they_have_a_floor() -> None:
    trials = trial(0, [0.5, 0.4], [True, False], [0.01, 0.01], logit_d=[0.6, -0.6])
    assert accuracy(trials)["n_flagged"][0] == 2
    assert accuracy(trials, 0.0, 0.5)["n_flagged"][0] == 1


def test_average_precision_by_hand() -> None:
    trials = trial(0, [0.5, -0.4, 0.3, 0.1], [True, False, True, False], [1.0] * 4)
    found = average_precision(trials).filter(score="risk_difference")["average_precision"][0]
    assert found == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(trial(0, [0.5], [False], [1.0])).is_empty()


def test_family_wise_error_counts_trials_not_tests() -> None:
    null = {"contrast": "null"}
    trials = pl.concat(
        [
            trial(0, [0.3, 0.3], [False, False], [0.01, 0.02], **null),
            trial(1, [0.3, 0.0], [False, False], [0.50, 0.90], **null),
            trial(2, [0.3, 0.0], [False, False], [0.06, 0.05], **null),
            trial(3, [0.9, 0.9], [True, True], [0.01, 0.01]),  # no null: not counted
        ]
    )
    found = {test: (n, errors) for test, n, errors in family_wise_error(trials).select(pl.nth(0, 1, 2)).rows()}
    assert found == {"risk_difference": (3, 2), "logit": (3, 2), "flagged": (3, 2)}
    floored = family_wise_error(trials, risk_floor=0.2).filter(test="flagged")
    assert floored["n_errors"][0] == 1


def test_binomial_interval_is_the_exact_one() -> None:
    assert binomial_interval(20, 400) == pytest.approx((0.030808, 0.076167), abs=1e-5)
    assert binomial_interval(0, 10) == (0.0, pytest.approx(0.308498, abs=1e-5))
    assert binomial_interval(0, 0) == (0.0, 1.0)


def test_coverage_of_intervals_with_a_known_share() -> None:
    rng = np.random.default_rng(0)
    half_width = 1.2815516  # of an 80% interval of a standard normal
    trials = []
    for draw in range(400):
        values = rng.normal(size=10)
        around = {"low": values - half_width, "high": values + half_width}
        trials.append(trial(draw, values.tolist(), [False] * 10, [1.0] * 10, contrast="null", **around))
    row = coverage(pl.concat(trials)).filter(statistic="risk_difference").row(0, named=True)
    assert row["coverage"] == pytest.approx(0.8, abs=0.02)
    assert row["coverage_low"] < 0.8 < row["coverage_high"]
    assert (row["n_trials"], row["n_intervals"], row["experts"]) == (400, 4000, "used")


def test_coverage_takes_the_truth_from_the_other_trials_and_leaves_small_cells_out() -> None:
    rng = np.random.default_rng(1)
    trials = pl.concat(
        [trial(draw, rng.normal(3, 1, 10).tolist(), [True] * 10, [1.0] * 10) for draw in range(100)]
    ).with_columns(low=pl.col("risk_difference") - 1.96, high=pl.col("risk_difference") + 1.96)
    row = coverage(trials).filter(statistic="risk_difference").row(0, named=True)
    assert row["coverage"] == pytest.approx(0.95, abs=0.025)
    assert coverage(trials.filter(pl.col("draw") < 19)).is_empty()


def test_rare_experts_and_empty_intervals_stand_apart() -> None:
    trials = pl.concat(
        [
            trial(draw, [0.0, 0.0, 0.0], [False] * 3, [1.0] * 3, contrast="null").with_columns(
                uses=pl.Series([5.0, 0.1, 0.0]), low=pl.Series([-1.0, 1.0, 0.0]), high=pl.Series([1.0, 2.0, 0.0])
            )
            for draw in range(20)
        ]
    )
    found = coverage(trials).filter(statistic="risk_difference").select("experts", "coverage", "n_intervals")
    assert dict(found.select("experts", "coverage").rows()) == {"used": 1.0, "rare": 0.0}
    assert set(found["n_intervals"]) == {20}


def test_floors_are_chosen_by_the_worst_cell_then_by_recall() -> None:
    weak = trial(0, [0.30, 0.12, 0.04], [True, False, False], [0.01] * 3, strength=0.1)
    strong = trial(0, [0.90, 0.18, 0.04], [True, False, False], [0.01] * 3, strength=1.0)
    risk_floor, logit_floor = choose_floors(pl.concat([weak, strong]))
    flagged = pl.concat([weak, strong]).filter(
        pl.col("risk_difference") >= risk_floor, pl.col("logit_d") >= logit_floor
    )
    assert flagged["expert"].to_list() == [0, 0]
    curve = floor_curve(strong)
    at_zero = curve.filter(risk_floor=0.0, logit_floor=0.0).row(0, named=True)
    assert at_zero["precision"] == pytest.approx(1 / 3)
    assert at_zero["recall"] == 1


def test_floors_of_a_shape_that_nobody_calibrated_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a calibrated shape .*got 7 experts with k=3.*workbench calibrate"):
        effect_floors(7, 3)
    for shape in ((32, 4), (128, 8)):
        risk_floor, logit_floor = effect_floors(*shape)
        assert 0 <= risk_floor < 1
        assert 0 < logit_floor <= 1
