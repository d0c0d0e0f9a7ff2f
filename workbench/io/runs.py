"""The run directory: what a study measured, safe against a kill at any moment.

    manifest.json       what was run, with which settings, hashes, versions; status "running" or "complete"
    tokens.parquet      one row per token                       (axes.TOKEN_COLUMNS)
    routing.parquet     one row per (token, routed layer)       (axes.ROUTING_COLUMNS)
    load.safetensors    expert_load: token-slots [lang segment layer expert]; the labels are in its metadata
    router_logits/      if asked for: all router logits, in shards of consecutive tokens (io/router_shards.py)
    parts/              only while running: the same files for each finished batch

Every file appears whole or not at all: it is written beside its place, flushed to disk and renamed. A batch counts as
done when its tokens file, written last, is there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from workbench.errors import RunError
from workbench.io.router_shards import RouterShards, write_shard
from workbench.io.run_checks import (
    FRAMES,
    ROUTING_SCHEMA,
    SCHEMAS,
    TOKEN_SCHEMA,
    check_frame,
    check_hash,
    check_values,
    count,
    hash_files,
    readable,
)
from workbench.io.run_files import (
    FINISHED,
    FORMAT,
    Labels,
    atomic,
    check_keys,
    check_later,
    check_same,
    read_load,
    read_manifest,
    warn_of_versions,
    write_load,
    write_manifest,
)


class Run:
    """A finished run. `tokens` and `routing` are lazy scans; `manifest` is a dict; `load()` is a frame."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._checked_shards: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run directory and check its files; raises RunError when it is unfinished, damaged or none."""
        path = Path(path)
        run = cls(path, read_manifest(path))
        if run.manifest["status"] != "complete":
            raise RunError(f"{path}: expected a complete run, got an unfinished one. Run its study again to resume.")
        check_keys(path / "manifest.json", run.manifest, FINISHED)
        check_later(path / "manifest.json", run.manifest)
        with readable(path):
            run._check()
        return run

    @property
    def tokens(self) -> pl.LazyFrame:
        return pl.scan_parquet(self.path / "tokens.parquet")

    @property
    def routing(self) -> pl.LazyFrame:
        return pl.scan_parquet(self.path / "routing.parquet")

    @property
    def has_router_logits(self) -> bool:
        return bool(self.manifest["settings"]["router_logits"])

    def router_logits(self) -> RouterShards:
        """All router logits, shard by shard; raises RunError when the run was made without them."""
        if not self.has_router_logits:
            raise RunError(
                f"{self.path}: expected a run with router logits, got one without. Run the study with --router-logits."
            )
        files = self.manifest.get("files")
        return RouterShards(self.path / "router_logits", self.tokens, files, self._checked_shards)

    @property
    def n_experts(self) -> int:
        return int(self.manifest["model"]["n_experts"])

    @property
    def seed(self) -> int:
        """Of the report's resampling. It does not touch what was measured, so it may be set anew."""
        return int(self.manifest["report"]["seed"])

    @seed.setter
    def seed(self, seed: int) -> None:
        if seed != self.seed:
            self.manifest["report"]["seed"] = seed
            write_manifest(self.path, self.manifest)

    def load(self) -> pl.DataFrame:
        """Token-slots as counted while running, every segment: columns lang, segment, layer, expert, slots (> 0)."""
        counts, labels = read_load(self._load_file)
        places = np.nonzero(counts)
        names = {axis: np.array(labels[axis])[place] for axis, place in zip(labels, places, strict=False)}
        return pl.DataFrame({**names, "expert": places[-1], "slots": counts[places]})

    @property
    def _load_file(self) -> Path:
        return self.path / "load.safetensors"

    def _check(self) -> None:
        """Hashes first: what reads damaged bytes may fail in any way."""
        counts = self.manifest["counts"]
        if "files" in self.manifest:
            for name in FRAMES:
                check_hash(self.path, name, self.manifest["files"])
        self._check_rows("tokens", counts["n_tokens"])
        self._check_rows("routing", counts["n_tokens"] * counts["n_routed_layers"])
        if "files" not in self.manifest:
            check_values(self.tokens, self.routing, self.path, self.n_experts, self.manifest["model"]["k"])
        if (found := count(self.tokens, self.routing)) != counts:
            raise RunError(
                f"{self.path / 'manifest.json'}: expected counts {found}, as the frames have, got {counts}. "
                "Run the study again in a new directory."
            )
        self._check_load()
        if self.has_router_logits:
            self.router_logits().check(counts["n_tokens"], counts["n_routed_layers"], self.n_experts)

    def _check_rows(self, name: str, n_rows: int) -> None:
        file = self.path / f"{name}.parquet"
        found = check_frame(file, name)
        if found != n_rows:
            raise RunError(
                f"{file}: expected {n_rows} rows, got {found}. "
                "The file is not this run's: run the study again in a new directory."
            )

    def _check_load(self) -> None:
        """Each token must have taken k slots of its language and segment in every layer."""
        n_layers, k = self.manifest["counts"]["n_routed_layers"], self.manifest["model"]["k"]
        counts, labels = read_load(self._load_file)
        found = self.load().group_by("lang", "segment", "layer").agg(pl.col("slots").sum())
        layers = self.routing.head(n_layers).select("layer").collect()["layer"].to_list()  # those of the first token
        wanted = self.tokens.group_by("lang", "segment").agg(slots=pl.len().cast(pl.Int64) * k).collect()
        if (
            (labels["layer"], counts.shape[-1]) != (layers, self.n_experts)
            or len(found) != len(wanted) * n_layers
            or len(found.join(wanted, on=["lang", "segment", "slots"])) != len(found)
        ):
            raise RunError(
                f"{self._load_file}: expected the load of this run's tokens on {self.n_experts} experts of layers "
                f"{', '.join(map(str, layers))}, got another. Run the study again in a new directory."
            )


