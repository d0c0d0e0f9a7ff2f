"""The committed notebooks: executed, small, clean, and still running."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_file_is_executed_and_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it top to bottom"
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < 1_500_000
    assert "widgets" not in notebook.metadata
    assert code[0].metadata.get("tags") == ["parameters"]
    assert "日本語の要約" in notebook.cells[0].source
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", text), "a machine path"
    assert len(code) <= 30


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_outputs_keep_their_kinds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels"))))
    notebook = nbformat.read(path, as_version=4)
    committed = [kinds(cell) for cell in notebook.cells]
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert [kinds(cell) for cell in notebook.cells] == committed


def kinds(cell: nbformat.NotebookNode) -> list[list[str]]:
    """What sort of outputs a cell has: their media types, not their values."""
    return [sorted(output.get("data", {output.output_type: None})) for output in cell.get("outputs", [])]
