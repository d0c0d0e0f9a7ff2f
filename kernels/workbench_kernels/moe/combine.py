"""The weighted sum over a token's slots, and the one elementwise step that edited activations need."""

from __future__ import annotations

import triton
import triton.language as tl

from workbench_kernels.moe.epilogue import swiglu, weighted


@triton.jit
def combine_kernel(y, weights, mixed, D, K: tl.constexpr, BD: tl.constexpr, ROUND: tl.constexpr):
    """mixed[token] = Σ weight · y[slot], in slot order and float32; ROUND rounds each product first."""
    blocks = tl.cdiv(D, BD)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    mask = col < D
    dtype: tl.constexpr = mixed.dtype.element_ty
    total = tl.zeros((BD,), tl.float32)
    for j in tl.static_range(K):
        slot = token * K + j
        out = tl.load(y + slot * D + col, mask=mask, other=0.0)
        total += weighted(out, tl.load(weights + slot), dtype, ROUND)
    tl.store(mixed + token * D + col, total.to(dtype), mask=mask)


@triton.jit
def edited_swiglu_kernel(
    hidden, gate, up, new_gate, new_up, N, B: tl.constexpr, ROUND: tl.constexpr
):  # fmt: skip
    """hidden = silu(new_gate) · new_up where either was edited; elsewhere hidden keeps its bits.

    The fused product comes from float32 gate and up, the edited ones were rounded when they were shown, so only what
    was edited is computed again.
    """
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    mask = at < N
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    new_g = tl.load(new_gate + at, mask=mask, other=0.0).to(tl.float32)
    new_u = tl.load(new_up + at, mask=mask, other=0.0).to(tl.float32)
    same = (new_g == g) & (new_u == u)  # a NaN gives NaN either way
    tl.store(hidden + at, swiglu(new_g, new_u, hidden.dtype.element_ty, ROUND), mask=mask & (same == 0))
