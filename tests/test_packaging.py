"""What is declared, pinned and promised about installation agrees."""

from __future__ import annotations

import os
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if re.match(r"[a-z0-9]", line)
)
DECLARED = [
    *PROJECT["dependencies"],
    *(entry for extra in PROJECT["optional-dependencies"].values() for entry in extra),
]


@pytest.mark.parametrize("declared", DECLARED)
def test_every_requirement_is_pinned_within_its_range(declared: str) -> None:
    requirement = Requirement(declared)
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"{name}: not in constraints.txt"
    assert requirement.specifier.contains(PINS[name]), f"{declared}: constraints.txt pins {PINS[name]}"


def test_the_extras_are_the_documented_ones() -> None:
    assert set(PROJECT["optional-dependencies"]) == {
        "interp", "hf", "kernels", "serve", "eval", "ray", "notebooks", "docs", "dev",
    }  # fmt: skip


def test_every_make_target_of_the_readme_exists() -> None:
    named = set(
        re.findall(r"(?:^|`)make ([a-z]+)", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    rules = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "lab", "check"} <= named & rules
    assert named <= rules, f"the README names targets that do not exist: {named - rules}"


SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".jinja", ".html", ".css", ".js", ""}
SKIPPED = {"runs", "site", "build", "tokenizer.json", "kanji.txt", "test_packaging.py"}  # and what begins with . or __
KEPT = {".ci", ".gitignore", "__init__.py", "__main__.py"}


@cache
def texts() -> dict[str, str]:
    """Every text of the repository by its path; folders that hold none of ours are not entered."""
    found = {}
    for folder, inner, files in os.walk(REPOSITORY):
        kept = [
            name for name in (*inner, *files) if name in KEPT or not (name in SKIPPED or name.startswith((".", "__")))
        ]
        inner[:] = sorted(set(inner) & set(kept))
        for path in (Path(folder, name) for name in sorted(set(files) & set(kept))):
            if path.suffix in SUFFIXES:
                found[str(path.relative_to(REPOSITORY))] = path.read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("pattern", [r"(?<![\w.])/(work|root|farm|home|tmp)/", r"index-url", r"TODO|FIXME|XXX"])
def test_no_text_names_a_machine_or_is_unfinished(pattern: str) -> None:
    assert {"README.md", ".ci/run", "workbench/cli.py", "data/nano/recipe.py"} <= set(texts())
    found = [f"{path}: {match.group()}" for path, text in texts().items() if (match := re.search(pattern, text))]
    assert found == []
