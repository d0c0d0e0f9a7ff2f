"""Grouped matrix products over tiles of sorted slots: gate and up with SwiGLU behind them, then down.

One tile is BM slots of one expert times BN of its weight rows. With SWAP the weights are the first operand of the
product, so that few tokens still fill a wgmma (its first operand has 64 rows): that is the skinny path, and the tile
path is the same code without. Operands come from x and the hidden rows by gather, results go out in slot order, so no
permuted copy of anything exists.

FMT 0 is a plain weight, 8 and 4 those of quant.py. TMA: `weight` is a tensor descriptor over [E·rows, columns].
"""

from __future__ import annotations

import triton
import triton.language as tl

from workbench_kernels.moe.epilogue import changed, selected, show, swiglu


@triton.jit
def place(pid, n_tiles, n_cols, GROUP: tl.constexpr):
    """(tile, column block) of a program: GROUP tiles run through their columns together and share weights in L2."""
    first = pid // (GROUP * n_cols) * GROUP
    size = min(n_tiles - first, GROUP)
    within = pid % (GROUP * n_cols)
    return first + within % size, within // size


@triton.jit
def load_rows(rows, row_mask, col0, width, BK: tl.constexpr):
    """[BM, BK] operand tile; `rows` are pointers to the first column."""
    col = col0 + tl.arange(0, BK)
    return tl.load(rows[:, None] + col[None, :], mask=row_mask[:, None] & (col < width)[None, :], other=0.0)


