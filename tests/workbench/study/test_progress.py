from __future__ import annotations

import time

import pytest

from workbench.study.progress import Stopwatch, show_progress


def test_without_a_terminal_there_are_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(show_progress([2, 3, 4], n_parts=5)) == [2, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["study: continuing, 2 of 5 batches are done", "study: batch 5 of 5, 0 s left"]


def test_a_finished_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(show_progress([], n_parts=5)) == []
    assert capsys.readouterr().err == ""


def test_it_can_be_kept_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(show_progress([2, 3, 4], n_parts=5, shown=False)) == [2, 3, 4]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(show_progress([0, 1], n_parts=2)) == [0, 1]
    assert "2/2" in capsys.readouterr().err


def test_the_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("sleep"):
            time.sleep(0.02)
    seconds = watch.report()["seconds"]
    assert 0.04 <= seconds["sleep"] <= seconds["total"]
