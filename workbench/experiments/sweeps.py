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
