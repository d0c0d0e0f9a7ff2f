"""Interventions in JSON: readable, checked when read, large tensors beside it in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.errors import InterventionError
from workbench.interventions.base import KINDS, Intervention
from workbench.interventions.where import Where

FORMAT = 1
INLINE = 4096  # values; larger tensors go into a file of their own
_OWN = ("kind", "where")  # keys of an entry that are no field of its kind
_PLAIN = {"float32": torch.float32, "int64": torch.int64}  # dtypes that a bare list means


def to_json(items: Sequence[Intervention], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """The interventions as plain values. Tensors become nested lists; given `tensors`, large ones are put there."""
    found = [_item(item, f"{number}.{item.kind}", tensors) for number, item in enumerate(items)]
    return {"format": FORMAT, "interventions": found}


def from_json(value: Any, tensors: Mapping[str, Tensor] | None = None) -> tuple[Intervention, ...]:
    """What `to_json` wrote, or a person did, parsed or as text. Raises InterventionError naming entry and field."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # nested deeper than Python reads
            raise InterventionError(f"interventions: expected JSON, got {error}. Check the text.") from None
    exact = isinstance(value, Mapping) and value.keys() == {"format", "interventions"}
    known = exact and type(value["format"]) is int and value["format"] == FORMAT  # true equals 1, and is no format
    if not known or not isinstance(value["interventions"], list):
        raise InterventionError(
            f'interventions: expected {{"format": {FORMAT}, "interventions": [...]}}, got {str(value)[:60]}.'
        )
    return tuple(_read(entry, number, tensors or {}) for number, entry in enumerate(value["interventions"]))


def save_interventions(items: Sequence[Intervention], path: str | Path) -> Path:
    """Write FILE.json, and FILE.safetensors beside it if some tensor is large."""
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    value = to_json(items, tensors)
    if tensors:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path.with_suffix(".safetensors"))
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def load_interventions(path: str | Path) -> tuple[Intervention, ...]:
    """Read what `save_interventions` wrote. Raises InterventionError when a file is missing or wrong."""
    path = Path(path)
    beside = path.with_suffix(".safetensors")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(beside) if beside.exists() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise InterventionError(f"{path}: expected interventions as JSON, got {error}. Check the file.") from None
    try:
        return from_json(value, tensors)
    except InterventionError as error:
        raise InterventionError(f"{path}: {error}") from None


def _item(item: Intervention, name: str, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    values: dict[str, Any] = {"kind": item.kind}
    for field in fields(item):
        value = getattr(item, field.name)
        is_default = not isinstance(value, Tensor | Mapping) and value == field.default
        if field.name != "where" and not is_default:
            values[field.name] = _plain(value, f"{name}.{field.name}", tensors)
    where = item.where.to_json()
    return values | ({"where": where} if where else {})


def _plain(value: Any, name: str, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, Tensor):
        if tensors is not None and value.numel() > INLINE:
            tensors[name] = value
            return {"tensor": name}
        dtype = str(value.dtype).removeprefix("torch.")
        wide = value.double() if value.is_floating_point() else value  # exact, and JSON keeps every digit
        return wide.tolist() if dtype in _PLAIN else {"dtype": dtype, "values": wide.tolist()}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}", tensors) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read(entry: Any, number: int, tensors: Mapping[str, Tensor]) -> Intervention:
    what = f"intervention {number}"
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise InterventionError(f"{what}: expected a kind among {', '.join(sorted(KINDS))}, got {kind!r}.")
    cls = KINDS[kind]
    known = {field.name: field for field in fields(cls)}
    what = f"{what} ({kind})"
    given = {name: _value(value, f"{what}: {name}", tensors) for name, value in entry.items() if name not in _OWN}
    unknown = [name for name in given if name not in known]
    needed = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in given]
    if unknown or missing:
        got = [f"no {', '.join(missing)}"] * bool(missing) + [f"an unknown {', '.join(unknown)}"] * bool(unknown)
        raise InterventionError(f"{what}: expected {', '.join(known)}, got {' and '.join(got)}. Correct the names.")
    try:
        return cls(**given, where=_where(entry.get("where", {})))
    except (TypeError, ValueError) as error:
        text = str(error) if isinstance(error, InterventionError) else f"expected other types, got {error}."
        raise InterventionError(f"{what}: {text}") from None


def _where(value: Any) -> Where:
    known = [field.name for field in fields(Where)]
    unknown = [name for name in value if name not in known] if isinstance(value, dict) else [repr(value)]
    if unknown:
        raise InterventionError(f"where: expected some of {', '.join(known)}, got {unknown[0]}.")
    return Where(**value)


def _value(value: Any, what: str, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        name = value["tensor"]
        if not isinstance(name, str) or name not in tensors:
            raise InterventionError(f"{what}: expected tensor {name!r} in the .safetensors file, got none.")
        return tensors[name]
    if value.keys() == {"dtype", "values"}:
        return _typed(value, what)
    return {key: _value(inner, what, tensors) for key, inner in value.items()}


def _typed(value: Mapping[str, Any], what: str) -> Tensor:
    dtype = getattr(torch, value["dtype"], None) if isinstance(value["dtype"], str) else None
    if not isinstance(dtype, torch.dtype):
        raise InterventionError(f"{what}: expected a dtype such as bfloat16, got {value['dtype']!r}.")
    try:
        return torch.tensor(value["values"], dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InterventionError(f"{what}: expected values as nested lists of numbers, got others ({error}).") from None
