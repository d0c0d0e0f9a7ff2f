"""A Jupyter interpretability workbench for the LLM-jp-4 models.

Importing this package imports nothing heavy: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.config import LlamaConfig, Qwen3MoeConfig
    from workbench.errors import WorkbenchError
    from workbench.family import FAMILY
    from workbench.hf_config import config_from_hf
    from workbench.io.prompts import load_prompts
    from workbench.io.runs import Run
    from workbench.io.saving import save_model
    from workbench.io.tokens import Tokenizer
    from workbench.io.weights import load_model
    from workbench.models import Llama, Qwen3Moe, build_model
    from workbench.plots.explorer import explore
    from workbench.study import run_study

__version__ = "0.1.0"

_HOMES = {
    "FAMILY": "workbench.family",
    "Llama": "workbench.models",
    "LlamaConfig": "workbench.config",
    "Qwen3Moe": "workbench.models",
    "Qwen3MoeConfig": "workbench.config",
    "Run": "workbench.io.runs",
    "Tokenizer": "workbench.io.tokens",
    "WorkbenchError": "workbench.errors",
    "build_model": "workbench.models",
    "config_from_hf": "workbench.hf_config",
    "explore": "workbench.plots.explorer",
    "load_model": "workbench.io.weights",
    "load_prompts": "workbench.io.prompts",
    "run_study": "workbench.study",
    "save_model": "workbench.io.saving",
}

__all__ = [
    "FAMILY",
    "Llama",
    "LlamaConfig",
    "Qwen3Moe",
    "Qwen3MoeConfig",
    "Run",
    "Tokenizer",
    "WorkbenchError",
    "build_model",
    "config_from_hf",
    "explore",
    "load_model",
    "load_prompts",
    "run_study",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
