from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from workbench.axes import ROUTING_COLUMNS, TOKEN_COLUMNS
from workbench.errors import RunError
from workbench.io import runs
from workbench.io.run_files import atomic, write_load
from workbench.io.runs import Run, RunWriter

MODEL = {"name": "m", "n_experts": 4, "k": 2, "stop_ids": [2], "dtype": "float32"}
SETTINGS = {"template": "harmony", "max_new_tokens": 0, "efforts": ["low"], "router_logits": False, "norms": False}
IDENTITY = {"model": MODEL, "settings": SETTINGS}
LABELS = {"lang": ["ja", "en"], "segment": ["user"], "layer": [0, 2]}


def batch(part: int) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray, dict[str, list]]:
    """Two tokens of one document, routed in layers 0 and 2 to k = 2 of 4 experts."""
    doc = dict.fromkeys(TOKEN_COLUMNS, None) | {"doc_id": f"d{part}", "group_id": f"g{part}"}
    doc |= {"lang": "ja", "segment": "user", "phase": "prefill", "token_id": 7, "token": "日"}
    tokens = pl.DataFrame([{**doc, "pos": pos} for pos in range(2)])
    routing = pl.DataFrame(
        [
            {"doc_id": f"d{part}", "pos": pos, "layer": layer, "expert_ids": [part, 3], "routing_weights": [0.75, 0.25],
             "router_entropy": 1.0, "router_margin": None, "router_lse": 2.0, "router_mass": 0.5,
             "expert_norms": None, "mlp_in_norm": None, "mlp_out_norm": None}
            for pos in range(2)
            for layer in (0, 2)
        ]
    )  # fmt: skip
    load = np.zeros((2, 1, 2, 4), dtype=np.int64)
    load[0, 0, :, part] = load[0, 0, :, 3] = 2
    return tokens, routing, load, LABELS


def writer(path: Path, **changes: object) -> AbstractContextManager[RunWriter]:
    return RunWriter.open(path, {**IDENTITY, **changes}, {"started": "now"}, n_parts=3)


def missing(path: Path) -> list[int]:
    with writer(path) as run:
        return run.missing()


def finished(path: Path, logits: bool = False) -> Run:
    """With `logits` the router logits too: those of an expert are its number."""
    stored = np.tile(np.arange(4, dtype=np.float32), (2, 2, 1)) if logits else None  # [token layer expert]
    with writer(path, settings={**SETTINGS, "router_logits": logits}) as run:
        for part in run.missing():
            run.write(part, *batch(part), stored)
        return run.finish({"seconds": 1})


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert run.tokens.collect_schema().names() == list(TOKEN_COLUMNS)
    assert run.routing.collect_schema().names() == list(ROUTING_COLUMNS)
    assert run.tokens.collect()["doc_id"].to_list() == ["d0", "d0", "d1", "d1", "d2", "d2"]
    assert run.routing.collect()["expert_ids"].to_list()[0] == [0, 3]
    assert run.manifest["counts"] == {"n_docs": 3, "n_groups": 3, "n_tokens": 6, "n_routed_layers": 2}
    assert run.manifest["sittings"] == [{"started": "now", "seconds": 1}]
    assert sorted(file.name for file in run.path.iterdir() if not file.name.startswith(".")) == [
        "load.safetensors",
        "manifest.json",
        "routing.parquet",
        "tokens.parquet",
    ]


def test_the_load_adds_up_over_batches(tmp_path: Path) -> None:
    load = finished(tmp_path).load()
    assert load.columns == ["lang", "segment", "layer", "expert", "slots"]
    assert load.filter(pl.col("layer") == 2).select("lang", "segment", "expert", "slots").rows() == [
        ("ja", "user", 0, 2),
        ("ja", "user", 1, 2),
        ("ja", "user", 2, 2),
        ("ja", "user", 3, 6),
    ]


def test_an_interrupted_run_continues_with_what_is_missing(tmp_path: Path) -> None:
    with writer(tmp_path / "a") as first:
        first.write(1, *batch(1))
    with pytest.raises(RunError, match="unfinished"):
        Run.open(tmp_path / "a")
    assert missing(tmp_path / "a") == [0, 2]
    resumed = finished(tmp_path / "a")
    assert_frame_equal(resumed.routing.collect(), finished(tmp_path / "b").routing.collect())
    assert len(resumed.manifest["sittings"]) == 3


