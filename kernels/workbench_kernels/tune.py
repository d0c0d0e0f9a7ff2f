"""Choose block sizes by measurement on the GPU at hand, and compile ahead.

    python -m workbench_kernels.tune [--dtype bfloat16] [--bits 16,8,4] [--out FILE] [--budget 480]

Each path is tuned at its own token counts, one kernel part after the other while the others keep their sizes. A
candidate is first compared with the torch implementation on the same input: sizes that give another result are dropped
and named. Then candidates are timed in turn, over weights of several layers and as CUDA graphs; the least median wins,
and among those within 1% of it the first in the fixed list, so that two runs on one device tend to the same choice.
That list begins with the sizes known so far and their neighbours and goes on in a fixed shuffled order, so that a
budget that ends early has still seen small and large sizes; each part has its own share of the time.
The first bucket of a path also settles the sizes that decide the bits (blocks.arithmetic); the others vary the rest.
The table is written after every bucket: a run that breaks off keeps what it has found.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench_kernels import tables
from workbench_kernels.moe.api import fused_moe
from workbench_kernels.moe.blocks import Blocks, arithmetic, blocks_for, choose_path
from workbench_kernels.moe.plan import Intervene, Need
from workbench_kernels.quant import QuantizedExperts, quantize

SHAPE = {"d_model": 2560, "d_expert": 960, "n_experts": 128, "k": 8}
# the first of a path is where its speed matters most
BUCKETS = {"decode": (1,), "skinny": (16, 5, 64, 128), "tile": (4096, 257, 512, 1024, 2048, 16384)}
WARM_TOKENS = (1, 16, 512, 4096)
N_LAYERS, ROUNDS, SLACK = 3, 9, 1.01

Weights = tuple[Tensor, Any, Any]


def candidates(path: str, part: str, bits: int, start: Blocks) -> Iterator[Blocks]:
    """Variants of one part of `start`, which comes first; combinations that cannot fit are left to the compiler.

    Next come those that differ from it in one size, then all others in an order that is shuffled but always the same.
    None comes twice.
    """
    others = [blocks for blocks in _grid(path, part, bits, start) if _distance(part, blocks, start)]
    random.Random(0).shuffle(others)
    yield start
    yield from sorted(others, key=lambda blocks: _distance(part, blocks, start) > 1)


def _grid(path: str, part: str, bits: int, start: Blocks) -> Iterator[Blocks]:
    """Every combination, in the order of the sizes."""
    by_group: tuple[int, ...] = (start[part]["bk"],)  # int4 goes by groups of columns whatever bk says
    if path == "decode":
        columns = by_group if bits == 4 else (256, 512, 1024)
        for bn, bk, warps, stages in itertools.product((4, 8, 16, 32), columns, (4, 8), (2, 3)):
            yield _with(start, part, bn=bn, bk=bk, warps=warps, stages=stages)
        return
    tall: tuple[int, ...] = (16, 32) if path == "skinny" else (64, 128)
    if part == "down":
        tall = (start["bm"],)  # both products share bm; the first one chooses it
    widths = (64, 128) if path == "skinny" else (64, 128, 256)
    tma = (False, True) if bits == 16 and "tma" in start[part] else (False,)
    columns = by_group if bits == 4 else (64, 128)
    for bm, bn, bk, warps, stages, by_tma in itertools.product(tall, widths, columns, (4, 8), (2, 3, 4), tma):
        yield _with(start, part, bn=bn, bk=bk, warps=warps, stages=stages, tma=by_tma) | {"bm": bm}


def _with(blocks: Blocks, part: str, **sizes: Any) -> Blocks:
    kept = {name: value for name, value in blocks[part].items() if name != "wgmma"}  # a claim of the shipped sizes
    return blocks | {part: kept | sizes}


def _distance(part: str, blocks: Blocks, start: Blocks) -> int:
    """How many sizes differ; what a table claims about its own sizes is none."""
    ours, theirs = ({"bm": at.get("bm"), **at[part], "wgmma": None} for at in (blocks, start))
    return sum(value != theirs.get(name) for name, value in ours.items())


class Tuner:
    """Layers of one shape and format on one device."""

    def __init__(self, shape: dict[str, int], dtype: torch.dtype, bits: int, device: torch.device) -> None:
        self.shape, self.dtype, self.bits, self.device = shape, dtype, bits, device
        self.layers = [self._layer(seed) for seed in range(N_LAYERS)]
        self.dropped: list[str] = []

    def best(self, path: str, n_tokens: int, deadline: float, like: Blocks | None = None) -> Blocks:
        """The sizes for one bucket; with `like`, the path's first bucket, such that a token gets the same bits.

        The deadline is that of the whole bucket; at least one candidate of each part is timed in any case.
        """
        x = self._inputs(n_tokens)
        chosen = like or blocks_for(path, x, self.layers[0][1], self.layers[0][2], self.shape["k"])
        for part, share in (("gate_up", 0.5), ("down", 1.0)):  # of the time that is left: both get as much
            found = candidates(path, part, self.bits, chosen)
            if like is not None:
                found = (blocks for blocks in found if arithmetic(path, blocks) == arithmetic(path, like))
            now = time.monotonic()
            chosen = self._best_part(path, found, x, now + share * (deadline - now))
        return chosen

    def _best_part(self, path: str, found: Iterator[Blocks], x: Tensor, deadline: float) -> Blocks:
        timed: list[tuple[float, Blocks]] = []
        expected = self._run(x, self.layers[0], impl="sorted")
        for blocks in found:
            if timed and time.monotonic() > deadline:
                break
            if self.right(path, blocks, x, expected):
                timed.append((self._seconds(path, blocks, x), blocks))
        if not timed:
            raise RuntimeError(f"{path} at T={x.shape[0]}: expected sizes that give the right result, got none.")
        least = min(seconds for seconds, _ in timed)
        return next(blocks for seconds, blocks in timed if seconds <= SLACK * least)

    def right(self, path: str, blocks: Blocks, x: Tensor, expected: Tensor) -> bool:
        """Whether these sizes compile, fit and give the result; what does not is kept in `dropped`."""
        try:
            y = self._run(x, self.layers[0], impl="triton", path=path, _blocks=blocks)
        except Exception as error:  # too much shared memory, too many registers: the compiler's own errors differ
            self.dropped.append(f"{path} T={x.shape[0]} {blocks}: {type(error).__name__}")
            return False
        off = float((y.double() - expected.double()).norm() / expected.double().norm())
        if not off < (1e-5 if self.dtype == torch.float32 else 1e-2):  # NaN is wrong too
            self.dropped.append(f"{path} T={x.shape[0]} {blocks}: wrong by {off:.1e}")
            return False
        return True

    def _seconds(self, path: str, blocks: Blocks, x: Tensor) -> float:
        """Median time of a CUDA graph over all layers."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in self.layers:
                self._run(x, layer, impl="triton", path=path, _blocks=blocks)
        times = []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    @torch.no_grad()
    def _run(self, x: Tensor, layer: Weights, **options: Any) -> Tensor:
        return fused_moe(x, *layer, self.shape["k"], **options)[0]

    def _inputs(self, n_tokens: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(n_tokens)
        x = torch.empty(n_tokens, self.shape["d_model"], dtype=self.dtype, device=self.device)
        return x.normal_(generator=generator)

    def _layer(self, seed: int) -> Weights:
        generator = torch.Generator(self.device).manual_seed(seed)
        d, f, e, _ = self.shape.values()
        sizes = ((e, d), (e, 2 * f, d), (e, d, f))
        empty = [torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes]
        router, gate_up, down = [tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator) for tensor in empty]
        if self.bits == 16:
            return router, gate_up, down
        return router, quantize(gate_up, self.bits), quantize(down, self.bits)


