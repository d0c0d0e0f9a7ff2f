"""The path for a handful of tokens: no sort, each slot reads its expert's weights as a matrix-vector product.

Products are summed lane by lane in float32 and then across lanes, in an order that the block sizes fix. The down
kernel goes through a token's K experts in slot order and mixes them at once, so there is no combine kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workbench_kernels.moe.epilogue import changed, selected, show, swiglu, weighted
from workbench_kernels.moe.gemm import halves


@triton.jit
def matvec(
    vector, weight, scales, expert, row, row_mask, ROWS, width,
    BN: tl.constexpr, BK: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """float32 [BN]: rows `row` of one expert's weight [ROWS, width] times a vector of `width` values."""
    COLS: tl.constexpr = BK // 2 if FMT == 4 else BK
    stored = width // 2 if FMT == 4 else width
    cells = weight + (expert.to(tl.int64) * ROWS + row)[:, None] * stored
    lanes = tl.zeros((BN, COLS), tl.float32)
    for i in range(0, tl.cdiv(width, BK)):
        col = i * COLS + tl.arange(0, COLS)
        mask = row_mask[:, None] & (col < stored)[None, :]
        w = tl.load(cells + col[None, :], mask=mask, other=0)
        at = i * BK + tl.arange(0, COLS)
        low = tl.load(vector + at, mask=at < width, other=0.0).to(tl.float32)
        if FMT == 4:
            high = tl.load(vector + at + COLS, mask=at + COLS < width, other=0.0).to(tl.float32)
            scale_at = scales + (expert.to(tl.int64) * (width // BK) + i) * ROWS + row
            s = tl.load(scale_at, mask=row_mask, other=0.0).to(tl.float32)
            bottom, top = halves(w)
            lanes += (bottom * low[None, :] + top * high[None, :]) * s[:, None]
        else:
            lanes += w.to(tl.float32) * low[None, :]
    total = tl.sum(lanes, 1)
    if FMT == 8:
        total *= tl.load(scales + expert.to(tl.int64) * ROWS + row, mask=row_mask, other=0.0)
    return total


@triton.jit
def decode_gate_up_kernel(
    x, weight, scales, hidden, pre, linear, post, expert_mask, token_mask, ids, D, F, x_stride,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FMT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """As gemm.gate_up_kernel, one slot and BN rows per program."""
    blocks = tl.cdiv(F, BN)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    expert = tl.load(ids + slot).to(tl.int32)
    row = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    mask = row < F
    vector = x + slot // K * x_stride
    gate = matvec(vector, weight, scales, expert, row, mask, 2 * F, D, BN, BK, FMT)
    up = matvec(vector, weight, scales, expert, row + F, mask, 2 * F, D, BN, BK, FMT)
    out = slot * F + row
    shown = selected(mask, expert, slot // K, True, expert_mask, token_mask)
    product = swiglu(gate, up, hidden.dtype.element_ty, ROUND)
    show(pre, out, gate, shown, mask)
    show(linear, out, up, shown, mask)
    show(post, out, product, shown, mask)
    tl.store(hidden + out, product, mask=mask)


@triton.jit
def decode_down_kernel(
    hidden, weight, scales, y, kept, scale, add, replaced, replace_rows, expert_mask, token_mask, ids, weights, mixed,
    D, F,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FMT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """mixed[token] = Σ weight · out over the K slots; `y` and `kept` also get the outputs, `mixed` None leaves the sum.

    Outputs are rounded to the model's dtype before they are mixed, as combine_kernel finds them in memory: whether
    somebody looks at them changes no bit.
    """
    blocks = tl.cdiv(D, BN)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    mask = col < D
    dtype: tl.constexpr = hidden.dtype.element_ty
    total = tl.zeros((BN,), tl.float32)
    for j in range(K):
        slot = token * K + j
        expert = tl.load(ids + slot).to(tl.int32)
        out = matvec(hidden + slot * F, weight, scales, expert, col, mask, D, F, BN, BK, FMT)
        if ROUND:
            out = out.to(dtype).to(tl.float32)
        cell = slot * D + col
        add_cell = expert.to(tl.int64) * D + col
        stored = changed(out, expert, cell, add_cell, mask, scale, add, replaced, replace_rows).to(dtype)
        if y is not None:
            tl.store(y + cell, stored, mask=mask)
        show(kept, cell, stored, selected(mask, expert, token, True, expert_mask, token_mask), mask)
        if mixed is not None:
            total += weighted(stored, tl.load(weights + slot), dtype, ROUND)
    if mixed is not None:
        tl.store(mixed + token * D + col, total.to(dtype), mask=mask)
