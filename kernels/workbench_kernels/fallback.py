"""The layer without Triton: the same arguments, the same record, in torch on any device and with gradients.

Legend: T tokens, D d_model, F d_expert, E experts, K slots per token. The steps are those of moe/plan.py.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.experts import Tap, Weight, routed_experts
from workbench_kernels.moe.plan import ROUTED, Intervene, Need, Routing, hf_router_dtype
from workbench_kernels.quant import QuantizedExperts

_LANES = 16  # float32 values in the widest vector register
_FEW = 1024  # probabilities that are sorted sooner than selected from


def fallback_moe(
    x: Tensor,  # [T, D]
    router_weight: Tensor,  # [E, D]
    gate_up: Weight,  # [E, 2F, D], gate rows first
    down: Weight,  # [E, D, F]
    k: int,
    *,
    norm_topk_prob: bool = True,
    need: Need | None = None,
    intervene: Intervene | None = None,
    impl: str = "sorted",
    numerics: str = "trained",
) -> tuple[Tensor, Routing]:
    """y [T, D] and the Routing, by `sorted`, `grouped_mm` or `reference`; what `fused_moe` calls for these three.

    Arguments are taken as checked. numerics "hf" rounds where transformers does: logits and weights to the dtype of the
    router's weight, forced weights nowhere, products to the wider dtype of weights and outputs. A float64 layer is
    float64 throughout. What was not asked for is neither kept nor computed.
    """
    need, change = need or Need(), intervene or Intervene()
    if impl != "grouped_mm" and (isinstance(gate_up, QuantizedExperts) or isinstance(down, QuantizedExperts)):
        _say_dequantised(impl)
    wide = torch.promote_types(x.dtype, torch.float32)
    routed_in = hf_router_dtype(x, router_weight) if numerics == "hf" else wide
    logits = router_logits(x.to(routed_in), router_weight.to(routed_in), numerics).to(wide)  # [T, E]
    ranked = _changed_logits(logits, change)  # [T, E]
    probs = ranked.softmax(-1)  # [T, E]
    ids, margin = top_k(probs, ranked, k, change.keep_mask, "margin" in need.names)  # [T, K], [T]
    if change.forced_ids is not None:
        ids = change.forced_ids.long()
    weights = _weights(probs, ids, norm_topk_prob, change.forced_weights)  # [T, K]
    if numerics == "hf":
        own = routed_in if change.forced_weights is None else change.forced_weights.dtype
        weights = weights.to(wide if own == torch.float64 else own)

    found: dict[str, Tensor] = {}
    taps = {name: _Take(name, found, ids, need, router_weight.shape[0]) for name in ROUTED if name in need.names}
    outputs = output_tap(ids, change, taps.pop("expert_out", None))
    y = routed_experts(x, ids, weights, gate_up, down, impl=impl, taps={**taps, **outputs}, numerics=numerics)
    return y, Routing(
        logits, ids, weights.to(wide), expert_load(ids, router_weight.shape[0]), impl=impl, path=None,
        router_probs=probs if "router_probs" in need.names else None, margin=margin, **found,
    )  # fmt: skip


def router_logits(x: Tensor, router_weight: Tensor, numerics: str = "trained") -> Tensor:  # [... D], [E, D] -> [... E]
    """x · router_weightᵀ, such that on CPU experts with the same router row get the same bits: an exact tie.

    A CPU's matrix product sums the columns that fill no vector register in another order than the rest, so E is padded
    to whole registers, which for most models it is anyway. Not with numerics "hf", which wants transformers' bits.
    cuBLAS promises nothing of the kind, and was not looked at; the triton kernels sum every column in one order.
    """
    lacking = -router_weight.shape[0] % _LANES
    if x.device.type != "cpu" or numerics == "hf" or not lacking:
        return F.linear(x, router_weight)
    return F.linear(x, F.pad(router_weight, (0, 0, 0, lacking)))[..., : router_weight.shape[0]].contiguous()


def top_k(
    probs: Tensor, ranked: Tensor, k: int, keep_mask: Tensor | None = None, want_margin: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The K most probable experts [T, K], the lowest id among equals; and the margin [T] between ranks K and K+1.

    On CPU the fast selection stands only where it is strictly ordered, since it promises no order among equals; for a
    few probabilities sorting all of them costs less than looking.
    """
    n_kept = min(k + 1, probs.shape[-1])
    if probs.device.type == "cpu" and keep_mask is None and probs.numel() > _FEW:
        values, order = probs.topk(n_kept, dim=-1)
        if not (values[..., :-1] > values[..., 1:]).all():  # ties, or NaN
            order = _stable_order(probs, None)
    else:
        order = _stable_order(probs, keep_mask)
    margin = _margin(ranked, order, k) if want_margin else None
    return order[..., :k], margin


