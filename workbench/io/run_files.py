"""The files of a run directory, one by one: written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from workbench.errors import RunError
from workbench.io.permissions import as_any_new_file, check_readable

FORMAT = 2  # 2: token classes, places in segments, lse, mass and norms
Labels = dict[str, list[Any]]  # the labels of the first three axes of an expert load
LOAD_AXES: dict[str, type] = {"lang": str, "segment": str, "layer": int}
STARTED: dict[str, Any] = {"status": str, "sittings": list[dict]}  # what every manifest must hold, and of which type
FINISHED: dict[str, Any] = {
    "model": {"name": str, "n_experts": int, "k": int, "stop_ids": list[int]},
    "settings": {"template": str, "max_new_tokens": int, "router_logits": bool, "norms": bool},
    "report": {"seed": int},
    "counts": dict.fromkeys(("n_docs", "n_groups", "n_tokens", "n_routed_layers"), int),
}

LATER: dict[str, Any] = {  # what a manifest need not hold: earlier versions did not write it
    "files": dict[str, str],
    "settings": {"interventions": {"items": list[dict]}},
}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, whole and flushed to disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    write_text(path / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run directory; raises RunError when there is none or it cannot be read."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: expected a run directory with manifest.json, got none. Check the path.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file}: expected JSON, got {error}. Run the study again in a new directory.") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise RunError(
            f"{file}: expected a run of format {FORMAT}, got format {found}. "
            "Run the study again in a new directory, or use the workbench that wrote it."
        )
    check_keys(file, manifest, STARTED)
    return manifest


def check_keys(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> None:
    """Raises RunError for the first name of `wanted` (name -> type, or such a dict) that is not there as that type."""
    for name, inner in wanted.items():
        value, kind = found.get(name), dict if isinstance(inner, dict) else inner
        if not _is(value, kind):
            raise RunError(
                f"{file}: expected {prefix}{name} as {kind if get_args(kind) else kind.__name__}, got {value!r}. "
                "The file is damaged: run the study again in a new directory."
            )
        if isinstance(inner, dict):
            check_keys(file, found[name], inner, f"{prefix}{name}.")


def check_later(file: Path, manifest: Mapping[str, Any]) -> None:
    """As `check_keys`, for what of LATER is there."""
    if "files" in manifest:
        check_keys(file, manifest, {"files": LATER["files"]})
    if "interventions" in manifest["settings"]:
        check_keys(file, manifest, {"settings": LATER["settings"]})


def _is(value: Any, kind: Any) -> bool:
    entries = value.values() if isinstance(value, dict) else value
    return isinstance(value, get_origin(kind) or kind) and all(
        isinstance(entry, inner) for inner in get_args(kind)[-1:] for entry in entries
    )


def write_load(file: Path, counts: np.ndarray, labels: Labels) -> None:
    save_file({"expert_load": counts.astype(np.int64)}, file, metadata={"axes": json.dumps(dict(labels))})
    as_any_new_file(file)


def read_load(file: Path) -> tuple[np.ndarray, Labels]:
    """(token-slots [lang segment layer expert], labels of the first three axes); raises RunError."""
    try:
        check_readable(file)
        with safe_open(file, "numpy") as stored:
            counts, axes = stored.get_tensor("expert_load").astype(np.int64), json.loads(stored.metadata()["axes"])
        labels: Labels = {axis: list(map(kind, axes[axis])) for axis, kind in LOAD_AXES.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{file}: expected an expert load, got {error}. Run the study again in a new directory."
        ) from None
    shape = tuple(map(len, labels.values()))
    if counts.shape[:-1] != shape:
        raise RunError(
            f"{file}: expected shape {shape} x experts, as it is labelled, got {counts.shape}. "
            "Run the study again in a new directory."
        )
    return counts, labels


def warn_of_versions(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A warning where the software of two sittings of a run differs."""
    old, new = before.get("versions", {}), now.get("versions", {})
    changed = [f"{name} {old[name]}, now {new[name]}" for name in old if name in new and old[name] != new[name]]
    if changed:
        warnings.warn(
            f"{path}: begun under other software ({'; '.join(changed)}) and continued, so its parts may differ by "
            "that. Delete it and run the study again to have it of one kind.",
            stacklevel=2,
        )


def check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> None:
    """Raises RunError for the first value of `wanted` that `found` does not have."""
    for name, value in json.loads(json.dumps(wanted)).items():
        there = found.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            check_same(path, there, value, f"{prefix}{name}.")
        elif there != value:
            raise RunError(
                f"{path}: expected {prefix}{name} {there!r}, as in the run that is there, got {value!r}. "
                "Pass another directory, delete this one, or give what it was run with."
            )
