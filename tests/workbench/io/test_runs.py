from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
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
        (
            {"model": {**MODEL, "dtype": "bfloat16"}},
            r"model\.dtype 'float32'.*got 'bfloat16'\. .*delete this one",
        ),
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


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"format": 1}', '{"format": 99}'])
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


def edit_manifest(path: Path, edit: Callable[[dict], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def without_hashes(path: Path) -> None:
    """As an earlier version wrote it: other checks must hold alone."""
    edit_manifest(path, lambda manifest: manifest.pop("files"))


def reversed_positions(path: Path) -> None:
    frame = pl.read_parquet(path / "tokens.parquet")
    frame.with_columns(pl.col("pos").reverse()).write_parquet(path / "tokens.parquet")


def nan_entropies(path: Path) -> None:
    frame = pl.read_parquet(path / "routing.parquet")
    nan = pl.lit(float("nan"), dtype=pl.Float32)
    frame.with_columns(router_entropy=nan).write_parquet(path / "routing.parquet")


def flip_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


def flip_pages(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4:200] = bytes(196)  # the first pages; the footer, which tells the schema, is whole
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (reversed_positions, "tokens"),
        (nan_entropies, "routing"),
        (lambda path: flip_bytes(path / "tokens.parquet"), "tokens"),
        (lambda path: flip_bytes(path / "load.safetensors"), "load"),
        (lambda path: (path / "routing.parquet").unlink(), r"routing.*No such file or directory\. Run the study"),
        (lambda path: edit_manifest(path, lambda manifest: manifest["counts"].update(n_groups=99)), "counts.*got.*99"),
    ],
)
def test_what_was_changed_after_the_study_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    damage(finished(tmp_path).path)
    with pytest.raises(RunError, match=named):
        Run.open(tmp_path)


def test_a_shard_that_was_changed_is_refused_when_it_is_read(tmp_path: Path) -> None:
    run = finished(tmp_path, logits=True)
    assert [len(tokens) for tokens, _, _ in run.router_logits()] == [2, 2, 2]
    shard = run.path / "router_logits" / "000002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the header is whole, a logit is not
    shards = iter(Run.open(tmp_path).router_logits())
    next(shards), next(shards)
    with pytest.raises(RunError, match=r"000002\.safetensors: expected the file that the study wrote, got other bytes"):
        next(shards)


def test_a_run_of_an_earlier_version_is_opened_and_its_missing_hashes_are_told(tmp_path: Path) -> None:
    run = finished(tmp_path, logits=True)
    without_hashes(tmp_path)
    with pytest.warns(UserWarning, match="no hashes in its manifest"):
        earlier = Run.open(tmp_path)
    assert_frame_equal(earlier.routing.collect(), run.routing.collect())
    assert len(list(earlier.router_logits())) == 3


def test_frames_without_hashes_are_judged_by_their_types_and_values(tmp_path: Path) -> None:
    path = finished(tmp_path).path
    without_hashes(path)
    tokens, routing = (pl.read_parquet(path / f"{name}.parquet") for name in ("tokens", "routing"))
    far = pl.lit([0, 9], dtype=pl.List(pl.Int16))
    for name, frame, message in (
        ("tokens", tokens.with_columns(pl.col("token_id").cast(pl.String)), "expected token_id as Int32, got String"),
        ("tokens", tokens.drop("topic"), "expected columns doc_id"),
        ("routing", routing.with_columns(expert_ids=far), "expected 2 experts of 0 to 3 in every row, got 2 to 2 of 0"),
        ("routing", routing.with_columns(doc_id=pl.lit("other")), "expected the routing of this run's tokens, got 2"),
    ):
        whole = (path / f"{name}.parquet").read_bytes()
        frame.write_parquet(path / f"{name}.parquet")
        with pytest.raises(RunError, match=rf"{name}\.parquet: {message}"):
            Run.open(path)
        (path / f"{name}.parquet").write_bytes(whole)


