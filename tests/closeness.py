"""Numbers that two ways through a model computed: the same up to a share of the scale of what they were made from.

A difference of two logits of 20 carries the rounding of 20, however small it is itself, and other machines round
otherwise: a tolerance that is absolute, or relative to the difference, holds on one machine and fails on another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

SHARE = 1e-5


def near(expected: Tensor | Iterable[float] | float, *scale: Tensor | float) -> Any:
    """To compare with ==; scale: what it was computed from, logits for instance."""
    values = expected.tolist() if isinstance(expected, Tensor) else expected
    return pytest.approx(values, rel=0, abs=SHARE * largest(*scale))


def assert_near(found: Tensor, expected: Tensor, *scale: Tensor | float) -> None:
    """scale: what both were computed from; without it, themselves."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=SHARE * largest(*(scale or (expected,))), check_dtype=False
    )


def largest(*values: Tensor | float) -> float:
    return max(float(torch.as_tensor(value).detach().abs().max()) for value in values)
