from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from workbench.axes import SEGMENTS
from workbench.config import LlamaConfig
from workbench.errors import ConfigError, RunError, ShapeError, TokenizerError
from workbench.io.prompts import Prompt
from workbench.io.runs import Run
from workbench.models import Llama, build_model, init_weights
from workbench.study import Settings, run_study
from workbench.study import run as run_module


def assert_same(run: Run, other: Run) -> None:
    assert_frame_equal(run.tokens.collect(), other.tokens.collect())
    assert_frame_equal(run.routing.collect(), other.routing.collect())
    assert_frame_equal(run.load(), other.load())


def test_every_conversation_is_there_with_its_answer(finished_run: Run, prompts: list[Prompt]) -> None:
    tokens = finished_run.tokens.collect()
    docs = tokens.group_by("doc_id").agg(pl.col("pos").is_sorted().all(), n=pl.len(), last=pl.col("pos").max())
    assert len(docs) == len(prompts) * 3
    assert (docs["n"] == docs["last"] + 1).all()
    written = tokens.filter(pl.col("phase") == "decode").group_by("doc_id").len()
    assert written["len"].is_between(1, 6).all()
    assert set(tokens["segment"]) <= set(SEGMENTS)
    assert (
        tokens.filter(pl.col("segment") == "user", pl.col("group_id") == "sea", pl.col("lang") == "en")["token"]
        .str.join("")
        .item()
        .count("sea")
        == 3
    )


def test_routing_has_every_token_and_layer(finished_run: Run) -> None:
    tokens, routing = finished_run.tokens.collect(), finished_run.routing.collect()
    assert len(routing) == 2 * len(tokens)
    assert routing["expert_ids"].list.n_unique().unique().to_list() == [2]
    assert routing["router_entropy"].is_between(0, 2.0795).all()  # ln 8
    assert (routing["router_margin"] >= 0).all()


def test_load_counted_while_running_is_that_of_the_frames(finished_run: Run) -> None:
    counted = (
        finished_run.routing.join(finished_run.tokens, on=["doc_id", "pos"])
        .explode("expert_ids")
        .group_by("lang", "segment", "layer", expert=pl.col("expert_ids").cast(pl.Int64))
        .agg(slots=pl.len().cast(pl.Int64))
        .with_columns(pl.col("layer").cast(pl.Int64))
    )
    assert_frame_equal(finished_run.load(), counted.collect(), check_row_order=False)


def test_the_manifest_says_what_ran(finished_run: Run, small: Llama) -> None:
    model, settings = finished_run.manifest["model"], finished_run.manifest["settings"]
    assert model["moe_impl"] == small.moe_impl
    assert (model["dtype"], model["router_dtype"], model["attn_impl"]) == ("float32", "float32", "sdpa")
    assert model["tokenizer_hash"] == small.tokenizer.hash
    assert model["stop_ids"] == list(small.stop_ids)
    assert (settings["template"], settings["bos"], settings["efforts"]) == ("harmony", False, ["low", "medium", "high"])
    assert finished_run.manifest["sittings"][0]["versions"]["torch"]
    assert set(finished_run.manifest["sittings"][0]["seconds"]) == {"total", "generation", "capture", "frames"}


def test_batch_size_does_not_change_what_is_found(
    finished_run: Run, small: Llama, prompts: list[Prompt], settings: Settings, tmp_path: Path
) -> None:
    other = run_study(small, prompts, tmp_path, replace(settings, batch_size=3))
    assert_frame_equal(other.tokens.collect(), finished_run.tokens.collect())
    assert_frame_equal(other.routing.collect(), finished_run.routing.collect(), abs_tol=1e-4, rel_tol=1e-3)


def test_a_finished_run_is_opened_and_not_run_again(
    finished_run: Run, small: Llama, prompts: list[Prompt], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "write_answers", None)
    assert_same(run_study(small, prompts, finished_run.path, settings), finished_run)


def test_an_interrupted_study_continues_to_the_same_result(
    finished_run: Run,
    small: Llama,
    prompts: list[Prompt],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture, calls = run_module.capture_routing, []

    def stopping(model: Llama, sequences: list) -> object:
        calls.append(len(sequences))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return capture(model, sequences)

    monkeypatch.setattr(run_module, "capture_routing", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(small, prompts, tmp_path, settings)
    assert_same(run_study(small, prompts, tmp_path, settings), finished_run)
    assert calls == [8, 8, 8, 8, 6]  # 30 documents in 4 batches, the third one twice
    assert len(Run.open(tmp_path).manifest["sittings"]) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"max_new_tokens": 5}, r"settings\.max_new_tokens 6"), ({"efforts": ("low",)}, "rendered_hash|efforts")],
)
def test_a_run_of_other_settings_is_refused(
    finished_run: Run, small: Llama, prompts: list[Prompt], settings: Settings, changes: dict, named: str
) -> None:
    with pytest.raises(RunError, match=named):
        run_study(small, prompts, finished_run.path, replace(settings, **changes))


def test_plain_text_without_answers(small: Llama, prompts: list[Prompt], tmp_path: Path) -> None:
    run = run_study(small, prompts, tmp_path, Settings(template="plain", max_new_tokens=0))
    tokens = run.tokens.collect()
    assert set(tokens["segment"]) == {"bos", "plain"}
    assert tokens["effort"].is_null().all()
    assert set(tokens["phase"]) == {"prefill"}
    assert run.manifest["settings"]["bos"] is True


def test_what_cannot_be_studied_leaves_no_directory(small: Llama, prompts: list[Prompt], tmp_path: Path) -> None:
    out = tmp_path / "run"
    dense = init_weights(
        build_model(LlamaConfig(16, 1, 2, 1, 8, 16, small.cfg.d_vocab, 320, 1e-6, small.cfg.rope)), seed=0
    )
    dense.tokenizer = small.tokenizer
    with pytest.raises(ConfigError, match="mixture of experts"):
        run_study(dense, prompts, out)
    with pytest.raises(ShapeError, match="Shorten"):
        run_study(small, prompts, out, Settings(max_new_tokens=300))
    bare = init_weights(build_model(small.cfg), seed=0)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        run_study(bare, prompts, out)
    assert not out.exists()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_run(saved: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, prompts = saved
    arguments = ["--prompts", prompts, "--template", "harmony", "--max-new-tokens", "24", "--batch-size", "1"]

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "workbench", "study", checkpoint, "--out", out, *arguments]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=120) == 0, whole.stderr
    moments, hits = random.Random(0), 0
    for _ in range(5):
        process = start(tmp_path / "killed")
        while process.poll() is None and not (tmp_path / "killed" / "parts").exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
    last = start(tmp_path / "killed")
    assert last.wait(timeout=120) == 0, last.stderr
    assert hits >= 2
    assert_same(Run.open(tmp_path / "killed"), Run.open(tmp_path / "whole"))
