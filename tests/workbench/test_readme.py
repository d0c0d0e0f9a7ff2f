"""README.ja.md says what README.md says: the same blocks, headings, links and numbers; and what both show runs."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.cli import _parser
from workbench.family import family_member
from workbench.interventions import load_interventions
from workbench.memory import record_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
ENGLISH, JAPANESE = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md"))
HEADINGS = {
    "LLM-jp-4 workbench": "LLM-jp-4 workbench",
    "Two commands": "2 つのコマンド",
    "Five minutes": "5 分で",
    "Where to read on": "続きを読む",
    "The real models": "実際のモデル",
    "Layout": "構成",
    "Findings": "分かったこと",
    "What was measured and what was not": "測ったものと測っていないもの",
    "Licence": "ライセンス",
}


def blocks(text: str, language: str | None = None) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for kind, code in found if language in (None, kind)]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _unwrapped(text: str) -> str:
    """Without the line breaks that may stand inside what is looked for."""
    return re.sub(r"\n *", " ", text)


def headings(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^(#+) (.+)$", prose(text), re.MULTILINE)


def test_the_blocks_are_equal_one_by_one() -> None:
    for english, japanese in zip(blocks(ENGLISH), blocks(JAPANESE), strict=True):
        assert english == japanese
    assert len(blocks(ENGLISH)) >= 8


def test_the_headings_correspond() -> None:
    assert [(level, HEADINGS[title]) for level, title in headings(ENGLISH)] == headings(JAPANESE)


@pytest.mark.parametrize(
    "pattern", [r"\]\(([^)]+)\)", r"`([^`\n]+)`", r"\d+\.\d+"], ids=["links", "code in the text", "decimal numbers"]
)
def test_the_same_things_are_named_in_every_section(pattern: str) -> None:
    sections = [re.split(r"^## ", prose(text), flags=re.MULTILINE) for text in (ENGLISH, JAPANESE)]
    for english, japanese in zip(*sections, strict=True):
        one, other = (Counter(re.findall(pattern, _unwrapped(text))) for text in (english, japanese))
        other_language = Counter({"README.md": 1, "README.ja.md": 1})
        assert one - other_language == other - other_language, english.splitlines()[0]


def test_every_link_leads_somewhere() -> None:
    for text in (ENGLISH, JAPANESE):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (REPOSITORY / link).exists(), link


def test_every_command_parses() -> None:
    commands = [shlex.split(line, comments=True) for block in blocks(ENGLISH, "sh") for line in block.splitlines()]
    ours = [command for command in commands if command and command[0] == "workbench"]
    assert len(ours) >= 6
    for command in ours:
        arguments = _parser().parse_args(command[1:])
        if file := getattr(arguments, "intervention", None):
            assert load_interventions(REPOSITORY / file)
    assert {command[0] for command in commands if command} == {"make", "workbench"}


def test_every_file_named_by_a_command_exists() -> None:
    for command in re.findall(r"`((?:pytest|python) [^`]+)`", _unwrapped(prose(ENGLISH))):
        (file,) = [word for word in command.split() if word.endswith(".py")]
        assert (REPOSITORY / file).is_file(), command


def test_what_a_study_records_is_what_the_readme_says() -> None:
    cfg: Any = family_member("llm-jp-4-32b-a3b-thinking").config
    routing = record_bytes(cfg, ["routing"], torch.bfloat16)
    logits = sum(cfg.sparse_layers) * cfg.n_experts * torch.float16.itemsize
    for text in (ENGLISH, JAPANESE):
        said = re.findall(r"(\d+\.\d) kB", prose(text))
        assert said == [f"{n / 1000:.1f}" for n in (routing + logits, routing, logits)]
    assert _parser().parse_args(["study"]).router_logits


@pytest.mark.slow
def test_the_python_of_the_readme_runs(finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the block that loads a released model; a small run stands in for that of `make demo`."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished_run.path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    code = [block for block in blocks(ENGLISH, "python") if 'device="cuda"' not in block]
    assert len(code) == len(blocks(ENGLISH, "python")) - 1 == 4
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].tokens.shape[0] == 1


def test_every_finding_with_an_interval_stands_in_the_measured_tables() -> None:
    interval = r"[-+]?\d+\.\d+ \[[-+]?\d+\.\d+, [-+]?\d+\.\d+\]"
    tables = "".join((REPOSITORY / "docs" / name).read_text("utf-8") for name in ("findings.md", "evaluation.md"))
    measured = {found.replace("+", "") for found in re.findall(interval, tables)}
    for text, title in ((ENGLISH, "Findings"), (JAPANESE, HEADINGS["Findings"])):
        section = _unwrapped(text.split(f"## {title}\n")[1].split("\n## ")[0])
        claimed = {found.replace("+", "") for found in re.findall(interval, section)}
        assert len(claimed) >= 20
        assert claimed <= measured, claimed - measured
