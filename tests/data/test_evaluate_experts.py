"""What the bundled mixtures were found to do is written between the guide's markers, and nothing else is touched."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import evaluate_experts
import pytest
from evaluate_experts import GUIDE
from tables import FINDINGS

BEGIN, END = FINDINGS


def test_the_findings_go_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = tmp_path / "guide.md"
    shutil.copyfile(GUIDE, guide)
    monkeypatch.setattr(evaluate_experts, "measure", lambda name, args: f"### {name}\n\nfound with {args.controls}\n")
    monkeypatch.setattr(sys, "argv", ["evaluate_experts.py", "--guide", str(guide), "--controls", "7"])
    for _ in range(2):  # again over what is there
        evaluate_experts.main()
        text, original = guide.read_text("utf-8"), GUIDE.read_text("utf-8")
        before, rest = text.split(BEGIN)
        between, after = rest.split(END)
        assert between.count("found with 7") == 2
        assert "nano-moe-base" in between
        assert before == original.split(BEGIN)[0]
        assert after == original.split(END)[1]
