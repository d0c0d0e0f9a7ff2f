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
def load_weight(weight, row0, n, row_mask, col0, width, BK: tl.constexpr, TMA: tl.constexpr):
    """[BN, BK] of a weight's stored values; beyond the row mask a descriptor reads rows that are never stored."""
    if TMA:
        values = weight.load([row0, col0])
    else:
        col = col0 + tl.arange(0, BK)
        cell = (row0 + n).to(tl.int64)[:, None] * width + col[None, :]
        values = tl.load(weight + cell, mask=row_mask[:, None] & (col < width)[None, :], other=0)
    return values


@triton.jit
def multiply(acc, rows, weight, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(weight, tl.trans(rows), acc, input_precision="ieee")
    else:
        acc = tl.dot(rows, tl.trans(weight), acc, input_precision="ieee")
    return acc


@triton.jit
def accumulate(acc, low, high, weight, scale, FMT: tl.constexpr, SWAP: tl.constexpr):
    """acc + rows · weightᵀ for one tile of stored values in any format; `high` and `scale` are for int4 alone."""
    dtype: tl.constexpr = low.dtype
    if FMT == 4:
        bottom = ((weight << 4) >> 4).to(tl.float32) * scale[:, None]
        top = (weight >> 4).to(tl.float32) * scale[:, None]
        acc = multiply(acc, low, bottom.to(dtype), SWAP)
        acc = multiply(acc, high, top.to(dtype), SWAP)
    else:
        acc = multiply(acc, low, weight.to(dtype), SWAP)
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
    scale_at = scales  # of this tile's gate rows; unused without scales
    if FMT == 4:
        scale_at = scales + expert.to(tl.int64) * (D // BK) * 2 * F + block * BN + n
    COLS: tl.constexpr = BK // 2 if FMT == 4 else BK
    width = D // 2 if FMT == 4 else D
    for i in range(0, tl.cdiv(D, BK)):
        low = load_rows(rows, row_mask, i * BK, D, COLS)
        w_gate = load_weight(weight, gate0, n, n_mask, i * COLS, width, COLS, TMA)
        w_up = load_weight(weight, gate0 + F, n, n_mask, i * COLS, width, COLS, TMA)
        if FMT == 4:
            high = load_rows(rows, row_mask, i * BK + COLS, D, COLS)
            s_gate = tl.load(scale_at + i * 2 * F, mask=n_mask, other=0.0).to(tl.float32)
            s_up = tl.load(scale_at + i * 2 * F + F, mask=n_mask, other=0.0).to(tl.float32)
            gate = accumulate(gate, low, high, w_gate, s_gate, FMT, SWAP)
            up = accumulate(up, low, high, w_up, s_up, FMT, SWAP)
        else:
            gate = accumulate(gate, low, low, w_gate, None, FMT, SWAP)
            up = accumulate(up, low, low, w_up, None, FMT, SWAP)
    if SWAP:
        gate = tl.trans(gate)
        up = tl.trans(up)
    if FMT == 8:
        gate *= tl.load(scales + gate0 + n, mask=n_mask, other=0.0)[None, :]
        up *= tl.load(scales + gate0 + F + n, mask=n_mask, other=0.0)[None, :]

    dtype: tl.constexpr = hidden.dtype.element_ty
    out = slot[:, None] * F + (block * BN + n)[None, :]
    out_mask = row_mask[:, None] & n_mask[None, :]
    shown = out_mask
    if expert_mask is not None:
        shown = shown & (tl.load(expert_mask + expert) != 0)
    if token_mask is not None:
        shown = shown & (tl.load(token_mask + slot // K, mask=row_mask, other=0) != 0)[:, None]
    if pre is not None:
        tl.store(pre + out, tl.where(shown, gate, 0.0).to(dtype), mask=out_mask)
    if linear is not None:
        tl.store(linear + out, tl.where(shown, up, 0.0).to(dtype), mask=out_mask)
    product = swiglu(gate, up, dtype, ROUND)
    tl.store(hidden + out, product, mask=out_mask)
    if post is not None:
        tl.store(post + out, tl.where(shown, product, 0.0).to(dtype), mask=out_mask)


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr, ROUND: tl.constexpr):
    """silu(gate) · up in float32; ROUND rounds to `dtype` after each step, as separate torch operations do."""
    if ROUND:
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
    active = gate / (1.0 + tl.exp(-gate))
    if ROUND:
        active = active.to(dtype).to(tl.float32)
    return (active * up).to(dtype)


@triton.jit
def changed(out, expert, cell, add_cell, mask, scale, add, replaced, replace_rows):
    """Step 8 of plan.py for outputs of one expert, float32 of any shape; every pointer may be None."""
    if scale is not None:
        factor = tl.load(scale + expert).to(tl.float32)
        out = tl.where(factor == 0, 0.0, out * factor)
    if add is not None:
        out += tl.load(add + add_cell, mask=mask, other=0.0).to(tl.float32)
    if replaced is not None:
        instead = tl.load(replaced + expert) != 0
        out = tl.where(instead, tl.load(replace_rows + cell, mask=mask & instead, other=0.0).to(tl.float32), out)
    return out


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
    COLS: tl.constexpr = BK // 2 if FMT == 4 else BK
    width = F // 2 if FMT == 4 else F
    for i in range(0, tl.cdiv(F, BK)):
        low = load_rows(rows, row_mask, i * BK, F, COLS)
        w = load_weight(weight, row0, n, n_mask, i * COLS, width, COLS, TMA)
        if FMT == 4:
            high = load_rows(rows, row_mask, i * BK + COLS, F, COLS)
            s = tl.load(scale_at + i * D, mask=n_mask, other=0.0).to(tl.float32)
            out = accumulate(out, low, high, w, s, FMT, SWAP)
        else:
            out = accumulate(out, low, low, w, None, FMT, SWAP)
    if SWAP:
        out = tl.trans(out)
    if FMT == 8:
        out *= tl.load(scales + row0 + n, mask=n_mask, other=0.0)[None, :]

    dtype: tl.constexpr = y.dtype.element_ty
    if ROUND:
        out = out.to(dtype).to(tl.float32)
    cell = slot[:, None] * D + col[None, :]
    add_cell = tl.broadcast_to((expert.to(tl.int64) * D + col)[None, :], (BM, BN))
    out_mask = row_mask[:, None] & n_mask[None, :]
    out = changed(out, expert, cell, add_cell, out_mask, scale, add, replaced, replace_rows).to(dtype)
    tl.store(y + cell, out, mask=out_mask)
    if kept is not None:
        shown = out_mask
        if expert_mask is not None:
            shown = shown & (tl.load(expert_mask + expert) != 0)
        if token_mask is not None:
            shown = shown & (tl.load(token_mask + slot // K, mask=row_mask, other=0) != 0)[:, None]
        tl.store(kept + cell, tl.where(shown, out, 0.0).to(dtype), mask=out_mask)
