"""Numbers in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.errors import FrameError


def with_interval(
    row: Mapping[str, Any], value: str = "mean", low: str = "low", high: str = "high", form: str = ".3f"
) -> str:
    """A row's estimate with its interval, as "0.120 [0.100, 0.140]"; "(no interval)" where there is none.

    row: a frame's `row(n, named=True)`; form: a format for all three numbers. Raises FrameError for missing columns.
    """
    missing = [column for column in (value, low, high) if column not in row]
    if missing:
        raise FrameError(f"columns: expected some of {', '.join(row)}, got {', '.join(missing)}.")
    if row[low] is None or row[high] is None:
        return f"{row[value]:{form}} (no interval)"
    return f"{row[value]:{form}} [{row[low]:{form}}, {row[high]:{form}}]"
