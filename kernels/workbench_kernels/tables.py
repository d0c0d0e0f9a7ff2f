"""Tables of block sizes: which sizes a kernel runs with, by device, triton release, shape, format, path and T.

One JSON file per architecture lies in configs/ (sm_90.json ...), a list of entries:
  device, triton   the device's name and triton's "major.minor", or "*" for every one
  shape            {"d_model", "d_expert", "n_experts", "k"}, or "*"
  dtype, bits      of the activations, and of the weights: 16 for plain ones whatever their dtype, 8 or 4
  tuned            whether a measurement on that device chose the sizes; false: from compile results alone
  decode, skinny, tile   {"number of tokens": blocks}; a call takes the nearest bucket that is not above its T

The most specific entry wins: its own device before "*", then its own shape, then its own triton.
`python -m workbench_kernels.tune` writes entries; WORKBENCH_KERNELS_CONFIGS names a directory to read before configs/.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from workbench_kernels.moe.plan import PATHS

Blocks = dict[str, Any]
Entry = dict[str, Any]

PACKAGED = Path(__file__).parent / "configs"
VARIABLE = "WORKBENCH_KERNELS_CONFIGS"


def lookup(
    path: str, n_tokens: int, shape: dict[str, int], dtype: torch.dtype, bits: int, device: torch.device
) -> Blocks | None:
    """The blocks for one call, or None where no table fits; then, and for untuned sizes, it warns once per case."""
    if device.type != "cuda":
        return None  # the interpreter: sizes matter to nobody
    arch, name = architecture(device), torch.cuda.get_device_name(device)
    wanted = {"device": name, "triton": triton_release(), "shape": shape, "dtype": _short(dtype), "bits": bits}
    entry = select(entries(arch), wanted, path)
    if entry is None:
        _say(
            f"{name} ({arch}): no table of block sizes for {_short(dtype)}, {bits} bits; safe ones run, which are slow."
        )
        return None
    if not entry["tuned"]:
        _say(f"{name} ({arch}): block sizes were not tuned on this device, they are from compile results alone.")
    return nearest(entry[path], n_tokens)


def select(table: list[Entry], wanted: dict[str, Any], path: str) -> Entry | None:
    """The most specific entry that fits all of `wanted` and has the path."""
    fitting = [entry for entry in table if path in entry and all(_fits(entry[key], wanted[key]) for key in wanted)]
    order = ("device", "shape", "triton")
    return max(fitting, key=lambda entry: [entry[key] != "*" for key in order], default=None)


def nearest(buckets: dict[str, Blocks], n_tokens: int) -> Blocks:
    """The blocks of the largest bucket that is not above `n_tokens`, or of the smallest one."""
    below = [int(bucket) for bucket in buckets if int(bucket) <= n_tokens]
    return buckets[str(max(below) if below else min(map(int, buckets)))]


@functools.cache
def entries(arch: str) -> list[Entry]:
    """Every entry for an architecture, those of the user's directory first. Raises ValueError for a broken file."""
    user = os.environ.get(VARIABLE)
    found: list[Entry] = []
    for directory in ([Path(user)] if user else []) + [PACKAGED]:
        file = directory / f"{arch}.json"
        if file.is_file():
            found += read_table(file)
    return found


def write_entry(file: Path, entry: Entry) -> None:
    """Put an entry into a table, in place of the one for the same case; other entries stay as they are."""
    keys = ("device", "triton", "shape", "dtype", "bits")
    kept = [old for old in (read_table(file) if file.is_file() else []) if any(old[key] != entry[key] for key in keys)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump([*kept, entry]), encoding="utf-8")
    entries.cache_clear()


def dump(table: list[Entry]) -> str:
    """JSON with one line per set of blocks, which a person can compare."""
    lines = []
    for entry in table:
        plain = {key: value for key, value in entry.items() if key not in PATHS}
        head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in plain.items())
        paths = [f' "{path}": {{\n{_buckets(entry[path])}\n }}' for path in PATHS if path in entry]
        lines.append("{\n" + head + ",\n".join(paths) + "\n}")
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _buckets(buckets: dict[str, Blocks]) -> str:
    return ",\n".join(f'  "{n_tokens}": {json.dumps(blocks)}' for n_tokens, blocks in buckets.items())


def architecture(device: torch.device) -> str:
    """sm_90, gfx942 ...: what a table's file is named after."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def triton_release() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def read_table(file: Path) -> list[Entry]:
    """The entries of one file. Raises ValueError, naming the file, for one that is no table."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        broken = [
            entry for entry in table if not {"device", "triton", "shape", "dtype", "bits", "tuned"} <= entry.keys()
        ]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file.name}: expected a list of entries in JSON, got {error}. Write it again.") from None
    if broken:
        raise ValueError(f"{file.name}: expected device, triton, shape, dtype, bits and tuned, got {broken[0].keys()}.")
    return table


def _fits(have: Any, wanted: Any) -> bool:
    return have == "*" or have == wanted


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _say(message: str) -> None:
    warnings.warn(f"{message} `python -m workbench_kernels.tune` measures them.", stacklevel=5)