def test_flipped_bytes_of_a_frame_without_hashes_are_no_traceback(tmp_path: Path) -> None:
    path = finished(tmp_path).path
    without_hashes(path)
    flip_pages(path / "tokens.parquet")
    with pytest.raises(RunError, match="expected whole Parquet files, got"):
        Run.open(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stop_ids", ["x"], r"expected model\.stop_ids as list\[int\], got \['x'\]"),
        ("interventions", None, r"expected settings\.interventions as dict, got None"),
        ("files", {"tokens.parquet": 3}, r"expected files as dict\[str, str\]"),
    ],
)
def test_a_value_of_another_type_in_the_manifest_is_named(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    path = finished(tmp_path).path
    places = {"stop_ids": "model", "interventions": "settings"}
    edit_manifest(path, lambda manifest: (manifest[places[key]] if key in places else manifest).update({key: value}))
    with pytest.raises(RunError, match=message):
        Run.open(path)


@pytest.mark.parametrize(
    "damage",
    [lambda part: part.write_bytes(b"junk"), Path.unlink, lambda part: flip_pages(part)],
    ids=["junk", "missing", "flipped"],
)
def test_a_damaged_part_is_named_and_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    with writer(tmp_path) as run:
        run.write(0, *batch(0))
    damage(tmp_path / "parts" / "000000.routing.parquet")
    with pytest.raises(RunError, match=r"parts.*expected .* Parquet file.*Delete .*parts and run the study again"):
        finished(tmp_path)
    shutil.rmtree(tmp_path / "parts")
    assert finished(tmp_path).manifest["counts"]["n_docs"] == 3


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = finished(tmp_path).path
    (path / "routing.parquet").write_bytes(b"PAR1 nothing")
    without_hashes(path)
    with pytest.raises(RunError, match=r"routing\.parquet: expected a Parquet file"):
        Run.open(path)
    finished(tmp_path / "b").tokens.collect().head(1).write_parquet(tmp_path / "b" / "tokens.parquet")
    without_hashes(tmp_path / "b")
    with pytest.raises(RunError, match=r"expected 6 rows, got 1"):
        Run.open(tmp_path / "b")
    (finished(tmp_path / "c").path / "load.safetensors").write_bytes(b"nothing")
    without_hashes(tmp_path / "c")
    with pytest.warns(match="no hashes"), pytest.raises(RunError, match="expected an expert load"):
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
    with pytest.raises(RunError, match=rf"manifest\.json: expected {name} as \S+, got None"):
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
    without_hashes(tmp_path)
    with pytest.warns(match="no hashes"), pytest.raises(RunError, match=message):
        Run.open(tmp_path)


def test_the_seed_of_the_report_may_change(tmp_path: Path) -> None:
    run = finished(tmp_path)
    assert run.seed == 0
    run.seed = 3
    assert finished(tmp_path).seed == 3


def test_a_run_continued_under_other_software_warns(tmp_path: Path) -> None:
    def begin(torch: str, n: int) -> None:
        about = {"versions": {"torch": torch, "polars": "1"}}
        with RunWriter.open(tmp_path, IDENTITY, about, n_parts=3) as run:
            for part in run.missing()[:n]:
                run.write(part, *batch(part))
            if not run.missing():
                run.finish({})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin("2.11", 1)
        begin("2.11", 1)
    with pytest.warns(UserWarning, match=r"other software \(torch 2\.11, now 2\.13\)"):
        begin("2.13", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin("2.14", 0)  # complete: nothing is joined to it
    torches = [sitting["versions"]["torch"] for sitting in Run.open(tmp_path).manifest["sittings"]]
    assert torches == ["2.11", "2.11", "2.13"]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", ".lock")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(RunError, match=r"expected a place to write, got Permission denied\. Pass another"):
        missing(tmp_path)


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


def test_router_logits_that_vanished_before_the_end_are_named(tmp_path: Path) -> None:
    settings = {**SETTINGS, "router_logits": True}
    logits = np.zeros((2, 2, 4), dtype=np.float32)
    with writer(tmp_path, settings=settings) as run:
        run.write(0, *batch(0), logits)
        (tmp_path / "parts" / "000000.router_logits.safetensors").unlink()
    with pytest.raises(RunError, match=r"000000\.router_logits\.safetensors: expected router logits, got none. Delete"):
        finished(tmp_path, logits=True)


def test_a_shard_is_hashed_once_however_often_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, hashed = finished(tmp_path, logits=True), []
    monkeypatch.setattr("workbench.io.router_shards.check_hash", lambda path, name, hashes: hashed.append(name))
    for _ in range(3):
        assert len(list(run.router_logits())) == 3
    assert hashed == [f"router_logits/{part:06}.safetensors" for part in range(3)]
