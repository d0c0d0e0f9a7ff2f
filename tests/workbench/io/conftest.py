"""Small checkpoints to read and to damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.io.saving import save_model
from workbench.models import Llama


@pytest.fixture
def one_file(moe: Llama, tmp_path: Path) -> Path:
    """A one-file checkpoint of the small sparse model."""
    return save_model(moe, tmp_path / "one_file")


@pytest.fixture
def sharded(moe: Llama, tmp_path: Path) -> Path:
    """The same in several shards with an index."""
    return save_model(moe, tmp_path / "sharded", max_shard_bytes=20_000)
