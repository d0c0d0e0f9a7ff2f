"""What the compiler made of every launch, one row each, under a key that changes with all that decides it.

A row is found again by `Launch.key`: the kernel's source with all that it calls, its signature, constants and options,
the architecture and triton's version. So a kernel or a table that changes leaves launches without a row, which is a
failure until `aot_check.py --record` has compiled them.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

LEDGER = Path(__file__).parent / "aot.csv"


class Made(NamedTuple):
    """What came out for one launch; `error` is empty when it compiled."""

    registers: int = 0
    spills: int = 0  # bytes
    shared: int = 0  # bytes
    instruction: str = ""
    error: str = ""


class Row(NamedTuple):
    arch: str
    kernel: str
    made_by: str  # the first case that makes this launch
    made: Made
    triton: str
    key: str


FIELDS = ("arch", "kernel", "made_by", *Made._fields, "triton", "key")


def problems(made: Made, shared_limit: int, wants_wgmma: bool) -> list[str]:
    """Why a launch must not ship; empty when all is well."""
    if made.error:
        return [made.error]
    found = []
    if made.spills:
        found.append(f"{made.spills} bytes spilled")
    if made.shared > shared_limit:
        found.append(f"{made.shared} bytes of shared memory, the limit is {shared_limit}")
    if wants_wgmma and made.instruction != "wgmma":
        found.append(f"claims wgmma, has {made.instruction or 'no matrix instruction'}")
    return found


def read(file: Path = LEDGER) -> dict[str, Row]:
    """Rows by key; none where there is no file."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        return {line["key"]: _row(line) for line in csv.DictReader(lines)}


def write(rows: dict[str, Row], file: Path = LEDGER) -> None:
    """Sorted, so that two versions can be compared."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(FIELDS)
        for row in sorted(rows.values()):
            writer.writerow((row.arch, row.kernel, row.made_by, *row.made, row.triton, row.key))


def summary(rows: dict[str, Row]) -> list[str]:
    """One line per architecture: how many launches, and the most that one of them takes."""
    lines = []
    for arch in dict.fromkeys(row.arch for row in rows.values()):
        made = [row.made for row in rows.values() if row.arch == arch]
        most = [max(getattr(each, name) for each in made) for name in ("registers", "spills", "shared")]
        instructions = " ".join(sorted({each.instruction for each in made} - {""}))
        lines.append(
            f"{arch}: {len(made)} launches, at most {most[0]} registers, {most[1]} bytes spilled, "
            f"{most[2]} bytes of shared memory; {instructions}"
        )
    return lines


def _row(line: dict[str, str]) -> Row:
    numbers = (int(line[name]) for name in ("registers", "spills", "shared"))
    made = Made(*numbers, line["instruction"], line["error"])
    return Row(line["arch"], line["kernel"], line["made_by"], made, line["triton"], line["key"])
