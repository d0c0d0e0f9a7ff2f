"""How it is measured: interleaved medians, CUDA graphs, and the floor from ceilings measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from registry import Shape
from torch import Tensor


@dataclass
class Report:
    """Rows of the CSV, and the time that is left."""

    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    save: Callable[[Report], None] = lambda report: None  # called after each section: what breaks off loses one

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, section: str, name: str, **values: Any) -> None:
        self.rows.append({"section": section, "name": name, **values})

    def section(self, section: str, name: str, action: Callable[[], Any], reserve: float = 0.0, **values: Any) -> Any:
        """`attempt`, if more than `reserve` seconds are left; what is left out becomes a row too. Then saves."""
        if self.left > reserve:
            done = self.attempt(section, name, action, **values)
        else:
            done = self.add(section, name, **values, note="left out: the time budget is spent")
        self.save(self)
        return done

    def attempt(self, section: str, name: str, action: Callable[[], Any], **values: Any) -> Any:
        """The result of `action`; whatever it raises becomes a row of its own and loses nothing else."""
        try:
            return action()
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            self.add(section, name, **values, note=f"{type(error).__name__}: {first}"[:200])
            return None


@dataclass(frozen=True)
class Ceilings:
    """What the device can do: bytes per second read, and floating-point operations per second in the layer's dtype."""

    bytes_per_s: float
    flop_per_s: float

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device, small: bool = False) -> Ceilings:
        n_bytes, n = (2**24, 512) if small else (2**27, 1024) if device.type == "cpu" else (2**31, 8192)
        source = torch.ones(n_bytes // 4, dtype=torch.float32, device=device)
        copy = medians({"copy": lambda: source.clone()}, device, reps=7)["copy"]
        a, b = (torch.empty(n, n, dtype=dtype, device=device).normal_() for _ in range(2))
        product = medians({"mm": lambda: a @ b}, device, reps=7)["mm"]
        return cls(2 * n_bytes / copy, 2 * n**3 / product)  # a copy reads and writes

    def floor(self, shape: Shape, n_tokens: int, n_hit: float, weight_bytes: float, item: int) -> float:
        """Seconds: every weight that is hit read once, x read, y written; or the arithmetic, whichever takes longer."""
        expert = 3 * shape.d_model * shape.d_expert
        n_bytes = n_hit * expert * weight_bytes + shape.n_experts * shape.d_model * item
        n_bytes += 2 * n_tokens * shape.d_model * item
        flop = 2 * n_tokens * (shape.k * expert + shape.d_model * shape.n_experts)
        return max(n_bytes / self.bytes_per_s, flop / self.flop_per_s)


def medians(
    runs: dict[str, Callable[[], Any]], device: torch.device, reps: int = 15, budget_s: float = 20.0
) -> dict[str, float]:
    """Seconds of each, in turn so that drift hits all alike; at least 7 rounds, fewer than `reps` if time runs out."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.monotonic()
    for done in range(reps):
        if done >= 7 and time.monotonic() - began > budget_s:
            break
        for name, run in runs.items():
            times[name].append(_timed(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def graphed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A CUDA graph of `run`; on CPU `run` itself. Raises what the capture raises."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # compile and allocate outside of the capture
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = cpu_clock()
    began = clock()
    run()
    return clock() - began


def cpu_clock() -> Callable[[], float]:
    """For one thread its CPU time, which a busy machine does not stretch; for several, the time on the wall."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter
