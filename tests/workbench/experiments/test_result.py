from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from workbench.errors import RunError
from workbench.experiments.result import Result, mean_over
from workbench.stats.resampling import t_interval


@pytest.fixture
def result() -> Result:
    rng = np.random.default_rng(0)
    rows = [(pair, layer, pos) for pair in ("b", "a", "c", "d") for layer in (1, 0) for pos in range(3)]
    frame = pl.DataFrame(rows, schema=["pair", "layer", "pos"], orient="row")
    return Result(frame.with_columns(value=pl.Series(rng.normal(size=len(rows)))), {"metric": "kl", "layers": [1, 0]})


def test_frame_and_settings_survive_the_file(result: Result, tmp_path: Path) -> None:
    again = Result.read(result.write(tmp_path / "deep" / "one.parquet"))
    assert again.frame.equals(result.frame)
    assert again.settings == result.settings
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "one.parquet"], "nothing else is left behind"


def test_both_are_shown(result: Result) -> None:
    assert repr(result).startswith("Result(metric=kl, layers=[1, 0])\nshape: (24, 4)")
    assert "<p>Result(metric=kl" in result._repr_html_()


def test_means_and_intervals_are_those_of_the_units(result: Result) -> None:
    table = result.mean("value", by=["layer", "pos"])
    assert table.columns == ["layer", "pos", "mean", "low", "high", "n_units"]
    values = result.frame["value"].to_numpy().reshape(4, 2, 3)  # [pair layer pos]
    low, high = t_interval(values)
    assert table["layer"].to_list() == [1, 1, 1, 0, 0, 0], "in the order of the frame"
    np.testing.assert_allclose(table["mean"].to_numpy().reshape(2, 3), values.mean(0))
    np.testing.assert_allclose(table["low"].to_numpy().reshape(2, 3), low)
    np.testing.assert_allclose(table["high"].to_numpy().reshape(2, 3), high)
    shuffled = Result(result.frame.sample(fraction=1, shuffle=True, seed=3)).mean("value", by=["layer", "pos"])
    assert shuffled.sort("layer", "pos")["mean"].to_list() == pytest.approx(table.sort("layer", "pos")["mean"])


def test_rows_of_one_unit_count_once(result: Result) -> None:
    twice = pl.concat([result.frame, result.frame.filter(pl.col("pair") == "a")])
    assert mean_over(twice, "value", "layer")["mean"].to_list() == pytest.approx(
        mean_over(result.frame, "value", "layer")["mean"].to_list()
    )


def test_one_unit_has_no_interval(result: Result) -> None:
    table = mean_over(result.frame.filter(pl.col("pair") == "a"), "value", "layer")
    assert table["low"].null_count() == table["high"].null_count() == 2


def test_what_cannot_be_averaged_is_named(result: Result) -> None:
    with pytest.raises(RunError, match="expected every pair in every cell of layer, got cells without some"):
        mean_over(result.frame.filter((pl.col("pair") != "a") | (pl.col("layer") == 0)), "value", "layer")
    with pytest.raises(RunError, match="got head"):
        result.mean("value", by="head")


def test_files_that_are_no_result_are_named(result: Result, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a result"):
        Result.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(RunError, match="expected a result"):
        Result.read(tmp_path / "text.parquet")
    result.frame.write_parquet(tmp_path / "bare.parquet")
    with pytest.raises(RunError, match="got bare Parquet"):
        Result.read(tmp_path / "bare.parquet")
    with pytest.raises(RunError, match="settings: expected plain JSON values"):
        Result(result.frame, {"metric": object()}).write(tmp_path / "object.parquet")
