"""Router kernels: logits split over d_model, then everything that happens to one token's row of logits.

Sums over splits run in a fixed order, so the same input gives the same bits. Several tokens share a program and one
token never shares a value with another, so NaN stays in its row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def router_partial_kernel(
    x, weight, partial, T, D, E, x_stride,
    BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """partial[s, t, e] float32: the share of the logit that columns s·SPAN to (s+1)·SPAN contribute."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    split = tl.program_id(1)
    e = tl.arange(0, BE)
    same: tl.constexpr = x.dtype.element_ty == weight.dtype.element_ty
    dtype: tl.constexpr = x.dtype.element_ty if same else tl.float32
    rows = x + t.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BT, BE), tl.float32)
    for k0 in range(0, SPAN, BK):
        col = split * SPAN + k0 + tl.arange(0, BK)
        a = tl.load(rows + col[None, :], mask=(t < T)[:, None] & (col < D)[None, :], other=0.0)
        b = tl.load(weight + e[:, None] * D + col[None, :], mask=(e < E)[:, None] & (col < D)[None, :], other=0.0)
        total = tl.dot(a.to(dtype), tl.trans(b.to(dtype)), total, input_precision="ieee")
    out = (split * T + t.to(tl.int64))[:, None] * E + e[None, :]
    tl.store(partial + out, total, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def choose_kernel(
    source, bias, keep, forced_ids, forced_weights, logits, probs, margin, ids, weights, load, T, E, bias_stride,
    keep_stride,
    SPLITS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    FULL: tl.constexpr, FROM_PROBS: tl.constexpr, NORM: tl.constexpr, ROUND_TO: tl.constexpr,
):  # fmt: skip
    """Logits -> probabilities -> K experts and their weights; steps 1 to 5 of plan.py.

    source: partial logits [SPLITS, T, E], or with FROM_PROBS the probabilities [T, E]. Every pointer of the first two
    rows except source, ids and weights may be None. `load` is only for a launch of one program. Logits and weights are
    rounded to ROUND_TO, which is float32 where nothing is rounded.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    e = tl.arange(0, BE)
    slot = tl.arange(0, BK)
    real = (t < T)[:, None] & (e < E)[None, :]
    cell = t64[:, None] * E + e[None, :]
    allowed = (e < E)[None, :] & (t >= 0)[:, None]
    if keep is not None:
        allowed = allowed & (tl.load(keep + t64[:, None] * keep_stride + e[None, :], mask=real, other=1) != 0)
    if FROM_PROBS:
        z = tl.zeros((BT, BE), tl.float32)
        p = tl.load(source + cell, mask=real, other=0.0)
    else:
        z = tl.zeros((BT, BE), tl.float32)
        for split in tl.static_range(SPLITS):
            z += tl.load(source + (split * T + t64)[:, None] * E + e[None, :], mask=real, other=0.0)
        z = z.to(ROUND_TO).to(tl.float32)
        if logits is not None:
            tl.store(logits + cell, z, mask=real)
        if bias is not None:
            z += tl.load(bias + t64[:, None] * bias_stride + e[None, :], mask=real, other=0.0).to(tl.float32)
        z = tl.where(allowed, z, float("-inf"))
        p = tl.exp(z - tl.max(z, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        p = tl.where(tl.sum((p != p).to(tl.int32), 1)[:, None] > 0, float("nan"), p)  # one NaN logit spoils its row
        if probs is not None:
            tl.store(probs + cell, p, mask=real)

    rank = tl.where(p != p, 2.0, p)  # a row of NaN is one tie: its lowest ids, each once
    rank = tl.where(allowed, rank, -1.0)
    chosen = tl.zeros((BT, BK), tl.int32)
    w = tl.zeros((BT, BK), tl.float32)
    last = tl.zeros((BT,), tl.float32)
    for j in range(K):  # each takes what the one before left: unrolling would only make more code of it
        _, best = tl.max(rank, 1, return_indices=True, return_indices_tie_break_left=True)
        rank = tl.where(e[None, :] == best[:, None], -2.0, rank)
        if margin is not None:
            last = tl.sum(tl.where(e[None, :] == best[:, None], z, 0.0), 1)
        if forced_ids is not None:
            best = tl.load(forced_ids + t64 * K + j, mask=t < T, other=0).to(tl.int32)
        v = tl.sum(tl.where(e[None, :] == best[:, None], p, 0.0), 1)
        w = tl.where(slot[None, :] == j, v[:, None], w)
        chosen = tl.where(slot[None, :] == j, best[:, None], chosen)
    if margin is not None:  # FULL: nobody is left out
        _, best = tl.max(rank, 1, return_indices=True, return_indices_tie_break_left=True)
        following = tl.sum(tl.where(e[None, :] == best[:, None], z, 0.0), 1)
        tl.store(margin + t, float("nan") + last if FULL else last - following, mask=t < T)
    if NORM:
        total = tl.sum(w, 1)
        w = w / tl.where(total == 0, 1.0, total)[:, None]
    cell = t64[:, None] * K + slot[None, :]
    real = (t < T)[:, None] & (slot < K)[None, :]
    w = w.to(ROUND_TO).to(tl.float32)
    if forced_weights is not None:
        w = tl.load(forced_weights + cell, mask=real, other=0.0).to(tl.float32)
    if forced_ids is not None:  # on a device nobody checked them: an id that does not exist gives a row of NaN
        exists = (chosen >= 0) & (chosen < E)
        w = tl.where(exists, w, float("nan"))
        chosen = tl.where(exists, chosen, 0)
    tl.store(ids + cell, chosen.to(tl.int64), mask=real)
    tl.store(weights + cell, w, mask=real)
    if load is not None:
        taken = tl.zeros((BE,), tl.int32)
        for j in range(K):
            expert = tl.sum(tl.where(slot[None, :] == j, chosen, 0), 1)
            taken += tl.sum(((e[None, :] == expert[:, None]) & (t < T)[:, None]).to(tl.int32), 0)
        tl.store(load + e, taken.to(tl.float32) / (T * K), mask=e < E)
