"""Experts by name, by a study, by a scan; controls of the same layer and load, never the target itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from workbench.errors import InterventionError, RunError
from workbench.evals.targets import (
    Target,
    check_places,
    describe_places,
    knock_out,
    matched_controls,
    parse_places,
    scan_places,
    study_places,
    target_of,
)
from workbench.interventions import AddVector, KnockOut, ProjectOut, SetActivation, Where
from workbench.models import Llama, Qwen3Moe

LOAD = np.random.default_rng(0).lognormal(-2, 0.5, size=(4, 32))  # [layer expert]
LOAD[0, [3, 9]] = np.sort(LOAD[0])[[10, 20]]  # neither the busiest of their layers nor the idlest
LOAD[2, 11] = np.sort(LOAD[2])[16]


def test_places_as_text_and_in_files(tmp_path: Path) -> None:
    assert parse_places("2:5, 2:7,3:0,2:5") == ((2, 5), (2, 7), (3, 0))
    (tmp_path / "plain.txt").write_text("2:5\n3:17\n")
    (tmp_path / "list.json").write_text("[[2, 5], [3, 17]]")
    assert parse_places(str(tmp_path / "plain.txt")) == parse_places(str(tmp_path / "list.json")) == ((2, 5), (3, 17))
    assert describe_places(((2, 5), (3, 17))) == "2:5, 3:17"


@pytest.mark.parametrize("text", ["2-5", "a:b", "", "5", "[[1]]", "missing.txt"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="expected"):
        parse_places(text)


def test_experts_that_do_not_exist_are_refused(moe: Qwen3Moe, llama: Llama) -> None:
    check_places(moe, [(0, 7), (2, 0)])
    for wrong in ((1, 0), (0, 8), (3, 0)):
        with pytest.raises(RunError, match="expected layers 0, 2 and experts 0 to 7"):
            check_places(moe, [wrong])
    with pytest.raises(ValueError, match="expected a mixture of experts"):
        check_places(llama, [(0, 0)])


def test_one_knock_out_per_layer() -> None:
    items = knock_out([(2, 5), (0, 1), (2, 7)], "drop")
    assert [(item.experts, item.mode, item.where.layers) for item in items] == [
        ((1,), "drop", (0,)),
        ((5, 7), "drop", (2,)),
    ]


def test_a_set_is_matched_by_layer_and_load() -> None:
    places = ((0, 3), (0, 9), (2, 11))
    target = Target("set", knock_out(places, "reroute"), places)
    banned = [(2, 1), (2, 2)]
    controls = matched_controls(target, LOAD, 30, seed=1, banned=banned)
    assert len(controls) == 30
    chosen = [tuple((item.where.layers, tuple(sorted(item.experts))) for item in control.items) for control in controls]
    assert len(set(chosen)) == 30
    for control in controls:
        found = {(layer, expert) for item in control.items for layer in item.where.layers for expert in item.experts}
        assert len(found) == 3
        assert not found & {*places, *banned}
        assert sorted(layer for layer, _ in found) == [0, 0, 2]
        assert {item.mode for item in control.items} == {"reroute"}
        load = sum(LOAD[place] for place in found) / sum(LOAD[place] for place in places)
        assert control.load_ratio == pytest.approx(load)
    ratios = np.array([control.load_ratio for control in controls])
    wild = [LOAD[0, [a, b]].sum() / LOAD[0, [3, 9]].sum() for a in range(32) for b in range(a)]
    assert np.abs(np.log(ratios)).mean() < np.abs(np.log(wild)).mean() / 2
    again = matched_controls(target, LOAD, 30, seed=1, banned=banned)
    assert [control.load_ratio for control in again] == [control.load_ratio for control in controls]


def test_a_lone_expert_has_as_many_controls_as_its_layer_has_others() -> None:
    target = Target("one", knock_out([(1, 4)], "reroute"), ((1, 4),))
    assert len(matched_controls(target, LOAD, 20, 0)) == 20
    every = matched_controls(target, LOAD, 99, 0)
    assert sorted(item.experts[0] for control in every for item in control.items) == [e for e in range(32) if e != 4]
    with pytest.raises(RunError, match="expected 1 other experts in layer 1, got 0"):
        matched_controls(target, LOAD, 5, 0, banned=[(1, e) for e in range(32)])


def test_a_vector_is_matched_by_a_direction_of_its_length(moe: Qwen3Moe) -> None:
    vector = torch.arange(32.0)
    items = (AddVector(vector=vector, scale=2.0, where=Where(layers=(1,))), ProjectOut(direction=vector))
    controls = matched_controls(target_of("file", items, moe), None, 4, 0)
    assert len(controls) == 4
    for control in controls:
        added, projected = control.items
        for drawn in (added.vector, projected.direction):
            assert drawn.norm() == pytest.approx(float(vector.norm()), rel=1e-5)
            assert abs(torch.cosine_similarity(drawn, vector, dim=0)) < 0.8
        assert added.scale == 2.0
        assert control.load_ratio is None
    with pytest.raises(RunError, match="Pass --controls 0"):
        matched_controls(target_of("zero", (SetActivation(value=0.0),), moe), None, 4, 0)


def test_a_file_without_layers_means_all_and_is_matched_in_each(moe: Qwen3Moe) -> None:
    item = KnockOut(experts=(3,), mode="drop", where=Where(langs=("ja",)))
    target = target_of("file", (item,), moe)
    assert target.places == ((0, 3), (2, 3))
    (control, *_) = matched_controls(target, LOAD[:3, :8], 3, 0)
    assert [part.where.layers for part in control.items] == [(0,), (2,)]
    assert all(part.where.langs == ("ja",) for part in control.items)
    with pytest.raises(InterventionError):
        target_of("file", (KnockOut(experts=(3,), mode="drop", where=Where(layers=(1,))),), moe)


def test_a_study_names_the_extremes(tmp_path: Path) -> None:
    frame = pl.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "risk_difference": [0.3, -0.2, 0.1, -0.4]})
    (tmp_path / "tables").mkdir()
    frame.write_parquet(tmp_path / "tables" / "contrasts.parquet")
    assert study_places(tmp_path, 2) == ("contrasts", {"ja": ((0, 0), (1, 0)), "en": ((1, 1), (0, 1))})
    frame.with_columns(-pl.col("risk_difference")).write_parquet(tmp_path / "tables" / "shared.parquet")
    assert study_places(tmp_path, 1) == ("shared", {"ja": ((1, 1),), "en": ((0, 0),)})
    with pytest.raises(RunError, match="expected a study"):
        study_places(tmp_path / "tables", 1)
    scan = frame.rename({"risk_difference": "selectivity"})
    assert scan_places(scan, 1) == {"ja": ((0, 0),), "en": ((1, 1),)}
