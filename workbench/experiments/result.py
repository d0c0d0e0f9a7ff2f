"""What every experiment returns: a tidy frame, and the settings that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from workbench.errors import RunError
from workbench.io.run_files import atomic
from workbench.stats.resampling import t_interval

_KEY = "workbench"  # of our entry in a Parquet file's metadata


@dataclass(frozen=True, eq=False)
class Result:
    """One row per measurement in `frame`; `settings` are plain JSON values that say how it was measured."""

    frame: pl.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | Path) -> Path:
        """One Parquet file with the settings in its metadata; written whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            self.frame.write_parquet(file, metadata={_KEY: _to_json(self.settings)})
        return path

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Raises RunError when the file is not there, not Parquet, or not a result."""
        path = Path(path)
        try:
            settings = pl.read_parquet_metadata(path).get(_KEY)
            frame = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise RunError(f"{path}: expected a result, got {str(error).splitlines()[0]}. Check the path.") from None
        if settings is None:
            raise RunError(f"{path}: expected a result with settings, got bare Parquet. Write it with Result.write.")
        return cls(frame, json.loads(settings))

    def mean(self, value: str, by: str | Sequence[str], unit: str = "pair") -> pl.DataFrame:
        """The mean of one column over units, with 95% intervals; see `mean_over`."""
        return mean_over(self.frame, value, by, unit)

    def __repr__(self) -> str:
        return f"{self._heading()}\n{self.frame}"

    def _repr_html_(self) -> str:
        heading = self._heading().replace("&", "&amp;").replace("<", "&lt;")
        return f"<p>{heading}</p>{self.frame._repr_html_()}"

    def _heading(self) -> str:
        return "Result(" + ", ".join(f"{name}={_short(value)}" for name, value in self.settings.items()) + ")"


def mean_over(frame: pl.DataFrame, value: str, by: str | Sequence[str], unit: str = "pair") -> pl.DataFrame:
    """One row per combination of `by`: mean, and low and high of its 95% interval over units by Student's t.

    The unit is what was drawn at random (a pair of prompts), never a token. Rows of one unit and cell are averaged
    first, so every unit weighs the same; `n_units` counts them. With one unit the interval is missing. Raises RunError
    when some unit lacks a cell that others have, since the means would then compare different prompts.
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = [name for name in (value, unit, *by) if name not in frame.columns]
    if missing:
        raise RunError(f"columns: expected some of {', '.join(frame.columns)}, got {', '.join(missing)}.")
    per_unit = frame.group_by(*by, unit, maintain_order=True).agg(pl.col(value).cast(pl.Float64).mean())
    cells = per_unit.group_by(by, maintain_order=True).agg(n_units=pl.len(), mean=pl.col(value).mean())
    units = per_unit[unit].unique(maintain_order=True)
    if (cells["n_units"] != len(units)).any():
        raise RunError(
            f"{value}: expected every {unit} in every cell of {', '.join(by)}, got cells without some. "
            f"Filter the frame to what all {unit}s share."
        )
    ranks = pl.DataFrame({unit: units}).with_row_index("_unit")
    places = cells.select(by).with_row_index("_cell")
    sorted_rows = per_unit.join(ranks, on=unit).join(places, on=by, nulls_equal=True).sort("_unit", "_cell")
    values = sorted_rows[value].to_numpy().reshape(len(units), len(cells))  # [unit cell]
    low, high = t_interval(values)
    return cells.select(*by, "mean").with_columns(
        low=pl.Series(low).fill_nan(None), high=pl.Series(high).fill_nan(None), n_units=pl.lit(len(units))
    )


def _to_json(settings: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(settings), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunError(f"settings: expected plain JSON values, got {error}. Store names and numbers only.") from None


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
