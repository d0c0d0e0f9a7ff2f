"""The gates, small: the pipeline on planted checkpoints. The long run and its figures are in docs/calibration.md."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from workbench.cli import main
from workbench.errors import ConfigError
from workbench.planted.calibrate import Scope, calibrate, plan_trials, quick, run_trials, score
from workbench.planted.design import Design
from workbench.planted.trials import Trial, run_trial
from workbench.plots.calibration import calibration_curves
from workbench.stats.calibration import accuracy, coverage, effect_floors, family_wise_error

FLOORS = effect_floors(32, 4)


def trials_of(contrast: str, n: int, strength: float = 0.25, kind: str = "planted", n_groups: int = 40) -> pl.DataFrame:
    designs = [Design(32, 4, strength=strength, kind=kind, seed=draw % 3) for draw in range(n)]
    return pl.concat([run_trial(Trial(contrast, design, n_groups, draw=d)) for d, design in enumerate(designs, 500)])


@pytest.mark.parametrize("contrast", ["shared", "mode"])
def test_language_in_context_and_mode_are_found(contrast: str) -> None:
    row = accuracy(trials_of(contrast, 4), *FLOORS).row(0, named=True)
    assert row["precision"] >= 0.9
    assert row["recall"] >= 0.95


def test_graded_effort_is_found() -> None:
    row = accuracy(trials_of("effort", 3), *FLOORS).row(0, named=True)
    assert row["precision"] >= 0.9
    assert row["recall"] >= 0.95


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_topic_and_vocabulary_are_never_called_language_on_shared_tokens(strength: float) -> None:
    wrong = accuracy(trials_of("confounded", 3, strength), *FLOORS)["wrong"].str.join(" ").item()
    assert "topic" not in wrong
    assert "vocabulary" not in wrong


def test_all_tokens_do_call_vocabulary_language() -> None:
    """Why the shared-token contrast is the primary one: on all tokens the confound is significant, and not small."""
    floors = (0.0, 0.5)
    assert "vocabulary" in accuracy(trials_of("all", 2), *floors)["wrong"].str.join(" ").item()
    assert "vocabulary" not in accuracy(trials_of("shared", 2), *floors)["wrong"].str.join(" ").item()


def test_significance_alone_is_not_enough() -> None:
    trials = trials_of("mode", 2)
    assert accuracy(trials)["precision"][0] < 0.5 < accuracy(trials, *FLOORS)["precision"][0]


@pytest.mark.slow
def test_the_family_wise_error_and_the_coverage_hold() -> None:
    nulls = pl.concat([trials_of("null", 60, kind=kind) for kind in ("planted", "null")])
    errors = family_wise_error(nulls, *FLOORS)
    assert (errors["low"] <= 0.05).all()  # 5% is within what 120 trials can tell
    assert errors.filter(test="flagged")["rate"][0] <= 0.05
    used = coverage(nulls).filter(experts="used")
    assert set(used["statistic"]) == {"risk_difference", "logit_difference"}
    assert ((used["coverage_high"] >= 0.93) & (used["coverage_low"] <= 0.97)).all()


@pytest.fixture(scope="module")
def tiny() -> Scope:
    return Scope(32, 4, strengths=(0.25,), groups=(10,), draws=2, nulls=3, held=0, n_words=20)


def test_an_interrupted_calibration_continues_to_the_same_tables(tiny: Scope, tmp_path: Path) -> None:
    trials = plan_trials(tiny)
    whole, floors = calibrate(tiny, tmp_path / "whole", progress=False)
    run_trials(trials[:4], tmp_path / "cut" / "trials", progress=False)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut" / "trials").iterdir()}
    again, again_floors = calibrate(tiny, tmp_path / "cut", progress=False)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert floors == again_floors
    for name, table in whole.items():
        assert table.equals(again[name], null_equal=True), name
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == {"trials", "floors.json", *(f"{name}.csv" for name in whole)}


def test_every_trial_has_its_own_name_and_documents(tiny: Scope) -> None:
    for scope in (tiny, quick(128, 8), Scope(32, 4)):
        trials = plan_trials(scope)
        assert len({trial.name for trial in trials}) == len(trials)
    kinds = [trial.design.kind for trial in plan_trials(Scope(32, 4)) if trial.contrast == "null"]
    assert len(kinds) == 400
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"planted": 134, "null": 133, "upcycled": 133}


def test_floors_are_chosen_and_judged_on_different_draws(tiny: Scope, tmp_path: Path) -> None:
    trials = run_trials(plan_trials(tiny), tmp_path, progress=False)
    tables, floors = score(trials)
    assert tables["accuracy"]["n_trials"].unique().to_list() == [1]  # of two draws, the odd one
    spoiled = trials.with_columns(truth=pl.when(pl.col("draw") % 2 == 1).then(False).otherwise("truth"))
    assert score(spoiled)[1] == floors


def test_floors_that_are_given_are_judged_on_every_draw(tiny: Scope, tmp_path: Path) -> None:
    trials = run_trials(plan_trials(tiny), tmp_path, progress=False)
    tables, floors = score(trials, (0.3, 1.0))
    assert floors == (0.3, 1.0)
    assert tables["accuracy"]["n_trials"].unique().to_list() == [2]
    assert tables["accuracy"]["n_flagged"].sum() < tables["accuracy_without_floors"]["n_flagged"].sum()


def test_the_figure_shows_every_cell(tiny: Scope, tmp_path: Path) -> None:
    tables, _ = calibrate(tiny, tmp_path, progress=False)
    figure = calibration_curves(tables["accuracy"])
    curves = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(curves) == 2 * 3  # recall and precision of three contrasts
    assert {trace.name for trace in curves} == {"10 + 10 documents"}


def test_the_command_prints_the_tables(tiny: Scope, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("workbench.planted.calibrate.quick", lambda n_experts, k: tiny)
    assert main(["calibrate", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "32 experts, k=4: floors |risk difference|" in shown
    assert "family-wise error without any effect" in shown
    assert shown.rstrip().endswith("calibration.html")
    assert "plotly" in (tmp_path / "calibration.html").read_text(encoding="utf-8").lower()
    assert main(["calibrate", "--quick", "--out", str(tmp_path), "--floors", "0.3", "1"]) == 0
    assert "floors |risk difference| 0.3, |logit d| 1" in capsys.readouterr().out
    assert main(["calibrate", "--experts", "16"]) == 2
    assert "n_experts: expected at least 32" in capsys.readouterr().err


def test_a_contrast_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="contrast: expected one of shared, all, mode"):
        Trial("sense", Design())
