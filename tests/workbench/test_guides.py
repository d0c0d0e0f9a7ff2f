"""The commands and code of the guides run as they are printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from workbench.cli import _parser
from workbench.interventions import from_json

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDES = ("interventions.md", "patching.md", "attribution.md", "languages.md")


def blocks(guide: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / guide).read_text(encoding="utf-8"), re.M | re.S)
    return [text for kind, text in found if kind == language]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_python_runs(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(guide, "python")
    assert len(code) >= 3
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, guide, "exec"), names)


@pytest.mark.parametrize("guide", GUIDES)
def test_python_parses_and_commands_exist(guide: str) -> None:
    for block in blocks(guide, "python"):
        compile(block, guide, "exec")
    for command in "".join(blocks(guide, "")).splitlines():
        program, *arguments = shlex.split(command)
        if program == "workbench":
            assert _parser().parse_args(arguments).intervention
        else:
            assert (DOCS.parent / arguments[0]).is_file()


def test_the_json_is_an_intervention() -> None:
    (text,) = blocks("interventions.md", "json")
    assert from_json(json.loads(text))[0].kind == "knock_out"
