"""What a kernel does with a finished product, whichever way it was computed: the parts that all paths share."""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def weighted(out, weight, dtype: tl.constexpr, ROUND: tl.constexpr):
    """One slot's share of the mixture in float32; ROUND rounds it to `dtype`, as transformers does."""
    product = out.to(tl.float32) * weight
    if ROUND:
        product = product.to(dtype).to(tl.float32)
    return product


@triton.jit
def selected(mask, expert, token, real, expert_mask, token_mask):
    """`mask` where the selection, if there is one, has this expert and these tokens; `real` guards the tokens' load."""
    if expert_mask is not None:
        mask = mask & (tl.load(expert_mask + expert) != 0)
    if token_mask is not None:
        mask = mask & (tl.load(token_mask + token, mask=real, other=0) != 0)
    return mask


@triton.jit
def show(kept, cell, values, shown, mask):
    """Store `values` where they are `shown` and zeros elsewhere, if anybody keeps them."""
    if kept is not None:
        tl.store(kept + cell, tl.where(shown, values, 0.0).to(kept.dtype.element_ty), mask=mask)
