"""The recipes of docs/interop run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs" / "interop"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_recipe(page: Path, tmp_path: Path) -> None:
    pytest.importorskip(page.stem, reason="that extra is not installed")
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    script = tmp_path / "recipe.py"  # a file of its own: nnsight reads the source of a with block
    script.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(script))
