"""Measure the expert layer and the whole model in one call; writes a CSV and prints a table last.

    python kernels/benchmarks/run.py                    the GPU, if there is one, else the CPU paths
    python kernels/benchmarks/run.py --device cpu --threads 2
    python kernels/benchmarks/run.py --smoke            tiny shapes: does everything run?

Correctness against the oracle comes first: after a wrong result nothing is timed. Each section stands alone, what fails
becomes a row that says why, and the CSV is written after each section. Needs torch, triton and safetensors, and
transformers for those peers.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # a bare checkout works without being installed
sys.path.insert(2, str(Path(__file__).resolve().parents[2]))

import torch
from layers import Bench
from measure import Report, cpu_clock
from models import REAL as REAL_MODEL
from models import SMOKE as SMOKE_MODEL
from models import whole_model
from registry import REAL, SMALL, SMOKE, versions

COLUMNS = (
    "section", "name", "n_tokens", "routing", "dtype", "us", "floor_us", "percent_of_floor", "ours_is_faster_by",
    "percent_more", "tokens_per_s", "value", "how", "note",
)  # fmt: skip
GPU_TOKENS, CPU_TOKENS = (1, 4, 8, 16, 64, 256, 512, 1024, 4096, 16384), (1, 64, 512)
MODEL_SECONDS = 180.0  # of the budget on a GPU: what the layer's sections leave for the whole model


def machine(device: torch.device) -> dict[str, str]:
    """What stands in every row: device, driver, cores, threads and versions."""
    about = {"device": platform.processor() or platform.machine(), "driver": "", "cores": str(os.cpu_count())}
    about |= {"threads": str(torch.get_num_threads()), "capability": torch.backends.cpu.get_cpu_capability()}
    about |= {"clock": "CPU time" if cpu_clock() is time.process_time else "wall"}
    if device.type == "cuda":
        about |= {"clock": "device", "device": torch.cuda.get_device_name(device), "driver": _driver()}
        about["capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return about | versions()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


@torch.no_grad()
def measure(report: Report, device: torch.device, smoke: bool, impl: str, brief: bool = False) -> bool:
    """All sections in order of importance; False as soon as a result was wrong, which has no time."""
    on_gpu = device.type == "cuda"
    shape = SMOKE if smoke else REAL if on_gpu else SMALL
    with_model = (on_gpu or smoke) and not brief
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        bench = report.attempt("layer", "weights", lambda d=dtype: Bench(report, shape, d, device, impl))
        if bench is None:
            continue
        if not _right(bench, on_gpu, smoke):
            return False
        reserve = (MODEL_SECONDS if with_model else 60.0) if on_gpu and not smoke else 0.0
        for name, section in _sections(bench, on_gpu, smoke, brief):
            report.section("layer", name, section, reserve, dtype=str(dtype))
        del bench, section  # their weights make room for the next
    if on_gpu:
        torch.cuda.empty_cache()
    if with_model:
        _model(report, device, smoke, impl)
    return True


def _right(bench: Bench, on_gpu: bool, smoke: bool) -> bool:
    """Whether all that is timed is right, whatever the time: without this nothing else counts."""
    tokens = (1, 64, 512) if on_gpu else _tokens(on_gpu, smoke)
    found = [bench.report.attempt("correctness", bench.impl, lambda n=n: bench.correctness(n)) for n in tokens]
    bench.report.save(bench.report)
    return all(found)


def _tokens(on_gpu: bool, smoke: bool) -> tuple[int, ...]:
    return (1, 5, 40) if smoke else GPU_TOKENS if on_gpu else CPU_TOKENS


def _sections(bench: Bench, on_gpu: bool, smoke: bool, brief: bool) -> list[tuple[str, Callable[[], None]]]:
    """The layer's sections, the most important first."""
    tokens = _tokens(on_gpu, smoke)
    plain: list[tuple[str, Callable[[], None]]] = [(f"T={n}", partial(bench.compare, n, False)) for n in tokens]
    if brief:
        return plain
    costs = [("costs", partial(bench.costs, n)) for n in (tokens[0], 4096 if on_gpu else tokens[-1])]
    formats = [("formats", partial(bench.formats, n)) for n in (tokens[0], 64 if on_gpu else tokens[1])]
    return [*plain, *costs, *formats, *((f"T={n} skewed", partial(bench.compare, n, True)) for n in tokens)]


def _model(report: Report, device: torch.device, smoke: bool, impl: str) -> None:
    plan: dict[str, Any] = {"prompts": (512, 4096, 16384), "batches": (1, 8), "context": 512}
    if smoke:
        plan = {"prompts": (16, 32), "batches": (1, 2), "context": 8}
    dtype = torch.float32 if smoke and device.type == "cpu" else torch.bfloat16
    cfg = SMOKE_MODEL if smoke else REAL_MODEL
    report.section("model", "whole model", lambda: whole_model(report, cfg, dtype, device, impl, **plan))


def write(report: Report, about: dict[str, str], path: Path) -> None:
    """The rows so far; a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about])
        writer.writeheader()
        writer.writerows({**{key: _rounded(value) for key, value in row.items()}, **about} for row in report.rows)
    part.replace(path)


def table(report: Report) -> str:
    """The rows as text, a block per section."""
    lines: list[str] = []
    for section in dict.fromkeys(row["section"] for row in report.rows):
        rows = [row for row in report.rows if row["section"] == section]
        used = [column for column in COLUMNS[1:] if any(row.get(column) not in (None, "") for row in rows)]
        cells = [used, *([str(_rounded(row.get(column, ""))) for column in used] for row in rows)]
        widths = [max(len(line[at]) for line in cells) for at in range(len(used))]
        lines += ["", section, *("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)]
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="auto", help="ours, by name; auto: triton on a GPU, else sorted")
    parser.add_argument("--threads", type=int, help="of torch on CPU")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--brief", action="store_true", help="uniform routing alone, no costs, formats or model")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds; sections that no longer fit say so")
    parser.add_argument(
        "--out",
        type=Path,
        help="the CSV; default: kernels/benchmarks/results/DEVICE.csv, or with --smoke a temporary one",
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    impl = arguments.impl if arguments.impl != "auto" else "triton" if device.type == "cuda" else "sorted"
    about = machine(device)
    name = about["device"].lower().replace(" ", "_").replace("/", "_") if device.type == "cuda" else "cpu"
    folder = Path(tempfile.mkdtemp()) if arguments.smoke else Path(__file__).parent / "results"
    path = arguments.out or folder / f"{name}.csv"  # tiny shapes never take the place of figures
    report = Report(time.monotonic() + arguments.budget, save=lambda report: write(report, about, path))
    right = measure(report, device, arguments.smoke, impl, arguments.brief)
    write(report, about, path)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    print(table(report))
    print(f"\nwritten to {path}" if right else f"\nWRONG RESULTS, not timed; see {path}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