def expert_load(ids: Tensor, n_experts: int) -> Tensor:  # [T, K] -> float32 [E]
    """Share of the slots that each expert takes; zeros without slots."""
    if ids.device.type == "cpu":
        return torch.bincount(ids.flatten(), minlength=n_experts).float() / max(ids.numel(), 1)
    return count_slots(ids, n_experts).float() / max(ids.numel(), 1)


def count_slots(ids: Tensor, n_experts: int, counted: Tensor | None = None) -> Tensor:  # [... K] -> int64 [E]
    """How many slots each expert takes, of the tokens where `counted` [...] holds; without a wait for a device."""
    slots = torch.ones_like(ids) if counted is None else counted.unsqueeze(-1).expand_as(ids).to(ids.dtype)
    return ids.new_zeros(n_experts).scatter_add_(0, ids.flatten(), slots.flatten())


def _stable_order(probs: Tensor, keep_mask: Tensor | None) -> Tensor:
    if keep_mask is not None:
        probs = probs.masked_fill(~keep_mask, -1.0)  # behind experts whose probability underflows to 0
    return probs.sort(dim=-1, descending=True, stable=True).indices  # NaN comes first; a row of it is one tie


def _margin(ranked: Tensor, order: Tensor, k: int) -> Tensor:
    if k == ranked.shape[-1]:
        return ranked.new_full(ranked.shape[:-1], torch.nan)
    last, first_left_out = ranked.gather(-1, order[..., k - 1 : k + 1]).unbind(-1)
    return last - first_left_out


def _changed_logits(logits: Tensor, change: Intervene) -> Tensor:
    if change.router_bias is not None:
        logits = logits + change.router_bias.to(logits.dtype)
    if change.keep_mask is not None:
        logits = logits.masked_fill(~change.keep_mask, -torch.inf)
    return logits


def _weights(probs: Tensor, ids: Tensor, normalise: bool, forced: Tensor | None) -> Tensor:
    if forced is not None:
        return forced.to(probs.dtype)
    weights = probs.gather(-1, ids)
    if not normalise:
        return weights
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)  # 0 / 0 is 0 here


class _Take:
    """A tap that keeps what it sees under its name, zeros where the need leaves slots out."""

    def __init__(self, name: str, found: dict[str, Tensor], ids: Tensor, need: Need, n_experts: int) -> None:
        self.name, self.found = name, found
        experts, tokens = need.expert_mask(n_experts, ids.device), need.token_mask(ids.shape[0], ids.device)
        self.hidden = None  # [T, K, 1]: the slots that are left out
        if experts is not None:
            self.hidden = ~experts[ids].unsqueeze(-1)
        if tokens is not None:
            unseen = ~tokens[:, None, None].expand(*ids.shape, 1)
            self.hidden = unseen if self.hidden is None else self.hidden | unseen

    def __call__(self, slots: Tensor) -> Tensor:  # [T, K, ...]
        self.found[self.name] = slots if self.hidden is None else slots.masked_fill(self.hidden, 0.0)
        return slots


def output_tap(ids: Tensor, change: Intervene, take: Tap | None) -> dict[str, Tap]:
    """The tap at expert_out: interventions first, in float32 at least, then what is asked for. Absent if idle."""
    fields = ("expert_scale", "expert_add", "replace_experts")
    if take is None and not any(getattr(change, field) is not None for field in fields):
        return {}

    def tap(out: Tensor) -> Tensor:  # [T, K, D]
        changed = _changed_outputs(out, ids, change)
        return changed if take is None else take(changed)

    return {"expert_out": tap}


def _changed_outputs(out: Tensor, ids: Tensor, change: Intervene) -> Tensor:
    wide = torch.promote_types(out.dtype, torch.float32)
    new = out
    if change.expert_scale is not None:
        scale = change.expert_scale.to(wide)[ids].unsqueeze(-1)  # [T, K, 1]
        new = (new * scale).masked_fill(scale == 0, 0.0)  # an ablated expert leaves nothing, not even a NaN
    if change.expert_add is not None:
        new = new + change.expert_add.to(wide)[ids]
    if change.replace_experts is not None and change.replace_rows is not None:
        new = torch.where(change.replace_experts[ids].unsqueeze(-1), change.replace_rows.to(new.dtype), new)
    return new.to(out.dtype)


def _say_dequantised(impl: str) -> None:
    """A fallback has no product on stored integers; python shows one warning per place, not one per call."""
    when = "each expert that is hit, in every call" if impl == "sorted" else "all experts, in every call"
    warnings.warn(
        f"int8 or int4 experts with moe_impl {impl!r}: dequantises {when}. The triton kernels read them as they are.",
        stacklevel=4,
    )
