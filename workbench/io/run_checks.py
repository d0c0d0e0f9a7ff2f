"""Whether a run directory holds what was written: hashes of its files, types of its columns, values in their ranges."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from workbench.axes import TOKEN_COLUMNS
from workbench.errors import RunError

FRAMES = ("tokens.parquet", "routing.parquet", "load.safetensors")  # hashed when a run is opened; shards when read

TOKEN_SCHEMA: dict[str, Any] = dict.fromkeys(TOKEN_COLUMNS, pl.String) | {
    "pos": pl.Int32,
    "token_id": pl.Int32,
    "word_initial": pl.Boolean,
    "segment_index": pl.Int16,
    "pos_in_segment": pl.Int32,
}
ROUTING_SCHEMA: dict[str, Any] = {
    "doc_id": pl.String,
    "pos": pl.Int32,
    "layer": pl.Int16,
    "expert_ids": pl.List(pl.Int16),
    "routing_weights": pl.List(pl.Float32),
    "router_entropy": pl.Float32,
    "router_margin": pl.Float32,
    "router_lse": pl.Float32,
    "router_mass": pl.Float32,
    "expert_norms": pl.List(pl.Float32),
    "mlp_in_norm": pl.Float32,
    "mlp_out_norm": pl.Float32,
}
SCHEMAS = {"tokens": TOKEN_SCHEMA, "routing": ROUTING_SCHEMA}


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a run directory that hold what was measured, by their names in it."""
    shards = sorted(f"router_logits/{file.name}" for file in folder.glob("router_logits/*.safetensors"))
    return {name: _hash_file(folder / name) for name in (*FRAMES, *shards)}


def check_hash(folder: Path, name: str, hashes: Mapping[str, str]) -> None:
    """Raises RunError unless the file is the one whose hash was taken down."""
    try:
        found = _hash_file(folder / name)
    except OSError as error:
        raise RunError(
            f"{folder / name}: expected a file, got {error.strerror}. Run the study again in a new directory."
        ) from None
    if found != hashes.get(name):
        raise RunError(
            f"{folder / name}: expected the file that the study wrote, got other bytes (by the SHA-256 in the "
            "manifest). It is damaged or was changed: run the study again in a new directory."
        )


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def readable(path: Path, advice: str = "Run the study again in a new directory.") -> Iterator[None]:
    """Turns what polars says of damaged frames into a RunError."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise RunError(f"{path}: expected whole Parquet files, got {str(error).splitlines()[0]}. {advice}") from None


def check_frame(file: Path, name: str, advice: str = "Run the study again in a new directory.") -> int:
    """The number of rows of a tokens or routing file; raises RunError unless its columns are those of SCHEMAS."""
    try:
        scan = pl.scan_parquet(file)
        schema, n_rows = dict(scan.collect_schema()), int(scan.select(pl.len()).collect().item())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{file}: expected a Parquet file, got {str(error).splitlines()[0]}. {advice}") from None
    if list(schema) != list(SCHEMAS[name]):
        raise RunError(f"{file}: expected columns {', '.join(SCHEMAS[name])}, got {', '.join(schema)}. {advice}")
    for column, dtype in SCHEMAS[name].items():
        if schema[column] != dtype:
            raise RunError(f"{file}: expected {column} as {dtype}, got {schema[column]}. {advice}")
    return n_rows


def check_values(tokens: pl.LazyFrame, routing: pl.LazyFrame, path: Path, n_experts: int, k: int) -> None:
    """For a run without hashes, which a warning tells: raises RunError unless routing is of these tokens and on experts
    that are there."""
    warnings.warn(
        f"{path}: no hashes in its manifest, as an earlier version wrote it, so changed numbers pass unnoticed. "
        "Run the study again in a new directory to have them.",
        stacklevel=4,  # who opens the run
    )
    ids = pl.col("expert_ids")
    low, high, fewest, most = (
        routing.select(
            low=ids.list.min().min(), high=ids.list.max().max(), fewest=ids.list.len().min(), most=ids.list.len().max()
        )
        .collect()
        .row(0)
    )
    if (fewest, most) != (k, k) or low is None or low < 0 or high >= n_experts:
        raise RunError(
            f"{path / 'routing.parquet'}: expected {k} experts of 0 to {n_experts - 1} in every row, got {fewest} to "
            f"{most} of {low} to {high}. Run the study again in a new directory."
        )
    places = [frame.select("doc_id", "pos").unique() for frame in (tokens, routing)]
    strange = places[1].join(places[0], on=["doc_id", "pos"], how="anti").select(pl.len()).collect().item()
    if strange:
        raise RunError(
            f"{path / 'routing.parquet'}: expected the routing of this run's tokens, got {strange} places that are "
            "none of theirs. Run the study again in a new directory."
        )


def count(tokens: pl.LazyFrame, routing: pl.LazyFrame) -> dict[str, int]:
    """The manifest's counts: documents, prompt groups, tokens and routed layers."""
    names = {"n_docs": pl.col("doc_id").n_unique(), "n_groups": pl.col("group_id").n_unique(), "n_tokens": pl.len()}
    counts = tokens.select(**names).collect().row(0, named=True)
    return counts | {"n_routed_layers": routing.select(pl.col("layer").n_unique()).collect().item()}
