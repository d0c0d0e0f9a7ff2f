"""Compile every shipped configuration for every architecture, without a GPU, and fail where the code is not good.

    python kernels/tools/aot_check.py [--arch sm_90,gfx942] [--cover all] [--jobs 2] [--json FILE]

Per launch: it compiles; nothing spills to memory; shared memory stays within the device's limit; and where a table
says "wgmma", the code has it. Safe block sizes are checked as well, on every architecture. Exit status 1 when anything
fails. Uses what the triton wheel carries (ptxas, cuobjdump). TRITON_INTERPRET must be unset: triton reads it
when a kernel is defined.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import triton
from launches import OPTIONS, Launch, layer_launches
from triton.backends.compiler import GPUTarget

from workbench_kernels import tables
from workbench_kernels.moe.blocks import SAFE, safe_blocks

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# target, bytes of shared memory that one block may have
ARCHITECTURES: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_86": (GPUTarget("cuda", 86, 32), 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
SHIPPED = ("sm_80", "sm_90", "sm_100", "gfx942")  # those with a table; sm_86 runs the safe sizes
FORMATS = ("bfloat16/16", "bfloat16/8", "bfloat16/4", "float16/16", "float16/8", "float16/4", "float32/16")
_SAFE_TOKENS = {"decode": 1, "skinny": 64, "tile": 4096}


class Case(NamedTuple):
    """One layer call to compile on one architecture."""

    arch: str
    path: str
    n_tokens: int
    dtype: str
    bits: int
    group: int
    blocks: dict[str, Any]
    options: str
    numerics: str
    label: str


class Result(NamedTuple):
    """What the compiler made of one launch; `problems` is empty when all is well."""

    label: str
    kernel: str
    problems: tuple[str, ...]
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instruction: str = ""
    seconds: float = 0.0


def cases(archs: tuple[str, ...], cover: str, formats: tuple[str, ...]) -> Iterator[Case]:
    """What to compile. all: every shipped entry and safe size with every option set. heaviest: every shipped entry with
    all options at once, and every option set for plain bfloat16 on sm_90. first: of each path, the first bucket and the
    safe sizes, with all options at once."""
    for arch in archs:
        for entry in tables.entries(arch):
            if f"{entry['dtype']}/{entry['bits']}" not in formats:
                continue
            for path in ("decode", "skinny", "tile"):
                for tokens, blocks in list(entry.get(path, {}).items())[: 1 if cover == "first" else None]:
                    yield from _variants(arch, path, int(tokens), entry["dtype"], entry["bits"], blocks, "table", cover)
        for dtype, bits in (tuple(name.split("/")) for name in formats if cover != "heaviest"):
            for path in SAFE:
                safe = safe_blocks(path, getattr(torch, dtype))
                yield from _variants(arch, path, _SAFE_TOKENS[path], dtype, int(bits), safe, "safe", cover)


def _variants(
    arch: str, path: str, n_tokens: int, dtype: str, bits: int, blocks: dict[str, Any], origin: str, cover: str
) -> Iterator[Case]:
    widest = cover == "first" or (cover == "heaviest" and (arch, dtype, bits) != ("sm_90", "bfloat16", 16))
    for group in (64, 128) if bits == 4 and cover != "first" else (64,):
        for options in ("everything",) if widest else OPTIONS if bits == 16 else ("plain", "everything"):
            numerics = ("trained", "hf") if options == "plain" and dtype == "bfloat16" and bits == 16 else ("trained",)
            for kind in numerics:
                label = f"{arch} {origin} {path} T={n_tokens} {dtype}/{bits} {options} {kind}"
                yield Case(arch, path, n_tokens, dtype, bits, group, blocks, options, kind, label)


def check_case(case: Case, seen: set[tuple[str, Launch]]) -> list[Result]:
    """Compile the launches of one case that no earlier case had on this architecture."""
    results = []
    launches = layer_launches(
        case.path, case.n_tokens, getattr(torch, case.dtype), case.bits, case.group, case.blocks, case.options,
        case.numerics,
    )  # fmt: skip
    for launch in launches:
        if (case.arch, launch) not in seen:
            seen.add((case.arch, launch))
            results.append(check_launch(launch, case.arch, case.label, claims_wgmma(launch, case.blocks)))
    return results


def claims_wgmma(launch: Launch, blocks: dict[str, Any]) -> bool:
    return any(blocks.get(part, {}).get("wgmma", False) for part in ("gate_up", "down") if launch.name.startswith(part))


def check_launch(launch: Launch, arch: str, label: str, wants_wgmma: bool) -> Result:
    target, limit = ARCHITECTURES[arch]
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    began = time.monotonic()
    try:
        compiled = triton.compile(launch.source(), target=target, options=options)
    except Exception as error:  # whatever the compiler throws is the finding, and goes into the report
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        return Result(label, launch.name, (f"does not compile: {last.strip()[:160]}",))
    found = inspect_cuda(compiled) if target.backend == "cuda" else inspect_hip(compiled)
    registers, spills, instruction = found
    shared = compiled.metadata.shared
    problems = []
    if spills:
        problems.append(f"{spills} bytes spilled")
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory, the limit is {limit}")
    if wants_wgmma and instruction != "wgmma":
        problems.append(f"claims wgmma, has {instruction or 'no matrix instruction'}")
    seconds = time.monotonic() - began
    return Result(label, launch.name, tuple(problems), registers, spills, shared, instruction, seconds)


def inspect_cuda(compiled: Any) -> tuple[int, int, str]:
    """Registers, bytes of stack, matrix instruction. These kernels have no arrays: what lies on a stack was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = [re.search(rf"\b{name}:(\d+)", usage.stdout + usage.stderr) for name in ("REG", "STACK", "LOCAL")]
    if None in found:
        raise RuntimeError("cuobjdump: expected registers, stack and local, got others. The format changed; mend this.")
    registers, stack, local = (int(match[1]) for match in found if match)
    # read from ptx, each of these stands for one instruction of the machine; disassembling takes longer than compiling
    kinds = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "fma": "fma.rn"}
    ptx = compiled.asm["ptx"]
    return registers, stack + local, next((name for name, mark in kinds.items() if mark in ptx), "")


