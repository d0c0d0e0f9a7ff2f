"""How long the routing store takes to aggregate, and the same in pandas: `python tests/benchmarks/routing_store.py`.

Writes a synthetic run of Parquet files in the store's own schema to a temporary directory and counts the slots of every
document group, language, layer and expert. Prints medians of interleaved runs in one process, what they ran on, and
checks that both give the same numbers. `--tokens 312500 --layers 32` is ten million token-layers; pandas explodes lists
in memory and gets a part of it, by default a twentieth, from which its time is not extrapolated: both are timed on that
part too.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl

from workbench.io.run_checks import ROUTING_SCHEMA
from workbench.stats.load import slot_counts

BY = ["group_id", "lang"]


def write_store(folder: Path, n_tokens: int, n_layers: int, n_experts: int, k: int, doc_length: int = 256) -> int:
    """Two Parquet files of documents in two languages; returns the number of token-layers."""
    rng = np.random.default_rng(0)
    doc = np.arange(n_tokens) // doc_length
    names = np.array([f"group-{number // 2:05}-{'ja' if number % 2 else 'en'}-medium" for number in range(doc[-1] + 1)])
    pos = (np.arange(n_tokens) % doc_length).astype(np.int32)
    tokens = pl.DataFrame({"doc_id": names[doc], "pos": pos}).with_columns(
        group_id=pl.col("doc_id").str.slice(0, 11), lang=pl.col("doc_id").str.slice(12, 2), segment=pl.lit("user")
    )
    tokens.write_parquet(folder / "tokens.parquet")
    ids = np.argsort(rng.random((n_tokens, n_experts), dtype=np.float32), axis=-1)[:, :k].astype(np.int16)
    parts = []
    for start in range(0, n_tokens, 50_000):
        here = slice(start, min(start + 50_000, n_tokens))
        n = here.stop - here.start
        shifted = (ids[here, None, :] + np.arange(n_layers, dtype=np.int16)[:, None]) % n_experts  # [token layer k]
        part = pl.DataFrame(
            {
                "doc_id": pl.Series(names[doc[here]]).gather(np.repeat(np.arange(n), n_layers)),
                "pos": np.repeat(pos[here], n_layers),
                "layer": np.tile(np.arange(n_layers, dtype=np.int16), n),
                "expert_ids": pl.Series(shifted.reshape(-1, k)).arr.to_list(),
                "routing_weights": pl.Series(np.full((n * n_layers, k), 1 / k, dtype=np.float32)).arr.to_list(),
            }
        )
        absent = [pl.lit(None).alias(name) for name in ROUTING_SCHEMA if name not in part.columns]
        part = part.with_columns(absent).select(pl.col(name).cast(dtype) for name, dtype in ROUTING_SCHEMA.items())
        parts.append(folder / f"part-{start:08}.parquet")
        part.write_parquet(parts[-1])
    pl.scan_parquet(parts).sink_parquet(folder / "routing.parquet")
    for file in parts:
        file.unlink()
    return n_tokens * n_layers


def with_workbench(folder: Path) -> pl.DataFrame:
    return slot_counts(pl.scan_parquet(folder / "tokens.parquet"), pl.scan_parquet(folder / "routing.parquet"), BY)


def with_pandas(folder: Path) -> pd.DataFrame:
    """The direct way: read the columns needed, join, explode the lists, group and count."""
    tokens = pd.read_parquet(folder / "tokens.parquet", columns=["doc_id", "pos", *BY])
    routing = pd.read_parquet(folder / "routing.parquet", columns=["doc_id", "pos", "layer", "expert_ids"])
    joined = routing.merge(tokens, on=["doc_id", "pos"]).explode("expert_ids")
    return joined.groupby([*BY, "layer", "expert_ids"], sort=True).size().reset_index(name="slots")


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median (seconds, processor seconds of all threads) of each, taken by turns, after one round that does not count.

    Where something else keeps the cores busy only the latter says what the work costs.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            start, busy = time.perf_counter(), time.process_time()
            function()
            if round_number:
                times[name].append((time.perf_counter() - start, time.process_time() - busy))
    return {name: tuple(map(statistics.median, zip(*rows, strict=True))) for name, rows in times.items()}


def check_same(folder: Path) -> None:
    ours, theirs = with_workbench(folder), with_pandas(folder)
    keys = list(zip(*(theirs[name] for name in (*BY, "layer", "expert_ids")), strict=True))
    assert ours.select(*BY, "layer", "expert").rows() == keys, "other cells"
    np.testing.assert_array_equal(ours["slots"].to_numpy(), theirs["slots"].to_numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=312_500)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pandas-share", type=int, default=20, help="pandas gets one part in this many (default: 20)")
    arguments = parser.parse_args()
    shape = (arguments.layers, arguments.experts, arguments.k)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}; python {platform.python_version()}")
    print(f"polars {pl.__version__}, pandas {pd.__version__}, numpy {np.__version__}; E={shape[1]}, k={shape[2]}")
    with tempfile.TemporaryDirectory() as name:
        whole, part = Path(name) / "whole", Path(name) / "part"
        whole.mkdir()
        part.mkdir()
        n = write_store(whole, arguments.tokens, *shape)
        few = write_store(part, arguments.tokens // arguments.pandas_share, *shape)
        check_same(part)
        times = interleaved({"workbench": lambda: with_workbench(whole)}, arguments.repeats)
        print(f"{n:,} token-layers, medians of {arguments.repeats}: {shown(times)}")
        both = {"workbench": lambda: with_workbench(part), "pandas": lambda: with_pandas(part)}
        times = interleaved(both, arguments.repeats)
        ratios = [theirs / ours for theirs, ours in zip(times["pandas"], times["workbench"], strict=True)]
        print(f"{few:,} token-layers, medians of {arguments.repeats}: {shown(times)}")
        print(f"pandas / workbench: {ratios[0]:.1f} by the clock, {ratios[1]:.1f} in processor time")


def shown(times: dict[str, tuple[float, float]]) -> str:
    return "; ".join(f"{name} {wall:.2f} s, {busy:.2f} processor s" for name, (wall, busy) in times.items())


if __name__ == "__main__":
    main()
