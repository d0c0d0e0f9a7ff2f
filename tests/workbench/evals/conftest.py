"""Tasks of the harness are run on the bundled models; nothing may reach for a network."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which both packages read once, when they are imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


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