@triton.jit
def load_operand(rows, row_mask, step, width, BK: tl.constexpr, FMT: tl.constexpr):
    """The columns of one step: all of them, or for int4 those of the low and of the high halves of the bytes."""
    if FMT == 4:
        low = load_rows(rows, row_mask, step * BK, width, BK // 2)
        high = load_rows(rows, row_mask, step * BK + BK // 2, width, BK // 2)
    else:
        low = load_rows(rows, row_mask, step * BK, width, BK)
        high = low
    return low, high


@triton.jit
def load_weight(weight, row0, n, n_mask, step, width, BK: tl.constexpr, FMT: tl.constexpr, TMA: tl.constexpr):
    """[BN, BK] of a weight's stored values, int4 two to a byte; beyond the mask a descriptor reads rows that are
    never stored."""
    PACKED: tl.constexpr = 2 if FMT == 4 else 1
    COLS: tl.constexpr = BK // PACKED
    if TMA:
        values = weight.load([row0, step * COLS])
    else:
        col = step * COLS + tl.arange(0, COLS)
        cell = (row0 + n).to(tl.int64)[:, None] * (width // PACKED) + col[None, :]
        values = tl.load(weight + cell, mask=n_mask[:, None] & (col < width // PACKED)[None, :], other=0)
    return values


@triton.jit
def halves(stored):
    """The low and the high nibbles of int4 bytes, as float32."""
    return ((stored << 4) >> 4).to(tl.float32), (stored >> 4).to(tl.float32)


@triton.jit
def multiply(acc, rows, weight, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(weight, tl.trans(rows), acc, input_precision="ieee")
    else:
        acc = tl.dot(rows, tl.trans(weight), acc, input_precision="ieee")
    return acc


@triton.jit
def accumulate(acc, low, high, stored, scale_at, n_mask, FMT: tl.constexpr, SWAP: tl.constexpr):
    """acc + rows · weightᵀ for the stored values of one step in any format; int4 has scales for each step."""
    dtype: tl.constexpr = low.dtype
    if FMT == 4:
        scale = tl.load(scale_at, mask=n_mask, other=0.0).to(tl.float32)[:, None]
        bottom, top = halves(stored)
        acc = multiply(acc, low, (bottom * scale).to(dtype), SWAP)
        acc = multiply(acc, high, (top * scale).to(dtype), SWAP)
    else:
        acc = multiply(acc, low, stored.to(dtype), SWAP)
    return acc


@triton.jit
def finished(acc, scales, row, n_mask, FMT: tl.constexpr, SWAP: tl.constexpr):
    """[BM, BN] float32: a sum in slot order, and times its rows' scales where these are per row, as for int8."""
    if SWAP:
        acc = tl.trans(acc)
    if FMT == 8:
        acc *= tl.load(scales + row, mask=n_mask, other=0.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["MAX_TILES"])
def gate_up_kernel(
    x, weight, scales, hidden, pre, linear, post, expert_mask, token_mask, slots, tile_expert, tile_first, tile_end,
    MAX_TILES, D, F, x_stride,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FMT: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """hidden[slot] = silu(gate) · up; pre, linear and post show gate, up and hidden: zeros outside the masks."""
    tile, block = place(tl.program_id(0), MAX_TILES, tl.cdiv(F, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_first + tile) + tl.arange(0, BM)
    row_mask = row < tl.load(tile_end + tile)
    slot = tl.load(slots + row, mask=row_mask, other=0).to(tl.int64)
    rows = x + slot // K * x_stride
    n = tl.arange(0, BN)
    n_mask = block * BN + n < F
    gate0 = expert * 2 * F + block * BN
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    gate = tl.zeros(shape, tl.float32)
    up = tl.zeros(shape, tl.float32)
    gate_at = scales
    up_at = scales
    if FMT == 4:
        gate_at = scales + expert.to(tl.int64) * (D // BK) * 2 * F + block * BN + n
        up_at = gate_at + F
    for i in range(0, tl.cdiv(D, BK)):
        low, high = load_operand(rows, row_mask, i, D, BK, FMT)
        w_gate = load_weight(weight, gate0, n, n_mask, i, D, BK, FMT, TMA)  # both before a product: one wait for both
        w_up = load_weight(weight, gate0 + F, n, n_mask, i, D, BK, FMT, TMA)
        gate = accumulate(gate, low, high, w_gate, gate_at, n_mask, FMT, SWAP)
        up = accumulate(up, low, high, w_up, up_at, n_mask, FMT, SWAP)
        if FMT == 4:
            gate_at += 2 * F
            up_at += 2 * F
    gate = finished(gate, scales, gate0 + n, n_mask, FMT, SWAP)
    up = finished(up, scales, gate0 + F + n, n_mask, FMT, SWAP)

    out = slot[:, None] * F + (block * BN + n)[None, :]
    out_mask = row_mask[:, None] & n_mask[None, :]
    shown = selected(out_mask, expert, slot[:, None] // K, row_mask[:, None], expert_mask, token_mask)
    product = swiglu(gate, up, hidden.dtype.element_ty, ROUND)
    show(pre, out, gate, shown, out_mask)
    show(linear, out, up, shown, out_mask)
    show(post, out, product, shown, out_mask)
    tl.store(hidden + out, product, mask=out_mask)


@triton.jit(do_not_specialize=["MAX_TILES"])
def down_kernel(
    hidden, weight, scales, y, kept, scale, add, replaced, replace_rows, expert_mask, token_mask, slots, tile_expert,
    tile_first, tile_end, MAX_TILES, D, F,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FMT: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """y[slot] = the expert's output after its interventions; `kept` shows them: zeros outside the masks."""
    tile, block = place(tl.program_id(0), MAX_TILES, tl.cdiv(D, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(tile_first + tile) + tl.arange(0, BM)
    row_mask = row < tl.load(tile_end + tile)
    slot = tl.load(slots + row, mask=row_mask, other=0).to(tl.int64)
    rows = hidden + slot * F
    n = tl.arange(0, BN)
    col = block * BN + n
    n_mask = col < D
    row0 = expert * D + block * BN
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    out = tl.zeros(shape, tl.float32)
    scale_at = scales
    if FMT == 4:
        scale_at = scales + expert.to(tl.int64) * (F // BK) * D + col
    for i in range(0, tl.cdiv(F, BK)):
        low, high = load_operand(rows, row_mask, i, F, BK, FMT)
        w = load_weight(weight, row0, n, n_mask, i, F, BK, FMT, TMA)
        out = accumulate(out, low, high, w, scale_at, n_mask, FMT, SWAP)
        if FMT == 4:
            scale_at += D
    out = finished(out, scales, row0 + n, n_mask, FMT, SWAP)

    dtype: tl.constexpr = y.dtype.element_ty
    if ROUND:
        out = out.to(dtype).to(tl.float32)
    cell = slot[:, None] * D + col[None, :]
    add_cell = tl.broadcast_to((expert.to(tl.int64) * D + col)[None, :], (BM, BN))
    out_mask = row_mask[:, None] & n_mask[None, :]
    out = changed(out, expert, cell, add_cell, out_mask, scale, add, replaced, replace_rows).to(dtype)
    tl.store(y + cell, out, mask=out_mask)
    shown = selected(out_mask, expert, slot[:, None] // K, row_mask[:, None], expert_mask, token_mask)
    show(kept, cell, out, shown, out_mask)