def inspect_hip(compiled: Any) -> tuple[int, int, str]:
    text = compiled.asm["amdgcn"]
    counts = [re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")]
    if None in counts:
        raise RuntimeError("amdgcn: expected registers and scratch, got others. The format changed; mend inspect_hip.")
    registers, scratch = (int(match[1]) for match in counts if match)
    return registers, scratch, "mfma" if "v_mfma" in text else ""


def _check_group(group: list[Case]) -> list[Result]:
    seen: set[tuple[str, Launch]] = set()
    return [result for case in group for result in check_case(case, seen)]


def check(
    archs: tuple[str, ...], cover: str = "all", formats: tuple[str, ...] = FORMATS, jobs: int = 1
) -> list[Result]:
    """Every result, in a fixed order. Groups share launches, so that a process compiles each once."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in cases(archs, cover, formats):
        groups.setdefault((case.arch, case.dtype, str(case.bits)), []).append(case)
    if jobs == 1:
        return [result for group in groups.values() for result in _check_group(group)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return [result for results in pool.map(_check_group, groups.values(), chunksize=1) for result in results]


def summary(results: list[Result]) -> list[dict[str, Any]]:
    """One row per architecture and kernel: how many launches, and the most that one of them takes."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.label.split()[0], result.kernel), []).append(result)
    return [
        {
            "arch": arch, "kernel": kernel, "launches": len(group),
            "with_problems": sum(bool(result.problems) for result in group),
            "most_registers": max(result.registers for result in group),
            "most_spilled_bytes": max(result.spills for result in group),
            "most_shared_bytes": max(result.shared for result in group), "shared_limit": ARCHITECTURES[arch][1],
            "instructions": " ".join(sorted({result.instruction for result in group} - {""})),
            "triton": triton.__version__, "date": datetime.now(UTC).date().isoformat(),
        }
        for (arch, kernel), group in groups.items()
    ]  # fmt: skip


def write_summary(results: list[Result], file: Path) -> None:
    rows = summary(results)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join([*SHIPPED, "sm_86"]), help="comma-separated architectures")
    parser.add_argument("--formats", default=",".join(FORMATS), help="dtype of activations / bits of weights")
    parser.add_argument("--cover", default="all", choices=["all", "heaviest", "first"], help=cases.__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write every result there")
    parser.add_argument("--csv", type=Path, help="write a summary there, one row per architecture and kernel")
    arguments = parser.parse_args()
    archs = tuple(arguments.arch.split(","))
    if unknown := [arch for arch in archs if arch not in ARCHITECTURES]:
        parser.error(f"--arch: expected among {', '.join(ARCHITECTURES)}, got {', '.join(unknown)}.")
    results = check(archs, arguments.cover, tuple(arguments.formats.split(",")), arguments.jobs)
    if arguments.json:
        arguments.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    if arguments.csv and results:
        write_summary(results, arguments.csv)
    bad = [result for result in results if result.problems]
    for result in bad:
        print(f"{result.label}: {result.kernel}: {'; '.join(result.problems)}")
    print(f"triton {triton.__version__}: {len(results)} launches on {', '.join(archs)}, {len(bad)} with problems")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
