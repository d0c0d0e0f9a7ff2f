"""The bundled sparse checkpoint in float32, loaded once for all doors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench import load_model
from workbench.models import Llama

NANO = Path(__file__).resolve().parents[3] / "data" / "nano"


@pytest.fixture(scope="session")
def nano() -> Llama:
    return load_model(str(NANO / "nano-moe-thinking"), dtype="float32", progress=False)


@pytest.fixture(scope="session")
def nano_dense() -> Llama:
    return load_model(str(NANO / "nano-dense-thinking"), dtype="float32", progress=False)


@pytest.fixture
def prompt() -> torch.Tensor:
    """Two rows of seven ordinary tokens of the nano vocabulary."""
    return torch.randint(300, 2800, (2, 7), generator=torch.Generator().manual_seed(0))
