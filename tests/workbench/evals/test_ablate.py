"""Evaluation under intervention: paired, matched, resumable, and right about a change whose effect is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from workbench.cli import main
from workbench.errors import RunError
from workbench.evals import conditions as conditions_module
from workbench.evals.ablate import ablate, ablate_by_scan, is_discovery
from workbench.evals.adapter import WorkbenchLM
from workbench.evals.conditions import AblatePlan, expert_load
from workbench.evals.report import findings, summary, write_report
from workbench.evals.targets import Target, knock_out
from workbench.interventions import AddVector, KnockOut, SetActivation, Where
from workbench.models import Llama

PLAN = AblatePlan(("workbench_sums_ja", "workbench_sums_en"), n_controls=2, limit=6, n_resamples=200)


def lm_of(model: Llama) -> WorkbenchLM:
    return WorkbenchLM(model, progress=False)


def test_a_change_of_japanese_alone_costs_english_nothing(base: Llama, tmp_path: Path) -> None:
    quiet = Target("quiet", (SetActivation(value=0.0, point="mlp_out", where=Where(langs=("ja",))),))
    plan = AblatePlan(PLAN.tasks, n_controls=0, limit=8, n_resamples=200)
    found = ablate(lm_of(base), [quiet], plan, tmp_path, progress=False)
    (row,) = found.losses.iter_rows(named=True)
    assert row["loss_en"] == pytest.approx(0.0, abs=1e-4)
    assert row["loss_ja"] > 1
    assert row["selectivity_low"] > 0
    assert row["n_items_ja"] == row["n_items_en"] == 8
    assert found.judged["p_controls"].to_list() == [None]
    assert "without controls" in findings(found)[0]


def test_conditions_are_paired_by_item_and_matched(base: Llama, tmp_path: Path) -> None:
    places = ((3, 1), (3, 5))
    targets = [Target(f"{mode} set", knock_out(places, mode), places) for mode in ("reroute", "drop")]
    found = ablate(lm_of(base), targets, PLAN, tmp_path, progress=False)
    assert found.conditions["role"].to_list() == ["baseline", *(["target", "control", "control"] * 2)]
    sizes = found.items.group_by("condition").len()["len"]
    assert sizes.n_unique() == 1
    assert len(found.judged) == 2
    assert found.judged["n_tests"].to_list() == [2, 2]
    assert found.judged["n_controls"].to_list() == [2, 2]
    controls = found.conditions.filter(pl.col("role") == "control")
    assert not any("3:1" in text.split(", ") or "3:5" in text.split(", ") for text in controls["experts"])
    assert controls["load_ratio"].is_between(0.3, 3).all()
    assert {"load_ja", "load_en"} <= set(found.conditions.columns)
    reroute, drop = found.judged["loss_ja"]
    assert reroute != drop
    assert "could not have found anything" in findings(found)[-1]
    assert found.path.joinpath("judged.csv").is_file()


def test_a_run_continues_and_is_refused_when_it_is_another(
    base: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("one", knock_out([(2, 3)], "reroute"), ((2, 3),))
    original, calls = conditions_module.evaluate, []

    def counted(lm: WorkbenchLM, *args: object, **kwargs: object) -> object:
        calls.append([item.kind for item in lm.changes.items])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(lm, *args, **kwargs)

    monkeypatch.setattr(conditions_module, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        ablate(lm_of(base), [target], PLAN, tmp_path, progress=False)
    assert len(list((tmp_path / "conditions").glob("*.parquet"))) == 2
    first = ablate(lm_of(base), [target], PLAN, tmp_path, progress=False)
    assert len(calls) == 5  # baseline and target were there; two controls were left
    again = ablate(lm_of(base), [target], PLAN, tmp_path, progress=False)
    assert len(calls) == 5
    assert again.judged.equals(first.judged)
    other = AblatePlan(PLAN.tasks, n_controls=2, limit=5)
    with pytest.raises(RunError, match=r"expected (tasks|settings)"):
        ablate(lm_of(base), [target], other, tmp_path, progress=False)


@pytest.mark.slow
def test_a_run_is_another_when_answers_are_asked_for_or_judged_otherwise(
    base: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = AblatePlan(PLAN.tasks, n_controls=0, limit=2, n_resamples=50)
    one = [Target("one", knock_out([(2, 3)], "drop"), ((2, 3),))]
    ablate(lm_of(base), one, plan, tmp_path, progress=False)
    for other in ({"score_in_final": False}, {"max_gen_toks": 3}):
        with pytest.raises(RunError, match=next(iter(other))):
            ablate(WorkbenchLM(base, progress=False, **other), one, plan, tmp_path, progress=False)
    load = conditions_module.load_tasks

    def judged_otherwise(*args: object) -> dict:
        found = load(*args)
        for task in found["tasks"].values():
            task.set_config(key="metric_list", value=[{"metric": "acc_norm"}])
        return found

    monkeypatch.setattr(conditions_module, "load_tasks", judged_otherwise)
    with pytest.raises(RunError, match=r"tasks\.workbench_sums"):
        ablate(lm_of(base), one, plan, tmp_path, progress=False)


def test_without_controls_or_a_second_language_nothing_is_said_to_be_tested(base: Llama, tmp_path: Path) -> None:
    one = [Target("one", knock_out([(2, 3)], "drop"), ((2, 3),))]
    plan = AblatePlan(PLAN.tasks, n_controls=0, limit=2, n_resamples=50)
    said = " ".join(findings(ablate(lm_of(base), one, plan, tmp_path / "a", progress=False)))
    assert "Nothing was tested" in said
    assert "No target carries" not in said
    plan = AblatePlan(("workbench_sums_ja",), n_controls=2, limit=2, n_resamples=50)
    said = " ".join(findings(ablate(lm_of(base), one, plan, tmp_path / "b", progress=False)))
    assert "Nothing was tested" in said
    assert "No target carries" not in said


def test_a_scan_chooses_on_one_half_and_judges_on_the_other(base: Llama, tmp_path: Path) -> None:
    found = ablate_by_scan(lm_of(base), AblatePlan(PLAN.tasks, n_controls=2, limit=10, n_resamples=100), tmp_path, 2,
                           layers=(4,), progress=False)  # fmt: skip
    assert found.scan is not None
    assert len(found.scan) == 32
    assert found.judged["condition"].to_list() == ["reroute ja 2", "reroute en 2"]
    ranked = found.scan.sort("selectivity", descending=True)["expert"].to_list()
    assert found.judged["experts"].to_list() == [
        ", ".join(f"4:{expert}" for expert in chosen) for chosen in (ranked[:2], ranked[::-1][:2])
    ]
    groups = found.items["group"].unique()
    halves = {half: {group for group in groups if is_discovery(group) == half} for half in (True, False)}
    assert len(halves[True]) > 0
    assert found.judged["n_groups"].to_list() == [len(halves[False])] * 2
    page = write_report(found).read_text("utf-8")
    assert 'data-figure="scan"' in page
    assert "half" in summary(found)


def test_loads_are_shares_of_tokens(base: Llama) -> None:
    load = expert_load(lm_of(base), ["<|startoftext|>2 + 3 = 5", "フランスの首都はパリです。"])
    assert load.shape == (6, 32)
    np.testing.assert_allclose(load.sum(1), base.cfg.k)
    assert load.max() <= 1


def test_the_command_makes_a_page_without_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = tmp_path / "change.json"
    knocked = {"kind": "knock_out", "experts": [3], "mode": "drop", "where": {"layers": [2]}}
    change.write_text(json.dumps({"format": 1, "interventions": [knocked]}))
    out = tmp_path / "run"
    command = ["ablate", "nano-moe-base", "--tasks", "workbench_choices", "--limit", "3", "--controls", "1"]
    command += ["--experts", "1:2,1:3", "--each", "--intervention", str(change), "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| reroute 1:2 | 1:2 |" in printed
    assert "| change | 2:3 |" in printed
    assert "3 targets tested, 3 random controls" in printed
    assert printed.splitlines()[-1] == str(out / "report.html")
    page = (out / "report.html").read_text("utf-8")
    assert "default-src 'none'" in page
    assert "http://" not in page.split("<script>")[0]
    assert str(tmp_path) not in page
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["runs"]["moe_impl"], manifest["runs"]["moe_path"]) == ("sorted", "auto")
    assert {"lm_eval", "torch"} <= set(manifest["software"])
    assert len(manifest["model"]["weights"]) >= 16
    assert len(manifest["tasks"]) == len(manifest["task_names"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --experts, --run or --intervention"),
        (["--experts", "9:1"], "expected layers 0, 1, 2, 3, 4, 5"),
        (["--experts", "1-1"], "expected layer:expert"),
        (["--experts", "scan", "--modes", "drop,reroute"], "expected one with --experts scan"),
        (["--run", "nowhere"], "expected a study"),
        (["--experts", "1:1", "--metric", "f1"], "expected one of"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ablate", "nano-moe-base", "--tasks", "workbench_sums_en", "--limit", "1", "--controls", "0"]
    assert main([*command, "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_changes_that_nothing_random_matches_need_no_controls(base: Llama, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Pass --controls 0"):
        ablate(lm_of(base), [Target("zero", (SetActivation(value=0.0),))], PLAN, tmp_path, progress=False)
    vector = np.ones(base.cfg.d_model, dtype=np.float32)
    import torch

    steer = Target("steer", (AddVector(vector=torch.from_numpy(vector), where=Where(layers=(3,))),))
    found = ablate(lm_of(base), [steer], PLAN, tmp_path / "steer", progress=False)
    assert found.judged["n_controls"].to_list() == [2]
    assert KnockOut.kind not in str(found.conditions)
