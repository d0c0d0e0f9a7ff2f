"""Which launches there are: every table entry with every option set, and the safe sizes where no table has an entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from launches import OPTIONS, Launch, layer_launches

from workbench_kernels import tables
from workbench_kernels.moe.blocks import SAFE, safe_blocks

DTYPES, BITS = ("bfloat16", "float16", "float32"), (16, 8, 4)
# int4 beside float32 activations is left out: no table has it, and the safe sizes spill there, as README.md says
FORMATS = tuple(f"{dtype}/{bits}" for dtype in DTYPES for bits in BITS if (dtype, bits) != ("float32", 4))
HEAVIEST = ("plain", "everything", "hf everything", "hf mixed", "tapped")  # what lies between takes parts of these
_TOKENS = (1, 5, 2048)  # beside a bucket's own: one program for all tokens, several, several steps of the sort each

Buckets = dict[str, dict[str, Any]]
_recorded: dict[tuple[Any, ...], list[Launch]] = {}


class Claim(NamedTuple):
    """Where a launch comes from, and what must be true of it."""

    label: str
    wgmma: bool  # the table says that the product is by wgmma
    covering: bool  # one of those that every run compiles again


def shipped(arch: str, formats: tuple[str, ...] = FORMATS) -> dict[Launch, Claim]:
    """Every launch that an architecture can make at the real shape, with the first case that makes it.

    Token counts are those at which another variant runs: at the bounds of the buckets, and with a pinned path.
    """
    found: dict[Launch, Claim] = {}
    for dtype, bits, origin, paths in _entries(arch):
        if f"{dtype}/{bits}" not in formats:
            continue
        for path, buckets in paths.items():
            for n_tokens, blocks in _calls(buckets):
                for group in (64, 128) if bits == 4 else (64,):
                    for options in _options(dtype, bits, origin):
                        label = f"{origin} {path} T={n_tokens} {dtype}/{bits} {options}"
                        for launch in _launches(path, n_tokens, dtype, bits, group, blocks, options):
                            _add(found, launch, Claim(label, _claims(launch, blocks), _covers(dtype, bits, options)))
    return found


def _entries(arch: str) -> Iterator[tuple[str, int, str, dict[str, Buckets]]]:
    """(dtype, bits, table or safe, buckets by path): entries of the tables, then formats that none of them has."""
    table = tables.entries(arch)
    for entry in table:
        paths = {path: entry[path] for path in SAFE if path in entry}
        yield entry["dtype"], entry["bits"], "table", paths
    for dtype in DTYPES:
        for bits in BITS:
            if not any((entry["dtype"], entry["bits"]) == (dtype, bits) for entry in table):
                yield dtype, bits, "safe", {path: {"1": safe_blocks(path, getattr(torch, dtype))} for path in SAFE}


def _calls(buckets: Buckets) -> Iterator[tuple[int, dict[str, Any]]]:
    for bucket, blocks in buckets.items():
        for n_tokens in sorted({int(bucket), *_TOKENS}):
            if tables.nearest(buckets, n_tokens) is blocks:
                yield n_tokens, blocks


def _options(dtype: str, bits: int, origin: str) -> Iterator[str]:
    """All of them; hf numerics round nothing in float32, and with int8 and int4 only the heaviest is compiled."""
    for name, options in OPTIONS.items():
        if options.numerics == "hf" and (dtype == "float32" or (bits != 16 and name not in HEAVIEST)):
            continue
        if options.mixed and dtype == "float32":
            continue
        if origin == "table" or name in HEAVIEST:
            yield name


def _launches(
    path: str, n_tokens: int, dtype: str, bits: int, group: int, blocks: dict[str, Any], options: str
) -> list[Launch]:
    key = (path, n_tokens, dtype, bits, group, json.dumps(blocks, sort_keys=True), options)
    if key not in _recorded:
        _recorded[key] = layer_launches(path, n_tokens, getattr(torch, dtype), bits, group, blocks, OPTIONS[options])
    return _recorded[key]


def _covers(dtype: str, bits: int, options: str) -> bool:
    """Of each format the heaviest variant of every size; of bfloat16 also what most calls make, and every kernel."""
    heaviest = "everything" if dtype == "float32" else "hf everything"
    often = (("plain", "tapped") if bits == 16 else ("plain",)) if dtype == "bfloat16" else ()
    return options == heaviest or options in often


def _claims(launch: Launch, blocks: dict[str, Any]) -> bool:
    return any(blocks.get(part, {}).get("wgmma", False) for part in ("gate_up", "down") if launch.name.startswith(part))


def _add(found: dict[Launch, Claim], launch: Launch, claim: Claim) -> None:
    old = found.get(launch, claim)
    found[launch] = Claim(old.label, old.wgmma or claim.wgmma, old.covering or claim.covering)
