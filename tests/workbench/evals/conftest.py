"""Tasks of the harness are run on the bundled models; nothing may reach for a network."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def base():  # type: ignore[no-untyped-def]
    """nano-moe-base in float32."""
    from workbench.io.weights import load_model

    return load_model("nano-moe-base", dtype="float32", progress=False)


@pytest.fixture(scope="session")
def thinking():  # type: ignore[no-untyped-def]
    """nano-moe-thinking in float32."""
    from workbench.io.weights import load_model

    return load_model("nano-moe-thinking", dtype="float32", progress=False)
