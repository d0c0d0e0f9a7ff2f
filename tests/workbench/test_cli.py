from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workbench import cli
from workbench.io.runs import Run
from workbench.memory import config_of


def test_study_and_report_on_a_checkpoint(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, prompts = saved
    out = tmp_path / "run"
    command = ["study", str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--limit", "2", "--no-experts"]
    chat = ["--template", "harmony", "--efforts", "low,high", "--max-new-tokens", "3", "--batch-size", "4"]
    assert cli.main([*command, *chat]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    run = Run.open(out)
    assert run.manifest["settings"]["efforts"] == ["low", "high"]
    assert run.manifest["counts"]["n_docs"] == 2 * 2 * 2
    assert run.manifest["model"]["name"] == checkpoint.name
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").exists()
    assert cli.main([*command, *chat, "--seed", "7"]) == 0  # the same run, other resampling
    assert cli.main(["report", str(out)]) == 0
    assert Run.open(out).seed == 7


def test_a_checkpoint_without_chat_template_is_read_as_plain_text(saved: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, prompts = saved
    assert (
        cli.main(["study", str(checkpoint), "--prompts", str(prompts), "--out", str(tmp_path / "run"), "--no-experts"])
        == 0
    )
    assert Run.open(tmp_path / "run").manifest["settings"]["template"] == "plain"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("no-such-model", "no-such-model: expected"),
        ("nano-moe-thinking", "--compare: expected the tokenizer and shape"),
    ],
)
def test_a_checkpoint_that_cannot_be_compared_is_refused_before_the_study(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str, message: str
) -> None:
    checkpoint, prompts = saved
    out = tmp_path / "run"
    assert cli.main(["study", str(checkpoint), "--prompts", str(prompts), "--out", str(out), "--compare", other]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_empty_list_of_efforts_is_not_all_of_them(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, prompts = saved
    command = ["study", str(checkpoint), "--prompts", str(prompts), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--template", "harmony", "--efforts", ""]) == 2
    assert "efforts: expected some of low, medium, high, got none" in capsys.readouterr().err


def test_params_prints_the_published_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["params", "llm-jp-4-32b-a3b-thinking"]) == 0
    printed = capsys.readouterr().out
    assert "32,139,028,992" in printed
    assert "3,827,476,992" in printed


def test_params_takes_bundled_models_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["params", "nano-moe-thinking"]) == 0
    assert f"{config_of('nano-moe-thinking').n_params:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["study", "no-such-model"],
        ["study", "--prompts", "no-such-file.jsonl"],
        ["study", "--limit", "0"],
        ["study", "--seed", "-1"],
        ["report", "no-such-run"],
        ["params", "gpt-2"],
    ],
)
def test_errors_are_one_line_on_stderr(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("workbench: ")
    assert captured.err.count("\n") == 1


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "report", interrupted)
    assert cli.main(["report", "anything"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_unknown_arguments_are_refused_by_argparse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["study", "--template", "chatml"])
    assert "invalid choice: 'chatml'" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, workbench.cli as c; c._parser().format_help(); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def test_module_and_command_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "workbench", "--help"], capture_output=True, text=True, check=True)
    assert "study" in done.stdout
