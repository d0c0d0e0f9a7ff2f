"""Long experiments: many measurements in batches, with a progress bar, continued after a kill."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from tqdm import tqdm

from workbench.errors import RunError
from workbench.experiments.result import Result
from workbench.io.run_files import atomic, check_same, write_text
from workbench.io.runs import lock

Cell = TypeVar("Cell")
RESULT, SETTINGS = "result.parquet", "settings.json"


def sweep(
    cells: Sequence[Cell],
    measure: Callable[[Sequence[Cell]], pl.DataFrame],
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    out: str | Path | None = None,
    name: str = "sweep",
    progress: bool = True,
) -> Result:
    """`measure` every cell, `batch_size` at a time, and join the frames in order.

    `settings` must hold everything that decides the result. With `out`, each batch is on disk before the next one runs:
    the same call continues where a killed process stopped, and opens a finished sweep as it is. Raises RunError naming
    the first setting that differs from the sweep that is there, or when another process writes it.
    """
    if not cells:
        raise RunError(f"{name}: expected something to measure, got nothing. Widen the layers, positions or experts.")
    batches = [cells[start : start + batch_size] for start in range(0, len(cells), batch_size)]
    if out is None:
        frames = [measure(batch) for batch in _shown(batches, 0, len(batches), name, progress)]
        return Result(pl.concat(frames), dict(settings))
    folder = Path(out)
    _begin(folder, settings, len(batches))
    with lock(folder):
        if not (folder / RESULT).exists():
            parts = [folder / "parts" / f"{number:06}.parquet" for number in range(len(batches))]
            missing = [number for number, part in enumerate(parts) if not part.exists()]
            for number in _shown(missing, len(batches) - len(missing), len(batches), name, progress):
                with atomic(parts[number]) as file:
                    measure(batches[number]).write_parquet(file)
            Result(pl.concat(map(pl.read_parquet, parts)), dict(settings)).write(folder / RESULT)
        shutil.rmtree(folder / "parts", ignore_errors=True)
        return Result.read(folder / RESULT)


def staged(
    run: Callable[[Callable[[str], Path | None]], Result], settings: Mapping[str, Any], out: str | Path | None
) -> Result:
    """An experiment of more than one sweep, or of what is made of a sweep: `run` gets the directory of each by name.

    With `out`, a killed call continues in these, and what `run` returns is opened as it is from then on. Raises
    RunError as `sweep` does.
    """
    if out is None:
        return run(lambda name: None)
    folder = Path(out)
    _begin(folder, settings, 0)
    with lock(folder):
        if not (folder / RESULT).exists():
            run(lambda name: folder / "parts" / name).write(folder / RESULT)
        shutil.rmtree(folder / "parts", ignore_errors=True)
        return Result.read(folder / RESULT)


def sweep_variants(
    n_variants: int,
    n_units: int,
    measure: Callable[[int, slice], Sequence[float]],
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    **options: Any,
) -> pl.DataFrame:
    """Every variant of a run on every unit (a prompt), `batch_size` units at a time; `options` are those of `sweep`.

    One row per variant and unit: variant, pair (their numbers), value, and `change` from variant 0 of the same unit.
    """

    def rows(cells: Sequence[tuple[int, int]]) -> pl.DataFrame:
        ((variant, start),) = cells
        values = list(map(float, measure(variant, slice(start, start + batch_size))))
        return pl.DataFrame({"variant": [variant] * len(values), "pair": range(start, start + len(values)),
                             "value": values})  # fmt: skip

    cells = [(variant, start) for variant in range(n_variants) for start in range(0, n_units, batch_size)]
    frame = sweep(cells, rows, settings, batch_size=1, **options).frame
    return frame.with_columns(change=pl.col("value") - pl.col("value").first().over("pair"))


def _begin(folder: Path, settings: Mapping[str, Any], n_batches: int) -> None:
    """Claim an empty folder for these settings, or check that it is theirs."""
    wanted = {"settings": dict(settings), "n_batches": n_batches}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    if file.exists():
        found = _read_settings(file)
        check_same(folder, found, wanted)
        check_same(folder, wanted, found)  # both ways: a setting may also have gone
    elif any(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise RunError(f"{folder}: expected a sweep or nothing, got other files. Pass another directory.")
    else:
        write_text(file, json.dumps(wanted, ensure_ascii=False, indent=2) + "\n")
    (folder / "parts").mkdir(exist_ok=True)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file}: expected settings as JSON, got {error}. Run the sweep in a new directory.") from None


def _shown(todo: Sequence[Any], done: int, total: int, name: str, progress: bool) -> Any:
    """The items, with a bar on stderr if they take more than a second; a line every ten seconds without a terminal."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(todo, name, total, initial=done, unit="batch", delay=1, mininterval=interval, disable=not progress)
