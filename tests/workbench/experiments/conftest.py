"""The bundled thinking checkpoints in float32, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench import load_model
from workbench.models import Llama

NANO = Path(__file__).resolve().parents[3] / "data" / "nano"


@pytest.fixture(scope="session")
def nano() -> Llama:
    return load_model(str(NANO / "nano-moe-thinking"), dtype="float32", progress=False)


@pytest.fixture(scope="session")
def nano_dense() -> Llama:
    return load_model(str(NANO / "nano-dense-thinking"), dtype="float32", progress=False)
