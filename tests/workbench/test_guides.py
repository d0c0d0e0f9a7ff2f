"""The commands and code of the pages in docs/ run as they are printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from workbench.cli import _parser
from workbench.interventions import from_json
from workbench.io.runs import Run

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
ELSEWHERE = {"coming-from.md", "serving.md", "evaluation.md"}  # beside the tests of what they describe
GUIDES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in ELSEWHERE)
NEEDS_CHROMIUM = "save_figure("


def blocks(guide: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / guide).read_text(encoding="utf-8"), re.M | re.S)
    return [text for kind, text in found if kind in languages]


WITH_PYTHON = [guide for guide in GUIDES if blocks(guide, "python")]


@pytest.fixture
def beside_runs(finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the runs and the notebook that pages open; the run is a small one."""
    for name in ("demo", "nano-moe-thinking"):
        shutil.copytree(finished_run.path, tmp_path / "runs" / name)
    shutil.copytree(REPOSITORY / "notebooks", tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("guide", WITH_PYTHON)
def test_python_runs(guide: str, beside_runs: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(guide, "python"):
        if NEEDS_CHROMIUM in block and not shutil.which("chromium"):
            block = "\n".join(line for line in block.splitlines() if NEEDS_CHROMIUM not in line)
        exec(compile(block, guide, "exec"), names)
    assert len(names) > 1


@pytest.mark.parametrize("guide", GUIDES)
def test_python_parses_and_commands_exist(guide: str) -> None:
    for block in blocks(guide, "python"):
        compile(block, guide, "exec")
    for command in "".join(blocks(guide, "", "sh")).replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(command, comments=True) if "=" not in word or word.startswith("-")]
        if words[:1] == ["workbench"]:
            _parser().parse_args(words[1:])
        elif words[:1] == ["make"]:
            assert f"\n{words[1]}:" in (REPOSITORY / "Makefile").read_text("utf-8"), command
        elif words:
            assert words[0] in ("python", "papermill"), command
            assert [word for word in words[1:] if (REPOSITORY / word).exists() and "/" in word], command


def test_there_are_pages_with_code() -> None:
    assert len(WITH_PYTHON) >= 8


def test_the_json_is_an_intervention() -> None:
    (text,) = blocks("interventions.md", "json")
    assert from_json(json.loads(text))[0].kind == "knock_out"
