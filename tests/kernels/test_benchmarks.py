"""The benchmark runs from end to end on tiny shapes; what it writes is complete. Times are looked at by nobody here."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"))

import layers
import models
import registry
import run
from measure import Report

from workbench_kernels.moe.plan import NEEDS

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = REPOSITORY / "kernels" / "benchmarks" / "run.py"
CPU = torch.device("cpu")


def smoke(out: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    command = [sys.executable, str(RUN), "--smoke", "--device", "cpu", "--out", str(out), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, list(csv.DictReader(out.open())) if out.exists() else []


def check(done: subprocess.CompletedProcess[str], rows: list[dict], impl: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["section"] for row in rows} >= {"ceiling", "correctness", "layer", "cost", "format", "model"}
    failed = [row for row in rows if row["note"] and not row["note"].startswith(("ok", "context", "logits differ"))]
    assert {row["name"] for row in failed} <= {"liger"}, failed  # whose package may be absent
    timed = [row for row in rows if row["section"] == "layer" and row["us"]]
    for routing in ("uniform", "skewed"):
        names = {row["name"] for row in timed if row["routing"] == routing}
        assert names >= {f"ours {impl}", "transformers eager", "transformers grouped_mm", "torch grouped_mm"}
    assert all(row["torch"] and row["device"] and row["cores"] for row in rows)
    names = {row["name"] for row in rows if row["section"] == "model" and row["us"]}
    assert names == {"prefill", "transformers prefill", "decode, eager", "transformers decode", "decode int8, eager"}


@pytest.mark.slow
def test_the_cpu_run_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    check(*smoke(tmp_path / "cpu.csv"), "sorted")


@pytest.mark.slow
def test_what_the_triton_run_reaches_under_the_interpreter_is_right(tmp_path: Path) -> None:
    """The interpreter is slow: what a minute does not reach is said in a row, everything else ran without a failure."""
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    done, rows = smoke(tmp_path / "triton.csv", "--impl", "triton", "--budget", "60", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    said = ("ok", "context", "logits differ", "left out: ")
    assert [row for row in rows if row["note"] and not row["note"].startswith(said) and row["name"] != "liger"] == []
    assert {row["note"] for row in rows if row["section"] == "correctness"} == {"ok"}
    assert any(row["name"] == "ours triton" and row["us"] for row in rows if row["section"] == "layer")


@pytest.mark.slow
def test_a_spent_budget_is_said_and_not_hidden(tmp_path: Path) -> None:
    done, rows = smoke(tmp_path / "cpu.csv", "--budget", "0")
    assert done.returncode == 0, done.stderr
    left_out = [row for row in rows if row["note"].startswith("left out: the time budget is spent")]
    assert left_out
    assert any(row["section"] == "correctness" and row["note"] == "ok" for row in rows)


def bench(report: Report | None = None) -> layers.Bench:
    return layers.Bench(report or Report(time.monotonic() + 60), registry.SMOKE, torch.float32, CPU, "sorted")


@pytest.mark.parametrize("n_tokens", [8, 512])
def test_uniform_routing_hits_as_many_experts_as_chance_and_skewed_fewer(n_tokens: int) -> None:
    shape = registry.Shape(512, 8, 128, 8)
    layer = registry.Layer.random(shape, torch.float32, CPU, seed=0)
    hit = {}
    for skewed in (False, True):
        x = registry.inputs(shape, n_tokens, torch.float32, CPU, seed=1, skewed=skewed)
        ids = (x @ (layer.skewed() if skewed else layer).router.T).topk(8).indices
        hit[skewed] = len(ids.unique())
        low = (ids < 16).float().mean()
        assert low > 0.3 if skewed else low < 0.25, low  # 16 of 128 experts; chance gives them 0.125
    by_chance = 128 * (1 - (1 - 8 / 128) ** n_tokens)
    assert abs(hit[False] - by_chance) <= 5
    assert hit[True] < hit[False]


def test_a_format_is_faster_than_plain_where_it_takes_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    one.how = dict.fromkeys(("plain", "int8", "int4"), "eager")
    monkeypatch.setattr(one, "times", lambda *a, **k: {"plain": 2.0, "int8": 4.0, "int4": 0.5})
    one.formats(3)
    found = {row["name"]: row["ours_is_faster_by"] for row in one.report.rows if row["section"] == "format"}
    assert found == {"plain": 1.0, "int8": 0.5, "int4": 4.0}


def routed_by(change: Any) -> Any:
    """fused_moe with other experts in place of those it would choose."""

    def fused(x: torch.Tensor, router: torch.Tensor, *weights: Any, impl: str) -> Any:
        _, routing = registry.fused_moe(x, router, *weights, impl=impl)
        forced = registry.Intervene(forced_ids=change(routing.expert_ids))
        return registry.fused_moe(x, router, *weights, impl=impl, intervene=forced)

    return fused


def test_a_tie_that_falls_the_other_way_is_right_and_other_experts_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    one.shape = registry.Shape(64, 64, 8, 1)
    one.layers[0].router[1::2] = one.layers[0].router[::2]  # experts 2i and 2i+1 are always equal
    assert one.correctness(5)
    monkeypatch.setattr(layers, "fused_moe", routed_by(lambda ids: ids ^ 1))
    assert one.correctness(5)
    monkeypatch.setattr(layers, "fused_moe", routed_by(lambda ids: ids ^ 2))
    assert not one.correctness(5)
    assert all("routing" in row["name"] for row in one.report.rows if str(row.get("note")).startswith("WRONG"))


@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_nothing_is_timed_after_a_wrong_result(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def correctness(self: layers.Bench, n_tokens: int) -> bool:
        if failure == "raises":
            raise RuntimeError("no result at all")
        return n_tokens == 1

    monkeypatch.setattr(layers.Bench, "correctness", correctness)
    report = Report(time.monotonic() + 60)
    assert run.measure(report, CPU, smoke=True, impl="sorted") is False
    assert not [row for row in report.rows if row.get("us")]
    assert "model" not in {row["section"] for row in report.rows}


def test_a_run_that_breaks_off_leaves_the_sections_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(self: layers.Bench, n_tokens: int, skewed: bool) -> None:
        if n_tokens == 40:
            raise KeyboardInterrupt
        self.report.add("layer", "ours", n_tokens=n_tokens, us=1.0)

    monkeypatch.setattr(layers.Bench, "compare", compare)
    out = tmp_path / "cpu.csv"
    report = Report(time.monotonic() + 60, save=lambda report: run.write(report, {"device": "here"}, out))
    with pytest.raises(KeyboardInterrupt):
        run.measure(report, CPU, smoke=True, impl="sorted")
    rows = list(csv.DictReader(out.open()))
    assert [row["n_tokens"] for row in rows if row["section"] == "layer" and row["us"]] == ["1", "5"]
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.csv"]


def test_every_need_and_every_intervention_has_its_cost() -> None:
    needs, changes = registry.needs(registry.SMOKE, CPU), registry.interventions(registry.SMOKE, 3, torch.float32, CPU)
    assert {name for need in needs.values() for name in need.names} == set(NEEDS)
    fields = {field.name for field in dataclasses.fields(registry.Intervene)}
    assert {name for change in changes.values() for name in change.active} == fields


def test_one_expert_is_asked_for_by_a_mask_on_the_device() -> None:
    chosen = registry.needs(registry.SMOKE, CPU)["all of one expert"].experts
    assert isinstance(chosen, torch.Tensor)
    assert chosen.dtype == torch.bool
    assert chosen.nonzero().flatten().tolist() == [4]


@pytest.fixture(scope="module")
def model_rows() -> tuple[list[dict[str, Any]], Report]:
    pytest.importorskip("transformers")
    report = Report(time.monotonic() + 60)
    plan = {"prompts": (16,), "batches": (1, 3), "context": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the CPU dequantises int8
        models.whole_model(report, models.SMOKE, torch.float32, CPU, "sorted", **plan)
    return report.rows, report


def test_every_model_row_has_a_floor_and_int8_and_transformers_stand_beside(model_rows: Any) -> None:
    rows, _ = model_rows
    assert all(row["us"] > 0 for row in rows), rows
    for row in rows:
        assert row["floor_us"] > 0
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_us"] / row["us"])
    found = [(row["name"], row["n_tokens"]) for row in rows]
    eager = ("decode, eager", "transformers decode")
    assert found[:4] == [(name, batch) for batch in (1, 3) for name in eager]
    assert found[4:6] == [("prefill", 16), ("transformers prefill", 16)]
    assert found[6:] == [("decode int8, eager", batch) for batch in (1, 3)]


def test_transformers_computes_the_same_model(model_rows: Any) -> None:
    rows, _ = model_rows
    notes = [row["note"] for row in rows if row["name"].startswith("transformers")]
    assert len(notes) == 3
    assert all(float(note.split("differ by ")[1]) < 1e-5 for note in notes), notes
    assert all(row["ours_is_faster_by"] > 0 for row in rows if row["name"].startswith("transformers"))


def test_sequences_of_a_batch_differ_in_tokens_and_in_what_they_have_seen() -> None:
    model = models.random_model(models.SMOKE, torch.float32, CPU, "sorted")
    seen: list[tuple[torch.Tensor, Any]] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args[0], kwargs["cache"])), with_kwargs=True)
    report = Report(time.monotonic() + 60)
    one = models.ModelBench(report, model, models.Ceilings(1e9, 1e9))
    one.peer = None
    with torch.no_grad():
        one.decode(8, 4, {})
    for tokens, cache in seen:
        assert len(tokens.unique()) == 8
        assert len(cache.keys[0].flatten(1).unique(dim=0)) == 8
        assert torch.stack(cache.values)[..., :4, :].std() > 0.5


def test_the_floor_counts_what_a_step_reads_and_computes() -> None:
    """By hand, for a model of one layer: bytes at an endless rate of arithmetic, and the other way round."""
    cfg = dataclasses.replace(models.SMOKE, n_layers=1, sparse_layers=(True,))
    model = models.build_model(cfg, device="meta")
    attention = 64 * 16 * (2 * 4 + 2 * 2) + 2 * 16 + 2 * 64
    router, expert, unembed, norm = 8 * 64, 3 * 64 * 64, 101 * 64, 64
    read = attention + router + norm + unembed + 5 * expert + 3 * 64 + 2 * 3 * (10 + 1) * 2 * 16
    floor = models.model_floor(models.Ceilings(1.0, float("inf")), model, 3, 1, 10, n_hit=5)
    assert floor == 4 * read
    flop = 2 * 3 * (attention + router + norm + 2 * expert + unembed) + 4 * 3 * 11 * 4 * 16
    floor = models.model_floor(models.Ceilings(float("inf"), 1.0), model, 3, 1, 10, n_hit=5)
    assert floor == flop


def test_int8_experts_are_counted_in_their_own_bytes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.build_model(models.SMOKE, device="meta", experts="int8")
    assert models.expert_bytes(model) == 3 * 64 * 64 + 4 * (2 * 64 + 64)


def test_a_model_without_time_left_is_left_out_and_said() -> None:
    report = Report(time.monotonic() - 1)
    models.whole_model(report, models.SMOKE, torch.float32, CPU, "sorted", (16,), (1,), 8)
    assert [row["note"] for row in report.rows] == ["left out: the time budget is spent"] * 2


def test_a_contestant_that_would_take_the_time_of_others_is_left_out() -> None:
    report = Report(time.monotonic() + 0.2)
    one = models.ModelBench(
        report, models.random_model(models.SMOKE, torch.float32, CPU, "sorted"), models.Ceilings(1e9, 1e9)
    )
    slow = lambda: (time.sleep(0.05), torch.ones(1, 1))[1]  # noqa: E731
    assert one._tried("transformers decode", slow, {"note": "context 8"}) is None
    assert report.rows[-1]["note"].startswith("left out: it would take more than half")
