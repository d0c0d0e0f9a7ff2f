"""A study under interventions: they act in its answers and in its routing, and decide which run it is."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from workbench.cli import main
from workbench.errors import InterventionError, RunError
from workbench.interventions import KnockOut, ScaleActivation, Where, save_interventions
from workbench.io.prompts import Prompt
from workbench.io.runs import Run
from workbench.models import Llama
from workbench.study import Settings, run_study, write_report

SETTINGS = {"max_new_tokens": 6, "batch_size": 8, "efforts": ("low",)}


def taken(run: Run) -> pl.DataFrame:
    """One row per token and layer with whether expert 2 ran, and what is known of the token."""
    routing = run.routing.select("doc_id", "pos", "layer", ran=pl.col("expert_ids").list.contains(2)).collect()
    return routing.join(run.tokens.collect(), on=["doc_id", "pos"])


def test_they_act_on_the_tokens_they_are_limited_to(small: Llama, prompts: list[Prompt], tmp_path: Path) -> None:
    gone = KnockOut(experts=(2,), mode="reroute", where=Where(segments=("user",), langs=("ja",)))
    later = KnockOut(experts=(2,), mode="reroute", where=Where(phase="decode", layers=(1,)))
    plain = taken(run_study(small, prompts, tmp_path / "plain", Settings(**SETTINGS)))
    changed = taken(run_study(small, prompts, tmp_path / "changed", Settings(**SETTINGS, interventions=(gone, later))))
    user_ja = (pl.col("segment") == "user") & (pl.col("lang") == "ja")
    written = (pl.col("phase") == "decode") & (pl.col("layer") == 1)
    for where in (user_ja, written):
        assert plain.filter(where)["ran"].any()
        assert not changed.filter(where)["ran"].any()
    before = pl.col("layer") == 0  # in the first layer nothing else can have changed
    same = ["doc_id", "pos", "token_id", "ran"]
    kept = before & ~user_ja & (pl.col("phase") == "prefill")
    assert changed.filter(kept).select(same).equals(plain.filter(kept).select(same))


def test_another_intervention_is_another_study(small: Llama, prompts: list[Prompt], tmp_path: Path) -> None:
    one, other = (Settings(**SETTINGS, interventions=(ScaleActivation(factor=f, point="mlp_out"),)) for f in (0.5, 0.6))
    run = run_study(small, prompts[:2], tmp_path, one)
    assert run.manifest["settings"]["interventions"]["items"] == [
        {"kind": "scale_activation", "point": "mlp_out", "factor": 0.5}
    ]
    assert "The model ran under interventions (scale_activation)." in write_report(run).read_text(encoding="utf-8")
    for settings in (other, Settings(**SETTINGS)):
        with pytest.raises(RunError, match=r"expected settings\.interventions"):
            run_study(small, prompts[:2], tmp_path, settings)


def test_what_does_not_fit_is_named_before_anything_runs(small: Llama, prompts: list[Prompt], tmp_path: Path) -> None:
    settings = Settings(**SETTINGS, interventions=(KnockOut(experts=(8,), mode="drop"),))
    with pytest.raises(InterventionError, match="knock_out experts: expected 0 to 7, got 8"):
        run_study(small, prompts, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_a_file(saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, prompts = saved
    file = save_interventions([KnockOut(experts=(2,), mode="drop")], tmp_path / "drop.json")
    arguments = ["study", str(checkpoint), "--prompts", str(prompts), "--max-new-tokens", "2", "--no-experts"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--intervention", str(file)]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["interventions"]["items"] == [{"kind": "knock_out", "experts": [2], "mode": "drop"}]
    ran = manifest["sittings"][-1]["interventions"]
    assert [(part, row["kind"], row["ran"], row["why"]) for part, rows in ran.items() for row in rows] == [
        ("generation", "knock_out", "kernel", ""),
        ("capture", "knock_out", "hook", "a hook listens at routing_weights"),
    ]
    file.write_text('{"format": 1, "interventions": [{"kind": "knock_off"}]}')
    assert main([*arguments, "--out", str(tmp_path / "other"), "--intervention", str(file)]) == 2
    assert "expected a kind among" in capsys.readouterr().err
