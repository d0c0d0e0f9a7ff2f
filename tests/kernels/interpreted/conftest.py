"""Tests of the Triton kernels on CPU, collected only where triton runs interpreted from its first import on.

`TRITON_INTERPRET=1 pytest tests/kernels/interpreted` runs them; so does test_interpreted.py, in a process apart.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test names no blocks, large ones: the interpreter's time goes by operations."""
    from moe_problems import BLOCKS

    from workbench_kernels.moe import api

    def blocks_for(*arguments: Any) -> dict[str, Any]:
        return BLOCKS

    monkeypatch.setattr(api, "blocks_for", blocks_for)


def pytest_configure(config: pytest.Config) -> None:
    """numpy speaks up where a GPU silently gives inf or NaN; whether those are right is what the tests look at."""
    config.addinivalue_line("filterwarnings", "ignore:.*encountered in:RuntimeWarning")
