"""Editing and comparing checkpoints in tests, and running Python in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from workbench.models import Llama

REPOSITORY = Path(__file__).resolve().parents[1]


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def assert_same_weights(one: Llama, other: Llama) -> None:
    params = dict(other.named_parameters())
    assert params.keys() == dict(one.named_parameters()).keys()
    for name, param in one.named_parameters():
        assert torch.equal(param, params[name]), name


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment}, check=False
    )
