"""Runs the tests in interpreted/ in a process of their own: triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")
FOLDER = Path(__file__).parent / "interpreted"
LONG = sorted(path.name for path in FOLDER.glob("test_*.py") if "pytest.mark.slow" in path.read_text())


def run(name: str, marks: str) -> int:
    """How many tests of one file, or of all, that have these marks passed; fails with their output."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", str(FOLDER / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # blocks are too small for threads
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"\b(\d+) passed", done.stdout)
    assert passed, done.stdout
    return int(passed[1])


def test_in_the_interpreter() -> None:
    assert run("", "not slow") > 100  # all files in one process: most of a short one is imports


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_in_the_interpreter_at_length(name: str) -> None:
    assert run(name, "slow") > 0
