"""Numbers in sentences."""

from __future__ import annotations

import math


def counted(n: int, noun: str) -> str:
    """A number and what it counts: "1 layer", "1,024 layers"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def known(value: float | None) -> bool:
    """Whether there is a number at all."""
    return value is not None and math.isfinite(value)


def estimate(value: float, low: float | None, high: float | None, form: str) -> str:
    """A value in a format and its interval, "0.12 [0.10, 0.14]"; the value alone where too few groups give none."""
    shown = format(value, form)
    return f"{shown} [{low:{form}}, {high:{form}}]" if known(low) and known(high) else shown
