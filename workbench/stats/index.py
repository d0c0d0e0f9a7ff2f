"""Where rows belong: tokens to units, routing rows to tokens. Flat integers, because joins on text are slow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.errors import FrameError

Frame = pl.DataFrame | pl.LazyFrame
Ints = NDArray[np.int64]


def unit_index(tokens: Frame, keys: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Number the units that `keys` define.

    Returns units (*keys, n_tokens, unit) and the tokens (doc_id, pos, unit, weight), whose weights are scaled to 1 on
    average over a unit; without a column `weight` every token weighs 1.
    """
    weighted = "weight" in tokens.lazy().collect_schema()
    columns = list(dict.fromkeys(["doc_id", "pos", *keys]))
    kept = tokens.lazy().select(*columns, pl.col("weight") if weighted else pl.lit(1.0).alias("weight")).collect()
    constant = pl.lit(0) if not keys else pl.struct(*keys)
    unit = constant.rank("dense").cast(pl.Int64) - 1 if keys else pl.lit(0, dtype=pl.Int64)
    kept = kept.with_columns(unit=unit)
    units = kept.group_by("unit", maintain_order=True).agg(
        *(pl.col(key).first() for key in keys), n_tokens=pl.len().cast(pl.Int64)
    )
    scaled = pl.col("weight") * pl.len().over("unit") / pl.col("weight").sum().over("unit")
    return units.sort("unit"), kept.select("doc_id", "pos", "unit", weight=scaled)


def locate(where: pl.DataFrame, rows: pl.DataFrame) -> Ints:
    """For each of `rows` (doc_id, pos) its row in `where` (doc_id, pos), -1 where it is not there.

    Documents come in runs, so that text is compared once per run and not once per row.
    """
    table, start = _table(where)
    runs = rows["doc_id"].rle()
    lengths, names = runs.struct.field("len").to_numpy(), runs.struct.field("value")
    first = pl.DataFrame({"doc_id": names}).join(start, on="doc_id", how="left", maintain_order="left")
    begin = np.repeat(first["begin"].fill_null(-1).to_numpy(), lengths)
    size = np.repeat(first["size"].fill_null(0).to_numpy(), lengths)
    pos = rows["pos"].cast(pl.Int64).to_numpy()
    known = (pos >= 0) & (pos < size)
    return np.where(known, table[np.where(known, begin + pos, 0)], -1)


def _table(where: pl.DataFrame) -> tuple[Ints, pl.DataFrame]:
    """A row number per (document, position), and where each document's part of it begins."""
    if where.is_empty():
        return np.full(1, -1), pl.DataFrame(schema={"doc_id": pl.String, "size": pl.Int64, "begin": pl.Int64})
    start = where.group_by("doc_id", maintain_order=True).agg(size=pl.col("pos").max().cast(pl.Int64) + 1)
    start = start.with_columns(begin=pl.col("size").cum_sum() - pl.col("size"))
    table = np.full(int(start["size"].sum()), -1)
    begin = where.select("doc_id").join(start, on="doc_id", maintain_order="left")["begin"].to_numpy()
    table[begin + where["pos"].cast(pl.Int64).to_numpy()] = np.arange(len(where))
    return table, start


def id_matrix(lists: pl.Series) -> Ints:
    """A list column whose lists all have length k as an array [row k]."""
    if lists.is_empty():
        return np.zeros((0, 0), dtype=np.int64)
    return lists.explode().to_numpy().reshape(len(lists), -1)


def token_array(tokens: pl.DataFrame, routing: Frame, column: str = "expert_ids") -> tuple[list[int], np.ndarray]:
    """A list column of the routing of these tokens, in their order: (layers, values [token layer k]).

    Raises FrameError when a token is not routed in every layer that the routing has.
    """
    rows = routing.lazy().select("doc_id", "pos", "layer", column).collect()
    place = locate(tokens.select("doc_id", "pos"), rows)
    kept = rows.filter(pl.Series(place >= 0))
    layers = kept["layer"].unique().sort().to_list()
    depth = np.searchsorted(layers, kept["layer"].to_numpy())
    values = id_matrix(kept[column])
    found = np.zeros((len(tokens), max(len(layers), 1)), dtype=bool)
    found[place[place >= 0], depth] = True
    if len(kept) != len(tokens) * len(layers) or not found.all():
        raise FrameError(
            f"routing: expected one row per token and layer, {len(tokens)} x {len(layers)}, got {len(kept)}. "
            "Pass the tokens and the routing of one run, without duplicates."
        )
    array = np.zeros((len(tokens), len(layers), values.shape[1]), dtype=values.dtype)
    array[place[place >= 0], depth] = values
    return layers, array


def check_choices(ids: np.ndarray, n_experts: int | None = None) -> None:
    """Refuses choices [token layer k] of nothing, and numbers that `n_experts` experts do not have."""
    if not ids.size:
        raise FrameError("tokens: expected some that are routed, got none. Pass other segments, or a run of a mixture.")
    check_experts(int(ids.max()), n_experts)


def check_experts(largest: int | None, n_experts: int | None) -> None:
    """Refuses an expert that would be counted as one of the next layer, or not at all."""
    if largest is not None and n_experts is not None and largest >= n_experts:
        raise FrameError(f"n_experts: expected at least {largest + 1}, got {n_experts}. Pass the number of the run.")


def check_counts(counts: pl.DataFrame, n_experts: int) -> None:
    """Refuses counts (layer, expert ...) of nothing, and experts that are none."""
    if counts.is_empty():
        raise FrameError("counts: expected token-slots, got none. Count tokens of other segments.")
    check_experts(int(counts["expert"].to_numpy().max()), n_experts)


def membership(ids: np.ndarray, n_experts: int) -> NDArray[np.bool_]:
    """Which experts each token chose: [token k] -> [token expert]."""
    member = np.zeros((len(ids), n_experts), dtype=bool)
    np.put_along_axis(member, ids.astype(np.int64), True, axis=1)
    return member


def codes(values: pl.Series | pl.DataFrame) -> Ints:
    """Equal rows get equal numbers, from 0 without gaps; null counts as a value."""
    frame = values.to_frame() if isinstance(values, pl.Series) else values
    return frame.select(pl.struct(pl.all()).rank("dense")).to_series().cast(pl.Int64).to_numpy() - 1
