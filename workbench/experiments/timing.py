"""Times of several ways of doing one thing, taken in turn, so that what else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import polars as pl
import torch

from workbench.errors import ConfigError


@torch.no_grad()
def time_in_turn(
    runs: Mapping[str, Callable[[], Any]], device: str | torch.device = "cpu", rounds: int = 9, passes: int = 1
) -> pl.DataFrame:
    """Seconds of every run in every round: columns round, name, seconds (of one of `passes` calls).

    Each run is called once before, and each round calls all of them one after the other. On a CPU with one thread the
    process's own time counts, which a busy machine stretches less; with several, and on a GPU after it has finished,
    the clock's. For `stats.ratios.time_ratios`. Raises ConfigError for no runs or fewer than one round.
    """
    if not runs or rounds < 1 or passes < 1:
        raise ConfigError(f"runs, rounds, passes: expected at least one of each, got {len(runs)}, {rounds}, {passes}.")
    wait, clock = _clock(torch.device(device))
    for run in runs.values():
        run()
    rows = []
    for number in range(rounds):
        for name, run in runs.items():
            wait()
            began = clock()
            for _ in range(passes):
                run()
            wait()
            rows.append((number, name, (clock() - began) / passes))
    return pl.DataFrame(rows, schema=["round", "name", "seconds"], orient="row")


def _clock(device: torch.device) -> tuple[Callable[[], None], Callable[[], float]]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device), time.perf_counter
    return lambda: None, time.process_time if torch.get_num_threads() == 1 else time.perf_counter
