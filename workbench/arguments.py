"""What several commands take alike: a model and where it runs, lists of names, a file of interventions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_runtime(command: argparse.ArgumentParser) -> None:
    """--dtype, --device and --moe-impl, as `model_of` reads them."""
    add = command.add_argument
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: float32 on CPU, else as stored")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    add("--moe-impl", default="auto", help="how experts are computed (default: %(default)s)")


def model_of(arguments: argparse.Namespace, name: str | None = None) -> Any:
    """The model that was named, or another of that name, loaded as the arguments say."""
    from workbench.io.weights import load_model

    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "auto")
    return load_model(name or arguments.model, dtype=dtype, device=arguments.device, moe_impl=arguments.moe_impl)


def interventions_of(file: Path | None) -> tuple[Any, ...]:
    """Those of a JSON file; none without a file."""
    from workbench.interventions import load_interventions

    return load_interventions(file) if file else ()


def names(text: str) -> tuple[str, ...]:
    """A list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
