"""Runs take turns, every one in every round."""

from __future__ import annotations

import polars as pl
import pytest

from workbench.errors import ConfigError
from workbench.experiments.timing import time_in_turn


def test_runs_take_turns_after_one_call_each() -> None:
    calls: list[str] = []
    found = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, passes=2)
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 3]
    assert found.select("round", "name").rows() == [(n, name) for n in range(3) for name in "ab"]
    assert (found["seconds"] >= 0).all()


def test_work_takes_longer_than_none() -> None:
    found = time_in_turn({"none": lambda: None, "some": lambda: sum(range(300_000))}, rounds=5)
    medians = dict(found.group_by("name").agg(pl.col("seconds").median()).rows())
    assert medians["some"] > medians["none"]


@pytest.mark.parametrize("bad", [{"runs": {}}, {"rounds": 0}, {"passes": 0}])
def test_nothing_to_time_is_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="expected at least one of each"):
        time_in_turn(**{"runs": {"a": lambda: None}, **bad})
