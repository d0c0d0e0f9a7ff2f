from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from workbench.errors import RunError
from workbench.experiments.result import Result
from workbench.experiments.sweeps import sweep

CELLS = list(range(10))


class Squares:
    """A measurement that counts its calls and can be interrupted."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.calls: list[list[int]] = []
        self.killed_at = killed_at

    def __call__(self, cells: Sequence[int]) -> pl.DataFrame:
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        self.calls.append(list(cells))
        return pl.DataFrame({"cell": cells, "square": [cell**2 for cell in cells]})


def run(measure: Squares, out: Path | None = None, **settings: object) -> Result:
    return sweep(CELLS, measure, {"power": 2, **settings}, batch_size=4, out=out, progress=False)


def test_batches_join_in_order() -> None:
    measure = Squares()
    result = run(measure)
    assert measure.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert result.frame["square"].to_list() == [cell**2 for cell in CELLS]
    assert result.settings == {"power": 2}


def test_a_killed_sweep_continues_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Squares(killed_at=1), tmp_path)
    again = Squares()
    result = run(again, tmp_path)
    assert again.calls == [[4, 5, 6, 7], [8, 9]], "the first batch was on disk"
    assert result.frame.equals(run(Squares()).frame)
    finished = Squares()
    assert run(finished, tmp_path).frame.equals(result.frame)
    assert finished.calls == [], "a finished sweep is opened, not run"
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name[0] != ".") == [
        "result.parquet",
        "settings.json",
    ]


def test_another_sweep_in_the_directory_is_named(tmp_path: Path) -> None:
    run(Squares(), tmp_path)
    with pytest.raises(RunError, match=r"expected settings\.power 2, as in the run that is there, got 3"):
        run(Squares(), tmp_path, power=3)
    with pytest.raises(RunError, match=r"settings\.metric"):
        run(Squares(), tmp_path, metric="kl")
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(RunError, match="expected settings as JSON"):
        run(Squares(), tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="expected a sweep or nothing"):
        run(Squares(), foreign)


def test_nothing_to_measure_is_named() -> None:
    with pytest.raises(RunError, match="expected something to measure"):
        sweep([], Squares(), {}, batch_size=4)
