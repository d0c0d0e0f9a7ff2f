"""What importing the workbench pulls in, and that the folder named kernels never becomes a package of that name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import workbench

REPOSITORY = Path(__file__).resolve().parents[1]


def imported_by(statement: str, block: tuple[str, ...] = ()) -> set[str]:
    """The modules loaded after `statement` in a fresh interpreter in which the packages of `block` do not exist."""
    script = f"import sys\nfor name in {block!r}: sys.modules[name] = None\n{statement}\nprint(*sys.modules)"
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    loaded = imported_by("import workbench")
    assert not loaded & {"torch", "polars", "plotly", "transformers", "transformer_lens", "nnsight", "huggingface_hub"}


def test_using_every_public_name_needs_no_framework() -> None:
    names = ", ".join(workbench.__all__)
    loaded = imported_by(f"from workbench import {names}")
    assert not loaded & {"transformers", "transformer_lens", "nnsight", "ray", "fastapi", "lm_eval"}


@pytest.mark.parametrize(
    "statement",
    [
        "import workbench.models, workbench.family",
        f"sys.path.append({str(REPOSITORY / 'kernels/benchmarks')!r}); import run",
    ],
    ids=["models", "benchmark"],
)
def test_models_and_the_benchmark_need_torch_alone(statement: str) -> None:
    absent = (
        "numpy",
        "polars",
        "plotly",
        "scipy",
        "tokenizers",
        "jinja2",
        "huggingface_hub",
        "tqdm",
        "jaxtyping",
        "transformers",
        "hypothesis",
    )
    assert "torch" in imported_by(statement, block=absent)


@pytest.mark.parametrize("package", ["workbench.stats", "workbench.plots"])
def test_stats_and_plots_see_no_torch(package: str) -> None:
    statement = (
        "import importlib, pkgutil\n"
        f"import {package} as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{package.__name__}.{module.name}')"
    )
    assert "torch" not in imported_by(statement)


def test_public_names_are_sorted_and_exist() -> None:
    assert workbench.__all__ == sorted(workbench.__all__)
    for name in workbench.__all__:
        assert getattr(workbench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = workbench.nothing


def test_the_kernels_folder_is_not_importable_as_kernels() -> None:
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(REPOSITORY)
