"""What the targets run, without running it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("given", "out"), [([], "runs/demo"), (["OUT=elsewhere"], "elsewhere")])
def test_the_demo_may_be_written_elsewhere(given: list[str], out: str) -> None:
    done = subprocess.run(["make", "-n", "demo", *given], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"workbench study --out {out}\n" in done.stdout