def warm_up(
    router_weight: Tensor, gate_up: Tensor | QuantizedExperts, down: Tensor | QuantizedExperts, k: int,
    *, tokens: Sequence[int] = WARM_TOKENS, need: Need | tuple[str, ...] | None = None,
    intervene: Intervene | None = None, numerics: str = "trained", say: Any = print,
) -> dict[int, float]:  # fmt: skip
    """Compile what calls with these weights, needs and interventions will run; returns seconds by number of tokens.

    Says what it compiles as it goes. `intervene` shows by its fields which changes will be made; fields that hold one
    row per token fit one number of tokens alone. Raises ValueError where the kernels cannot run.
    """
    spent = {}
    for n_tokens in tokens:
        path = choose_path("auto", n_tokens, router_weight.shape[0], k)
        say(f"compiling the expert layer for {n_tokens} tokens ({path})")
        x = torch.zeros(n_tokens, router_weight.shape[1], dtype=down.dtype, device=router_weight.device)
        began = time.monotonic()
        with torch.no_grad():
            fused_moe(
                x, router_weight, gate_up, down, k, need=need, intervene=intervene, impl="triton", numerics=numerics
            )
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        spent[n_tokens] = time.monotonic() - began
    return spent


def _earlier(out: Path, entry: tables.Entry) -> tables.Entry:
    """The table's entry for the same case; empty where it has none."""
    table = tables.read_table(out) if out.is_file() else []
    keys = ("device", "triton", "shape", "dtype", "bits")
    return next((dict(old) for old in table if all(old[key] == entry[key] for key in keys)), {})


def tune(tuner: Tuner, entry: tables.Entry, out: Path, deadline: float, say: Any = print) -> None:
    """Fill an entry bucket by bucket, the time shared evenly, and write it after each.

    A path keeps what an earlier run wrote for it until its first bucket is tuned anew.
    """
    entry = _earlier(out, entry) | entry
    jobs = [(path, n_tokens) for path, buckets in BUCKETS.items() for n_tokens in buckets]
    for done, (path, n_tokens) in enumerate(jobs):
        began = time.monotonic()
        first = n_tokens == BUCKETS[path][0]
        known = {} if first else entry[path]
        like = None if first else next(iter(known.values()))
        best = tuner.best(path, n_tokens, began + (deadline - began) / (len(jobs) - done), like)
        entry[path] = known | {str(n_tokens): best}
        tables.write_entry(out, entry)
        say(f"int{tuner.bits} {path} T={n_tokens}: {time.monotonic() - began:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--bits", default="16,8,4", help="weight formats, comma-separated")
    parser.add_argument("--out", type=Path, help="the table; default: the packaged one for this architecture")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all of it")
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: expected a GPU, got none. Run it on the machine whose block sizes you want.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    shape = {name: getattr(given, name) for name in SHAPE}
    out = given.out or tables.PACKAGED / f"{tables.architecture(device)}.json"
    formats = [int(bits) for bits in given.bits.split(",")]
    deadline = time.monotonic() + given.budget
    warnings.simplefilter("ignore")  # that sizes are not tuned yet is why this runs
    for at, bits in enumerate(formats):
        tuner = Tuner(shape, getattr(torch, given.dtype), bits, device)
        entry = {
            "device": torch.cuda.get_device_name(device), "triton": tables.triton_release(), "shape": shape,
            "dtype": given.dtype, "bits": bits, "tuned": True,
        }  # fmt: skip
        now = time.monotonic()
        tune(tuner, entry, out, now + (deadline - now) / (len(formats) - at))
        print(f"{len(tuner.dropped)} candidates dropped; table written to {out.name}")
        print("\n".join(tuner.dropped[:20]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
