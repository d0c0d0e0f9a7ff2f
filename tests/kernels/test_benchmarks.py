"""The benchmark runs from end to end on tiny shapes; what it writes is complete. Times are looked at by nobody here."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = REPOSITORY / "kernels" / "benchmarks" / "run.py"


def smoke(out: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    command = [sys.executable, str(RUN), "--smoke", "--device", "cpu", "--out", str(out), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, list(csv.DictReader(out.open())) if out.exists() else []


def check(done: subprocess.CompletedProcess[str], rows: list[dict], impl: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["section"] for row in rows} >= {"ceiling", "correctness", "layer", "cost", "format", "model"}
    failed = [row for row in rows if row["note"] and not row["note"].startswith(("ok", "context"))]
    assert {row["name"] for row in failed} <= {"liger"}, failed  # whose package may be absent
    timed = [row for row in rows if row["section"] == "layer" and row["us"]]
    for routing in ("uniform", "skewed"):
        names = {row["name"] for row in timed if row["routing"] == routing}
        assert names >= {f"ours {impl}", "transformers eager", "transformers grouped_mm", "torch grouped_mm"}
    assert all(row["torch"] and row["device"] and row["cores"] for row in rows)
    assert {row["name"] for row in rows if row["section"] == "model"} == {"prefill", "decode"}


@pytest.mark.slow
def test_the_cpu_run_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    check(*smoke(tmp_path / "cpu.csv"), "sorted")


@pytest.mark.slow
def test_the_triton_run_is_complete_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    done, rows = smoke(tmp_path / "triton.csv", "--impl", "triton", TRITON_INTERPRET="1")
    check(done, rows, "triton")


@pytest.mark.slow
def test_a_spent_budget_is_said_and_not_hidden(tmp_path: Path) -> None:
    done, rows = smoke(tmp_path / "cpu.csv", "--budget", "0")
    assert done.returncode == 0, done.stderr
    left_out = [row for row in rows if row["note"].startswith("left out: the time budget is spent")]
    assert left_out
    assert any(row["section"] == "correctness" and row["note"] == "ok" for row in rows)