@pytest.mark.parametrize("fatal", range(13))
def test_a_crash_while_writing_any_file_loses_at_most_that_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    calls = iter(range(1000))
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if next(calls) == fatal + 1:  # the first call writes the manifest
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        finished(tmp_path / "a")
    monkeypatch.setattr(os, "replace", replace)
    assert len(missing(tmp_path / "a")) == max(3 - fatal // 3, 0)
    resumed, whole = finished(tmp_path / "a"), finished(tmp_path / "b")
    for name in ("tokens", "routing"):
        assert_frame_equal(getattr(resumed, name).collect(), getattr(whole, name).collect())
    assert_frame_equal(resumed.load(), whole.load())


def test_a_finished_run_is_not_written_again(tmp_path: Path) -> None:
    before = (finished(tmp_path).path / "tokens.parquet").stat().st_mtime_ns
    with writer(tmp_path) as again:
        assert again.missing() == []
        again.finish({"seconds": 9})
    assert (tmp_path / "tokens.parquet").stat().st_mtime_ns == before
    assert Run.open(tmp_path).manifest["sittings"] == [{"started": "now", "seconds": 1}]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"settings": {**SETTINGS, "max_new_tokens": 1}}, r"settings\.max_new_tokens 0.*got 1"),
        ({"settings": {**SETTINGS, "efforts": ["low", "high"]}}, r"settings\.efforts"),
        ({"model": {**MODEL, "dtype": "bfloat16"}}, r"model\.dtype 'float32'.*got 'bfloat16'"),
    ],
)
def test_another_setting_is_refused_by_name(tmp_path: Path, changes: dict, name: str) -> None:
    finished(tmp_path)
    with pytest.raises(RunError, match=name), writer(tmp_path, **changes):
        pass


def test_a_directory_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="other files"), writer(tmp_path):
        pass
    with pytest.raises(RunError, match=r"manifest\.json"):
        Run.open(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a place to write, got"), writer(tmp_path / "file"):
        pass


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=r"manifest\.json: expected"):
        Run.open(tmp_path)


def modes(folder: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_every_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        finished(tmp_path, logits=True)
    finally:
        os.umask(before)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert modes(tmp_path) == {0o640}


def test_a_shard_that_cannot_be_opened_is_not_called_missing(tmp_path: Path) -> None:
    shard = finished(tmp_path, logits=True).path / "router_logits" / "000001.safetensors"
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(RunError, match=r"000001\.safetensors: expected .*got.*Too many levels of symbolic links"):
        Run.open(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = finished(tmp_path).path
    (path / "routing.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RunError, match=r"routing\.parquet: expected a Parquet file"):
        Run.open(path)
    finished(tmp_path / "b").tokens.collect().head(1).write_parquet(tmp_path / "b" / "tokens.parquet")
    with pytest.raises(RunError, match=r"expected 6 rows.*got 1 of"):
        Run.open(tmp_path / "b")
    (finished(tmp_path / "c").path / "load.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="expected an expert load"):
        Run.open(tmp_path / "c")


@pytest.mark.parametrize(
    "name",
    [
        "counts",
        "counts.n_tokens",
        "model.k",
        "model.stop_ids",
        "settings.template",
        "report.seed",
        "status",
        "sittings",
    ],
)
def test_a_manifest_without_a_key_is_damaged(tmp_path: Path, name: str) -> None:
    path = finished(tmp_path).path / "manifest.json"
    manifest = inner = json.loads(path.read_text())
    *outer, last = name.split(".")
    for key in outer:
        inner = inner[key]
    del inner[last]
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=rf"manifest\.json: expected {name} as \w+, got None"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("labels", "shape", "message"),
    [
        ({"lang": ["ja", "en"]}, (2, 1, 2, 4), "expected an expert load, got 'segment'"),
        ({**LABELS, "lang": ["ja"]}, (2, 1, 2, 4), r"expected shape \(1, 1, 2\) x experts.*got \(2, 1, 2, 4\)"),
        ({**LABELS, "lang": ["en", "ja"]}, (2, 1, 2, 4), "expected the load of this run's tokens"),
        ({**LABELS, "layer": [0, 1]}, (2, 1, 2, 4), "experts of layers 0, 2, got another"),
        (LABELS, (2, 1, 2, 5), "on 4 experts"),
    ],
)
def test_the_load_of_another_run_is_refused(tmp_path: Path, labels: dict, shape: tuple[int, ...], message: str) -> None:
    counts = np.zeros(shape, dtype=np.int64)
    counts[0, :, :, 0] = 12  # 6 Japanese tokens of 2 experts each
    write_load(finished(tmp_path).path / "load.safetensors", counts, labels)
    with pytest.raises(RunError, match=message):
        Run.open(tmp_path)


def test_the_seed_of_the_report_may_change(tmp_path: Path) -> None:
    run = finished(tmp_path)
    assert run.seed == 0
    run.seed = 3
    assert finished(tmp_path).seed == 3


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path) as first:
        with pytest.raises(RunError, match="other writer"):
            finished(tmp_path)
        assert json.loads((tmp_path / "manifest.json").read_text()) == first.manifest  # as the first one left it
        for part in first.missing():
            first.write(part, *batch(part))
        run = first.finish({"seconds": 1})
    with writer(tmp_path) as second:
        assert second.missing() == []
        assert second.manifest == run.manifest
        assert sorted(tmp_path.glob("parts")) == []


def test_a_run_finished_while_its_directory_was_being_opened_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = runs.lock

    def late(path: Path) -> AbstractContextManager[None]:
        monkeypatch.setattr(runs, "lock", lock)
        finished(path)  # another writer, just before the lock is free
        return lock(path)

    monkeypatch.setattr(runs, "lock", late)
    run = finished(tmp_path)
    assert run.manifest["sittings"] == [{"started": "now", "seconds": 1}]
    assert not (tmp_path / "parts").exists()


def test_atomic_leaves_the_old_file_when_the_new_one_fails(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ValueError, match="halfway"), atomic(target) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise ValueError("halfway")
    assert target.read_text() == "old"
