"""The readable oracle: one layer in plain torch, at any precision, with every need and every intervention.

`dtype=torch.float64` makes it the yardstick for the kernels. Each line is one step of plan.py's list, so that reading
the two side by side is the proof.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.moe.plan import ROUTED, Intervene, Need, Routing
from workbench_kernels.quant import QuantizedExperts


def reference_moe(
    x: Tensor,  # [T, D]
    router_weight: Tensor,  # [E, D]
    gate_up: Tensor | QuantizedExperts,  # [E, 2F, D]
    down: Tensor | QuantizedExperts,  # [E, D, F]
    k: int,
    *,
    norm_topk_prob: bool = True,
    need: Need | tuple[str, ...] | None = None,
    intervene: Intervene | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Routing]:
    """y [T, D] and the routing, all floating results in `dtype`. Differentiable; rounds nowhere but in `dtype`."""
    need, change = Need.of(need), intervene or Intervene()
    x, router_weight = x.to(dtype), router_weight.to(dtype)
    n_experts = router_weight.shape[0]

    logits = x @ router_weight.T  # [T, E]
    ranked = _changed_logits(logits, change)  # [T, E]
    probs = ranked.softmax(-1)  # [T, E]
    order = _order(probs, change.keep_mask)  # [T, E] expert ids by descending probability
    ids = order[:, :k] if change.forced_ids is None else change.forced_ids.long()  # [T, K]
    weights = _weights(probs, ids, norm_topk_prob, change.forced_weights)  # [T, K]

    gate, up, hidden, out = _experts(x, ids, gate_up, down)  # [T, K, F] three times, [T, K, D]
    out = _changed_outputs(out, ids, change)  # [T, K, D]
    y = (out * weights.unsqueeze(-1)).sum(1)  # [T, D]

    routing = Routing(
        logits, ids, weights, _load(ids, n_experts, dtype), impl="reference",
        router_probs=probs if "router_probs" in need.names else None,
        margin=_margin(ranked, order, k) if "margin" in need.names else None,
    )  # fmt: skip
    asked = dict(zip(ROUTED, (gate, up, hidden, out), strict=True))
    found: dict[str, Any] = {
        name: _selected(slots, ids, need, n_experts) for name, slots in asked.items() if name in need.names
    }
    return y, replace(routing, **found)


def _changed_logits(logits: Tensor, change: Intervene) -> Tensor:
    if change.router_bias is not None:
        logits = logits + change.router_bias.to(logits.dtype)
    if change.keep_mask is not None:
        logits = logits.masked_fill(~change.keep_mask, -torch.inf)
    return logits


def _order(probs: Tensor, keep_mask: Tensor | None) -> Tensor:
    """Experts by descending probability, the lowest id among equals; a row of NaN is one tie, masked experts last."""
    rank = probs.nan_to_num(nan=2.0)
    if keep_mask is not None:
        rank = rank.masked_fill(~keep_mask, -1.0)
    return rank.sort(dim=-1, descending=True, stable=True).indices


def _weights(probs: Tensor, ids: Tensor, normalise: bool, forced: Tensor | None) -> Tensor:
    if forced is not None:
        return forced.to(probs.dtype)
    weights = probs.gather(-1, ids)
    if not normalise:
        return weights
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def _experts(
    x: Tensor, ids: Tensor, gate_up: Tensor | QuantizedExperts, down: Tensor | QuantizedExperts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate, up, hidden and output of every slot, expert by expert; scattered into place so that gradients flow."""
    shape, d_expert = ids.shape, gate_up.shape[1] // 2
    slots = {
        name: x.new_zeros(*shape, width) for name, width in zip("guho", [d_expert] * 3 + [x.shape[1]], strict=True)
    }
    for expert in range(gate_up.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up = (x[token] @ _matrix(gate_up, expert, x.dtype).T).chunk(2, -1)  # [N, F] each
        hidden = F.silu(gate) * up
        out = hidden @ _matrix(down, expert, x.dtype).T  # [N, D]
        for name, rows in zip("guho", (gate, up, hidden, out), strict=True):
            slots[name] = slots[name].index_put((token, slot), rows)
    return slots["g"], slots["u"], slots["h"], slots["o"]


def _matrix(weight: Tensor | QuantizedExperts, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, QuantizedExperts):
        return weight.dequantize(expert, dtype)
    return weight[expert].to(dtype)


def _changed_outputs(out: Tensor, ids: Tensor, change: Intervene) -> Tensor:
    if change.expert_scale is not None:
        scale = change.expert_scale.to(out.dtype)[ids].unsqueeze(-1)  # [T, K, 1]
        out = torch.where(scale == 0, 0.0, out * scale)  # an ablated expert leaves nothing behind, not even a NaN
    if change.expert_add is not None:
        out = out + change.expert_add.to(out.dtype)[ids]
    if change.replace_experts is not None and change.replace_rows is not None:
        out = torch.where(change.replace_experts[ids].unsqueeze(-1), change.replace_rows.to(out.dtype), out)
    return out


def _load(ids: Tensor, n_experts: int, dtype: torch.dtype) -> Tensor:
    return torch.bincount(ids.flatten(), minlength=n_experts).to(dtype) / max(ids.numel(), 1)


def _margin(ranked: Tensor, order: Tensor, k: int) -> Tensor:
    if k == ranked.shape[1]:
        return ranked.new_full(ranked.shape[:1], torch.nan)
    last, first_left_out = ranked.gather(-1, order[:, k - 1 : k + 1]).unbind(-1)
    return last - first_left_out


def _selected(slots: Tensor, ids: Tensor, need: Need, n_experts: int) -> Tensor:
    experts, tokens = need.expert_mask(n_experts, ids.device), need.token_mask(ids.shape[0], ids.device)
    if experts is not None:
        slots = torch.where(experts[ids].unsqueeze(-1), slots, 0.0)
    if tokens is not None:
        slots = torch.where(tokens[:, None, None], slots, 0.0)
    return slots
