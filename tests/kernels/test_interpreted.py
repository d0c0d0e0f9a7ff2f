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
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run(name: str, marks: str) -> None:
    """The tests of one file, or of all, that have these marks; fails with their output, and when there are none."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", str(FOLDER / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # blocks are too small for threads
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)
    if name and done.returncode == 5 and re.search(r"\d+ deselected", done.stdout):
        return  # none of this file's tests has the mark
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b\d+ passed", done.stdout), done.stdout


def test_in_the_interpreter() -> None:
    run("", "not slow")  # all files in one process: most of a short one is imports


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter_at_length(name: str) -> None:
    run(name, "slow")
