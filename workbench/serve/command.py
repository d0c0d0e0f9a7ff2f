"""What the command line gives a server: its limits and its key."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import fields
from pathlib import Path

from workbench.errors import ConfigError
from workbench.serve.limits import Limits

KEY_VARIABLE = "WORKBENCH_API_KEY"
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def need_server() -> None:
    """Raises ConfigError when a package of the extra is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve: expected {', '.join(PACKAGES)}, got no {missing[0]}. Install 'llm-jp-4-workbench[serve]'."
        )


def limits_of(arguments: argparse.Namespace) -> Limits:
    """Those that were given; the others keep their defaults."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Limits)}
    return Limits(**{name: value for name, value in given.items() if value is not None})


def api_key(given: str | None, file: Path | None) -> str | None:
    """The key from the command line, a file, or the environment, whichever is there first."""
    if given is not None:
        return given
    if file is not None:
        return file.read_text(encoding="utf-8").strip()
    return (os.environ.get(KEY_VARIABLE) or "").strip() or None
