"""Stable counting sort of the slots by expert, without atomics, and the map from tiles to experts.

Three kernels: count per chunk, one program that turns counts into starting points and tiles, scatter. Nothing is read
back by the host: the number of tiles has the bound min(N, ceil(N / BM) + E - 1), and tiles beyond the real ones are -1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def count_kernel(ids, counts, N, E, C: tl.constexpr, REPEAT: tl.constexpr, BE: tl.constexpr):
    """counts[chunk, e]: slots of expert e among the REPEAT·C slots of this chunk."""
    chunk = tl.program_id(0)
    e = tl.arange(0, BE)
    total = tl.zeros((BE,), tl.int32)
    for i in range(REPEAT):
        slot = (chunk * REPEAT + i) * C + tl.arange(0, C)
        expert = tl.load(ids + slot, mask=slot < N, other=-1).to(tl.int32)
        total += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + chunk * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["N", "N_CHUNKS", "MAX_TILES"])
def scan_kernel(
    counts, starts, load, tile_expert, tile_first, tile_end, N, N_CHUNKS, E, MAX_TILES,
    BM: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program. starts[chunk, e]: the sorted row at which the chunk's slots of e begin. tile_*: expert, first row
    and end of that expert's rows. `tile_expert` None asks for the load alone."""
    e = tl.arange(0, BE)
    c = tl.arange(0, BC)
    total = tl.zeros((BE,), tl.int32)
    for c0 in range(0, N_CHUNKS, BC):
        real = (c0 + c < N_CHUNKS)[:, None] & (e < E)[None, :]
        total += tl.sum(tl.load(counts + (c0 + c)[:, None] * E + e[None, :], mask=real, other=0), 0)
    tl.store(load + e, total.to(tl.float32) / N, mask=e < E)
    if tile_expert is not None:
        end = tl.cumsum(total, 0)
        before = end - total  # sorted row at which the chunk's rows of e begin
        for c0 in range(0, N_CHUNKS, BC):
            real = (c0 + c < N_CHUNKS)[:, None] & (e < E)[None, :]
            cell = (c0 + c)[:, None] * E + e[None, :]
            count = tl.load(counts + cell, mask=real, other=0)
            tl.store(starts + cell, before[None, :] + tl.cumsum(count, 0) - count, mask=real)
            before += tl.sum(count, 0)
        tiles = tl.cumsum((total + BM - 1) // BM, 0)
        n_tiles = tl.max(tiles, 0)
        for t0 in range(0, MAX_TILES, BT):
            tile = t0 + tl.arange(0, BT)
            finished = (tiles[None, :] <= tile[:, None]) & (e < E)[None, :]
            expert = tl.sum(finished.to(tl.int32), 1)  # the first whose tiles are not all before this one
            own = e[None, :] == expert[:, None]
            skipped = tl.max(tl.where(finished, tiles[None, :], 0), 1)
            first = tl.sum(tl.where(own, (end - total)[None, :], 0), 1) + (tile - skipped) * BM
            real = tile < MAX_TILES
            tl.store(tile_expert + tile, tl.where(tile < n_tiles, expert, -1), mask=real)
            tl.store(tile_first + tile, first, mask=real)
            tl.store(tile_end + tile, tl.sum(tl.where(own, end[None, :], 0), 1), mask=real)


@triton.jit(do_not_specialize=["N"])
def scatter_kernel(ids, starts, slots, N, E, C: tl.constexpr, REPEAT: tl.constexpr, BE: tl.constexpr):
    """slots[row]: the slot at each sorted row; equal experts keep their slot order."""
    chunk = tl.program_id(0)
    e = tl.arange(0, BE)
    start = tl.load(starts + chunk * E + e, mask=e < E, other=0)
    for i in range(REPEAT):
        slot = (chunk * REPEAT + i) * C + tl.arange(0, C)
        expert = tl.load(ids + slot, mask=slot < N, other=-1).to(tl.int32)
        hot = (expert[:, None] == e[None, :]).to(tl.int32)
        row = tl.sum(hot * (start[None, :] + tl.cumsum(hot, 0) - hot), 1)
        tl.store(slots + row, slot, mask=slot < N)
        start += tl.sum(hot, 0)
