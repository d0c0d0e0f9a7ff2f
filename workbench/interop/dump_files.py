"""Lines, id lists and arrays of routing dumps, checked as they are read; `where` names file and line in errors."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import RunError


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line stands, and its object; raises RunError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: expected a JSONL file, got {error}. Check the path.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}:{number}: expected JSON, got {error}. Write the dump again.") from None
        if not isinstance(row, dict):
            raise RunError(f"{path}:{number}: expected an object, got {type(row).__name__}. Write one per line.")
        yield f"{path}:{number}", row


def as_ids(values: Any, where: str, name: str) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not values or not all(type(value) is int for value in values):
        raise RunError(f"{where}: expected {name} as a list of token ids, got {str(values)[:40]}. Add it to the dump.")
    return tuple(values)


def as_array(values: Any, where: str, name: str) -> np.ndarray:
    if isinstance(values, dict):
        shape = values.get("shape")
        flat = decode(values.get("data"), str(values.get("dtype", "int32")), where)
        if not isinstance(shape, list) or flat.size != np.prod(shape):
            raise RunError(f"{where}: expected {name} of shape {shape}, got {flat.size} numbers. Write it again.")
        return flat.reshape(shape)
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.zeros(0)
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise RunError(f"{where}: expected {name} as whole numbers in three dimensions, got {str(values)[:40]}.")
    return array.astype(np.int64)


def decode(coded: Any, dtype: str, where: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(coded, validate=True), dtype=np.dtype(dtype)).astype(np.int64)
    except (TypeError, ValueError, binascii.Error) as error:
        raise RunError(
            f"{where}: expected routed_experts as base64 of {dtype}, got {error}. Ask the server to return them."
        ) from None