class RunWriter:
    """Writes a run batch by batch; opening it again continues where a killed process stopped."""

    def __init__(self, path: Path, manifest: dict[str, Any], n_parts: int) -> None:
        self.path, self.manifest, self.n_parts = path, manifest, n_parts

    @classmethod
    @contextmanager
    def open(
        cls, path: str | Path, identity: Mapping[str, Any], about: Mapping[str, Any], n_parts: int
    ) -> Iterator[RunWriter]:
        """Create or continue a run directory, and hold it until the block ends.

        `identity` is what decides the result (model, prompts, settings); `about` (versions, times) is recorded once per
        sitting, in the manifest's list `sittings`. A finished run is left as it is: nothing is missing from it. Raises
        RunError naming the first setting that differs from the run that is there, or when another process writes it.
        """
        path = Path(path)
        _make_directory(path)
        with lock(path):  # before the manifest is read: another writer may be about to finish the run
            writer = cls(path, _begin(path, identity, about), n_parts)
            if not writer.complete:
                writer._parts.mkdir(exist_ok=True)
            yield writer

    @property
    def complete(self) -> bool:
        return bool(self.manifest["status"] == "complete")

    @property
    def _parts(self) -> Path:
        return self.path / "parts"

    def missing(self) -> list[int]:
        """The batches that are not on disk yet."""
        everything = [] if self.complete else range(self.n_parts)
        return [part for part in everything if not self._part(part, "tokens").exists()]

    def write(
        self,
        part: int,
        tokens: pl.DataFrame,
        routing: pl.DataFrame,
        load: np.ndarray,
        labels: Labels,
        router_logits: np.ndarray | None = None,
    ) -> None:
        """Store one batch: its frames, its expert load [lang segment layer expert], its logits [token layer expert]."""
        if router_logits is not None:
            with atomic(self._part(part, "router_logits")) as file:
                write_shard(file, router_logits, labels["layer"])
        with atomic(self._part(part, "routing")) as file:
            routing.select(pl.col(name).cast(dtype) for name, dtype in ROUTING_SCHEMA.items()).write_parquet(file)
        with atomic(self._part(part, "load")) as file:
            write_load(file, load, labels)
        with atomic(self._part(part, "tokens")) as file:
            tokens.select(pl.col(name).cast(dtype) for name, dtype in TOKEN_SCHEMA.items()).write_parquet(file)

    def finish(self, about: Mapping[str, Any]) -> Run:
        """Join the batches in order, mark the run complete and open it. `about` joins this sitting's entry."""
        if not self.complete:
            for name in ("routing", "tokens"):
                self._join(name)
            loads = [read_load(self._part(part, "load")) for part in range(self.n_parts)]
            with atomic(self.path / "load.safetensors") as file:
                write_load(file, np.sum([counts for counts, _ in loads], axis=0), loads[0][1])
            if self.manifest["settings"]["router_logits"]:
                self._move_router_logits()
            self.manifest["sittings"][-1] |= about
            frames = (pl.scan_parquet(self.path / f"{name}.parquet") for name in ("tokens", "routing"))
            self.manifest |= {"counts": count(*frames), "files": hash_files(self.path), "status": "complete"}
            write_manifest(self.path, self.manifest)
        shutil.rmtree(self._parts, ignore_errors=True)
        return Run.open(self.path)

    def _join(self, name: str) -> None:
        """One frame of all batches. Raises RunError naming a damaged one."""
        parts = [self._part(part, name) for part in range(self.n_parts)]
        advice = f"Delete {self._parts} and run the study again."
        for part in parts:
            check_frame(part, name, advice)
        with atomic(self.path / f"{name}.parquet") as file, readable(self._parts, advice):
            pl.scan_parquet(parts).sink_parquet(file)

    def _move_router_logits(self) -> None:
        """Shards are large: they change places, one by one, and those already moved by a killed process stay."""
        folder = self.path / "router_logits"
        folder.mkdir(exist_ok=True)
        for part in range(self.n_parts):
            source, target = self._part(part, "router_logits"), folder / f"{part:06}.safetensors"
            if source.exists():
                os.replace(source, target)
            elif not target.exists():
                raise RunError(
                    f"{source}: expected router logits, got none. Delete {self._parts} and run the study again."
                )

    def _part(self, part: int, name: str) -> Path:
        return self._parts / f"{part:06}.{name}.{'parquet' if name in SCHEMAS else 'safetensors'}"


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    except OSError as error:
        raise RunError(f"{path}: expected a place to write, got {error.strerror}. Pass another directory.") from None
    if names and "manifest.json" not in names:
        raise RunError(f"{path}: expected a run or nothing, got other files. Pass another directory.")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a directory for writing; the system drops the lock of a killed process. Raises RunError if it is held."""
    try:
        held = (path / ".lock").open("w")
    except OSError as error:
        raise RunError(f"{path}: expected a place to write, got {error.strerror}. Pass another directory.") from None
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{path}: expected no other writer, got one. Wait until it has finished.") from None
        yield


def _begin(path: Path, identity: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the run that is there, or of a new one; unless it is complete, with one sitting more."""
    if (path / "manifest.json").exists():
        manifest = read_manifest(path)
        check_same(path, manifest, identity)
    else:
        manifest = {"format": FORMAT, "status": "running", **identity, "report": {"seed": 0}, "sittings": []}
    if manifest["status"] != "complete":
        if manifest["sittings"]:
            warn_of_versions(path, manifest["sittings"][-1], about)
        manifest["sittings"].append(dict(about))
        write_manifest(path, manifest)
    return manifest
