"""What a field of an intervention may hold: checked once, when it is made, and copied, so that it stays what it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError


def as_tensor(name: str, value: Any, n_dims: int | None = None) -> Tensor:
    """A copy on the CPU, of floats or integers. Raises InterventionError unless finite and of `n_dims` axes."""
    try:
        tensor = torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InterventionError(f"{name}: expected numbers, got {type(value).__name__} ({error}).") from None
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise InterventionError(f"{name}: expected numbers, got {tensor.dtype}.")
    if tensor.dtype == torch.float64 and not isinstance(value, Tensor):
        tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise InterventionError(f"{name}: expected finite numbers, got some that are not. Look for nan and inf.")
    if n_dims is not None and tensor.ndim != n_dims:
        raise InterventionError(f"{name}: expected {n_dims} axes, got {tuple(tensor.shape)}.")
    return tensor


def as_number(name: str, value: Any) -> float:
    """A finite number, numpy's and tensors of one value included, as Python's own float (which JSON can hold)."""
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        raise InterventionError(f"{name}: expected a finite number, got {value!r}. Pass one.")
    return float(plain)


def as_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InterventionError(f"{name}: expected true or false, got {value!r}. Pass one.")
    return value


def as_integers(name: str, values: Any) -> tuple[int, ...]:
    """Integers of at least 0. Raises InterventionError on anything else, texts and booleans included."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(listed, str) or not isinstance(listed, Sequence | range):
        raise InterventionError(f"{name}: expected a list of numbers, got {values!r}. Pass one.")
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InterventionError(f"{name}: expected whole numbers from 0 on, got {value!r}. Pass such numbers.")
    return tuple(listed)


def as_mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping) or not value:
        raise InterventionError(f"{name}: expected a mapping with at least one entry, got {str(value)[:60]!r}.")
    return value


def expert_tuple(experts: int | Sequence[int]) -> tuple[int, ...]:
    single = isinstance(experts, int) and not isinstance(experts, bool)
    listed = as_integers("experts", (experts,) if single else experts)
    if len(set(listed)) < len(listed):
        raise InterventionError(f"experts: expected different expert numbers, got {listed}.")
    return listed


def check_recorded(name: str, recorded: Tensor, lengths: Sequence[int]) -> None:
    """Raises InterventionError unless [row position ...] has a row per length, and no row is longer than recorded."""
    if recorded.ndim < 3 or recorded.shape[0] != len(lengths) or max(lengths, default=0) > recorded.shape[1]:
        raise InterventionError(
            f"{name}: expected [row position ...] for {len(lengths)} rows with lengths of at most the positions "
            f"recorded, got {tuple(recorded.shape)} and lengths {tuple(lengths)[:8]}. Use from_cache."
        )
