"""The tuner's choice of what to measure, on CPU: nothing is timed, the order and the shares are looked at."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench_kernels import tables, tune
from workbench_kernels.moe.blocks import SAFE, safe_blocks
from workbench_kernels.moe.plan import PATHS

SHAPE = {"d_model": 16, "d_expert": 8, "n_experts": 4, "k": 2}
ENTRY = {"device": "A", "triton": "3.6", "shape": SHAPE, "dtype": "float32", "bits": 16, "tuned": True}


def tuner() -> tune.Tuner:
    return tune.Tuner(SHAPE, torch.float32, 16, torch.device("cpu"))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_no_candidate_comes_twice_and_neighbours_come_first(path: str, part: str, bits: int) -> None:
    start = SAFE[path] | {part: SAFE[path][part] | {"wgmma": True}}
    found = list(tune.candidates(path, part, bits, start))
    assert found[0] is start
    seen = [json.dumps(tune._with(blocks, part), sort_keys=True) for blocks in found]  # wgmma: a claim, not a size
    assert len(set(seen)) == len(seen)
    distances = [tune._distance(part, blocks, start) for blocks in found]
    near = distances.count(1)
    assert distances[: near + 1] == [0] + [1] * near
    assert min(distances[near + 1 :]) > 1
    assert found == list(tune.candidates(path, part, bits, start))
    if bits == 4:
        assert {blocks[part]["bk"] for blocks in found} == {start[part]["bk"]}


def test_a_budget_that_ends_early_has_seen_large_and_small_tiles() -> None:
    found = list(tune.candidates("tile", "gate_up", 16, SAFE["tile"]))[:40]
    assert {blocks["bm"] for blocks in found} == {64, 128}
    assert {blocks["gate_up"]["bn"] for blocks in found} == {64, 128, 256}


def test_both_parts_get_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one second per timing: 20 seconds are ten candidates each."""
    one, clock = tuner(), [0.0]
    timed: list[tuple[Any, Any]] = []

    def seconds(path: str, blocks: Any, x: torch.Tensor) -> float:
        clock[0] += 1.0
        timed.append((blocks["gate_up"], blocks["down"]))
        return float(len(timed) % 7)

    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(one, "right", lambda *arguments: True)
    monkeypatch.setattr(one, "_seconds", seconds)
    start = safe_blocks("decode", torch.float32)
    chosen = one.best("decode", 1, 20.0)
    by_gate_up = [down for _, down in timed].count(start["down"])
    assert 10 <= by_gate_up <= 12  # the last of them begins before the share is over; down starts from the same sizes
    assert 20 <= len(timed) <= 22
    assert chosen["down"] != start["down"]


def test_the_table_is_written_after_every_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, out = tuner(), tmp_path / "sm_90.json"
    calls: list[tuple[str, int, Any]] = []

    def best(path: str, n_tokens: int, deadline: float, like: Any) -> Any:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append((path, n_tokens, like))
        return {"name": f"{path} {n_tokens}"}

    monkeypatch.setattr(one, "best", best)
    old = {path: {"1": {"name": "old"}, "7": {"name": "old"}} for path in PATHS}
    tables.write_entry(out, ENTRY | old)
    tables.write_entry(out, ENTRY | {"device": "B"} | old)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(one, dict(ENTRY), out, time.monotonic() + 9, say=lambda *words, **how: None)
    other, written = tables.read_table(out)
    assert other == ENTRY | {"device": "B"} | old
    assert written["decode"] == {"1": {"name": "decode 1"}}
    assert written["skinny"] == {str(n): {"name": f"skinny {n}"} for n in tune.BUCKETS["skinny"][:3]}
    assert written["tile"] == old["tile"]  # not reached: what an earlier run found stays
    assert calls[0][2] is None
    assert calls[1][2] is None
    assert calls[2][2] == calls[3][2] == {"name": "skinny 16"}


def test_buckets_share_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, clock, deadlines = tuner(), [0.0], []

    def best(path: str, n_tokens: int, deadline: float, like: Any) -> Any:
        deadlines.append(deadline - clock[0])
        clock[0] += 0.5 if len(deadlines) == 1 else deadlines[-1]
        return {"name": path}

    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(one, "best", best)
    n_buckets = sum(map(len, tune.BUCKETS.values()))
    tune.tune(one, dict(ENTRY), tmp_path / "sm_90.json", float(n_buckets), say=lambda *words, **how: None)
    assert deadlines[0] == 1.0
    assert deadlines[1:] == pytest.approx([1 + 0.5 / (n_buckets - 1)] * (n_buckets - 1))  # what the first left over
    assert clock[0] == pytest.approx(n_buckets)
