from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import polars.selectors as cs
import pytest
from polars.testing import assert_frame_equal

from workbench.axes import SEGMENTS, TOKEN_CLASSES
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


def assert_same_pages(path: Path, other: Path) -> None:
    """Tables of experts and of the page, and the page itself but for the rows that tell of its sittings."""
    for folder in ("experts", "tables"):
        names = [sorted(file.name for file in (each / folder).iterdir()) for each in (path, other)]
        assert names[0] == names[1]
        for name in names[0]:
            assert (path / folder / name).read_bytes() == (other / folder / name).read_bytes(), name
    pages = [(each / "report.html").read_text(encoding="utf-8") for each in (path, other)]
    kept = [[line for line in page.splitlines() if "<th>sittings " not in line] for page in pages]
    assert kept[0] == kept[1]
    assert all(len(lines) < len(page.splitlines()) for lines, page in zip(kept, pages, strict=True))


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
    assert (model["moe_impl"], model["moe_path"]) == (small.moe_impl, "auto")
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

    def stopping(model: Llama, sequences: list, *options: bool) -> object:
        calls.append(len(sequences))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return capture(model, sequences, *options)

    monkeypatch.setattr(run_module, "capture_routing", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(small, prompts, tmp_path, settings)
    assert_same(run_study(small, prompts, tmp_path, settings), finished_run)
    assert calls == [8, 8, 8, 8, 6]  # 30 documents in 4 batches, the third one twice
    assert len(Run.open(tmp_path).manifest["sittings"]) == 2


def test_logits_and_norms_are_kept_when_asked_for(
    finished_run: Run, small: Llama, prompts: list[Prompt], settings: Settings, tmp_path: Path
) -> None:
    run = run_study(small, prompts, tmp_path, replace(settings, router_logits=True, norms=True))
    routing = run.routing.collect()
    assert_frame_equal(routing.drop(cs.contains("norm")), finished_run.routing.collect().drop(cs.contains("norm")))
    shards = list(run.router_logits())
    assert_frame_equal(pl.concat([tokens for tokens, _, _ in shards]), run.tokens.collect())
    logits = np.concatenate([logits for _, _, logits in shards])  # [token layer expert]
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :2].reshape(-1, 2)
    clear = (routing["router_margin"] > 0.01).to_numpy()
    assert (np.sort(ids, 1) == np.sort(np.stack(routing["expert_ids"].to_list()), 1))[clear].all()
    assert routing["expert_norms"].list.len().unique().to_list() == [2]
    assert (routing["expert_norms"].list.sum() >= routing["mlp_out_norm"] * 0.999).all()  # the triangle inequality
    with pytest.raises(RunError, match="with router logits, got one without"):
        finished_run.router_logits()


def test_a_run_with_a_shard_missing_is_refused(
    small: Llama, prompts: list[Prompt], settings: Settings, tmp_path: Path
) -> None:
    run = run_study(small, prompts, tmp_path, replace(settings, router_logits=True, max_new_tokens=0))
    (run.path / "router_logits" / "000001.safetensors").unlink()
    with pytest.raises(RunError, match="expected the router logits of"):
        Run.open(tmp_path)
    (run.path / "router_logits" / "000000.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="expected router logits, got"):
        Run.open(tmp_path)


def test_every_token_has_a_class_and_a_place(finished_run: Run) -> None:
    tokens = finished_run.tokens.collect()
    assert set(tokens["token_class"]) <= set(TOKEN_CLASSES)
    assert tokens.filter(pl.col("token_id") < 14)["token_class"].unique().to_list() == ["special"]
    runs = tokens.group_by("doc_id", "segment_index").agg(
        pl.col("segment").n_unique(), ordered=(pl.col("pos_in_segment") == pl.int_range(pl.len())).all()
    )
    assert runs["segment"].unique().to_list() == [1]
    assert runs["ordered"].all()
    assert tokens["split"].unique().to_list() == ["discovery"]


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
    with pytest.raises(ShapeError, match=r"prompt .+ at \w+ effort: .*Shorten"):
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
    manifest = tmp_path / "killed" / "manifest.json"

    def sittings() -> int:
        return len(json.loads(manifest.read_text("utf-8"))["sittings"]) if manifest.exists() else 0

    moments, hits = random.Random(0), 0
    for _ in range(5):
        n_before = sittings()
        process = start(tmp_path / "killed")
        while process.poll() is None and sittings() == n_before:  # importing takes seconds: a kill there hits no work
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
    assert hits >= 2
    experts = tmp_path / "killed" / "experts"
    process = start(tmp_path / "killed")
    while process.poll() is None and not (experts / "peaks.parquet").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (experts / "audit.parquet").exists(), "it was killed while experts were measured"
    last = start(tmp_path / "killed")
    assert last.wait(timeout=120) == 0, last.stderr
    assert hits <= sittings()  # everyone who was killed had begun
    assert_same(Run.open(tmp_path / "killed"), Run.open(tmp_path / "whole"))
    assert_same_pages(tmp_path / "killed", tmp_path / "whole")
