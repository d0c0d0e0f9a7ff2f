"""The claim of the script beside: a sweep at least three times as fast as TransformerLens'."""

from __future__ import annotations

import pytest

pytest.importorskip("transformer_lens", reason="the interp extra is not installed")

from tests.benchmarks.patching_speed import TEMPLATES, compare


@pytest.mark.slow
def test_a_sweep_is_three_times_as_fast(capsys: pytest.CaptureFixture[str]) -> None:
    """Medians of interleaved rounds; `compare` also checks that the results agree."""
    ratios = compare("nano-moe-thinking", TEMPLATES[0], rounds=7)
    assert ratios["TransformerLens, its own bridge"] >= 3
    assert "x ours" in capsys.readouterr().out
