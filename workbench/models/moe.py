"""The mixture of experts of one layer, every step of it a hook point.

Router numerics. `router_dtype="float32"` (default) computes logits, softmax and weights in float32, as the models were
trained, and resolves exact ties to the lowest expert id. `router_dtype="model"` computes logits in the model's dtype
and rounds the weights to it, which is what transformers does, and takes torch.topk's choice among ties. In bfloat16
the latter makes exact ties between the k-th and (k+1)-th logit common (5.8% of token-layers in a simulation with 128
experts and k=8), so that which expert runs may depend on the device; in float32 they practically do not occur.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import Qwen3MoeConfig
from workbench.errors import HookError, InterventionError
from workbench.hooks import HookPoint
from workbench.interventions.buffers import at_tokens
from workbench.models.layers import wide
from workbench.models.moe_weights import QuantizedWeight, expert_weight
from workbench_kernels import Intervene, Need, matrices_kept, routed_experts
from workbench_kernels.fallback import count_slots, output_tap, router_logits, top_k
from workbench_kernels.moe.api import NO_GRADIENT, plan_layer, without_gradient

if TYPE_CHECKING:
    from workbench.interventions.kernel_plan import LayerPlan

ROUTER_DTYPES = ("float32", "model")
FUSED_POINTS = (
    "router_logits", "router_probs", "expert_ids", "routing_weights",
    "expert_pre", "expert_pre_linear", "expert_post", "expert_out",
)  # fmt: skip


UNCHANGED = Intervene()


class Moe(nn.Module):
    """Router and experts: each token's output is the weighted sum of its k experts' outputs."""

    def __init__(self, cfg: Qwen3MoeConfig, moe_impl: str, router_dtype: str) -> None:
        super().__init__()
        self.cfg, self.moe_impl, self.router_dtype = cfg, moe_impl, router_dtype
        self.path = "auto"  # of the Triton kernels, see Qwen3Moe.moe_path
        self.rows_per_expert: int | None = None  # see workbench.models.blocks
        self.router = Router(cfg)
        # gate rows first; both give way to a QuantizedWeight in a model with int8 or int4 experts
        self.gate_up: Tensor | QuantizedWeight = nn.Parameter(torch.empty(cfg.n_experts, 2 * cfg.d_expert, cfg.d_model))
        self.down: Tensor | QuantizedWeight = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model, cfg.d_expert))
        self.plan: LayerPlan | None = None  # of the interventions that are attached
        self.kernel_buffers: Intervene | None = None  # of KernelBuffers
        router = "wide" if router_dtype == "float32" else "model"
        self.hook_router_logits = HookPoint("batch pos expert", router)  # before top-k: editing it re-routes
        self.hook_router_probs = HookPoint("batch pos expert", "wide")  # softmax over all experts
        self.hook_expert_ids = HookPoint("batch pos k", "int64")  # by descending weight; editing it forces experts
        self.hook_routing_weights = HookPoint("batch pos k", router)  # editing it changes the mix, not the experts
        slots = "routed activations put in slot order; batch·pos·k·{} values"
        self.hook_expert_load = HookPoint("expert", "float32", read_only=True)  # counted only while listened to
        self.hook_expert_pre = HookPoint("batch pos k d_expert", cost=slots.format("d_expert"))
        self.hook_expert_pre_linear = HookPoint("batch pos k d_expert", cost=slots.format("d_expert"))
        self.hook_expert_post = HookPoint("batch pos k d_expert", cost=slots.format("d_expert"))
        self.hook_expert_out = HookPoint("batch pos k d_model", cost=slots.format("d_model"))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:  # [batch pos d_model]
        change = self._change(x.shape[:2])
        if self.moe_impl == "triton":
            return self._fused(x, valid, change)
        logits = self.hook_router_logits(self._logits(x))  # [batch pos expert]
        probs = self.hook_router_probs(wide(self._changed(logits, change)).softmax(-1))  # [batch pos expert]
        ids = self._forced(self._top_k(probs, change))  # [batch pos k]
        weights = self.hook_routing_weights(self._weights(probs, ids, logits.dtype, change))  # [batch pos k]
        if self.hook_expert_load.listened:
            self.hook_expert_load(expert_load(ids, valid, self.cfg.n_experts))  # [expert]
        out = routed_experts(
            x.flatten(0, 1), ids.flatten(0, 1), weights.flatten(0, 1),
            expert_weight(self.gate_up), expert_weight(self.down),
            impl=self.moe_impl, taps=self._taps(x.shape[:2], ids.flatten(0, 1), change),
            numerics="trained" if self.router_dtype == "float32" else "hf",
            rows_per_expert=self.rows_per_expert,
        )  # fmt: skip
        return out.view_as(x)

    def _change(self, batch_pos: torch.Size) -> Intervene:
        if self.kernel_buffers is None:
            return UNCHANGED if self.plan is None else self.plan.settle(batch_pos)
        if self.plan is not None:
            kinds = ", ".join(dict.fromkeys(edit.item.kind for edit in self.plan.edits))
            raise InterventionError(f"KernelBuffers: expected no other intervention on these experts, got {kinds}.")
        return at_tokens(self.kernel_buffers, batch_pos)

    def _fused(self, x: Tensor, valid: Tensor | None, change: Intervene) -> Tensor:  # [batch pos d_model]
        """The same steps in Triton kernels: each hook point lies where one ends anyway, and the rest stays fused."""
        from workbench_kernels.moe import stages  # needs triton

        taps = self._fused_taps(x.shape[:2])
        numerics = "trained" if self.router_dtype == "float32" else "hf"
        weights = self.router.weight, expert_weight(self.gate_up), expert_weight(self.down)
        layer = plan_layer(
            x.flatten(0, 1), *weights, self.cfg.k, self.cfg.norm_topk_prob, Need(), change, self.path, numerics
        )
        routed = stages.route(layer, taps)
        routed, tiles = stages.order(layer, routed)
        if self.hook_expert_load.listened:
            ids = routed.ids.unflatten(0, x.shape[:2])  # [batch pos k]
            load = routed.load if valid is None else None  # the kernels count padding too
            self.hook_expert_load(expert_load(ids, valid, self.cfg.n_experts) if load is None else load)  # [expert]
        out, _ = stages.experts(layer, routed, tiles, taps)
        return without_gradient(out, x, *weights, error=HookError).view_as(x)

    def _fused_taps(self, batch_pos: torch.Size) -> dict[str, Tap]:
        points = {name: getattr(self, f"hook_{name}") for name in FUSED_POINTS}
        router = torch.float32 if self.router_dtype == "float32" else self.router.weight.dtype
        dtypes = {"router_logits": router, "router_probs": torch.float32, "routing_weights": router}
        for point in points.values():
            if point.bwd_hooks or point._backward_hooks or point._backward_pre_hooks:
                raise HookError(f"backward hook at {point.name}: {NO_GRADIENT}")
        shown: dict[str, Tap] = {
            name: FusedTap(point, batch_pos, dtypes.get(name)) for name, point in points.items() if point.listened
        }
        if "expert_ids" in shown:
            shown["expert_ids"] = FusedTap(self._forced, batch_pos)
        return shown

    def _logits(self, x: Tensor) -> Tensor:
        if self.router_dtype == "model":
            return F.linear(x, self.router.weight)
        return router_logits(wide(x), wide(self.router.weight))

    def _changed(self, logits: Tensor, change: Intervene) -> Tensor:  # [batch pos expert]
        if change.router_bias is not None:
            logits = logits + _per_token(change.router_bias, logits).to(logits.dtype)
        if change.keep_mask is not None:
            logits = logits.masked_fill(~_per_token(change.keep_mask, logits), -torch.inf)
        return logits

    def _top_k(self, probs: Tensor, change: Intervene) -> Tensor:
        if change.forced_ids is not None:
            return change.forced_ids.view(*probs.shape[:2], -1)
        keep = None if change.keep_mask is None else _per_token(change.keep_mask, probs).expand_as(probs)
        if self.router_dtype == "model":
            ranked = probs if keep is None else probs.masked_fill(~keep, -1)  # behind what underflows to 0
            return ranked.topk(self.cfg.k, dim=-1).indices
        return top_k(probs, probs, self.cfg.k, keep)[0]  # the lowest id first among equals

    def _weights(self, probs: Tensor, ids: Tensor, dtype: torch.dtype, change: Intervene) -> Tensor:
        if change.forced_weights is not None:
            return change.forced_weights.view(ids.shape).to(dtype)
        weights = probs.gather(-1, ids)
        if self.cfg.norm_topk_prob:
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total == 0, 1.0, total)  # forced experts may all have probability 0
        return weights.to(dtype)

    def _forced(self, ids: Tensor) -> Tensor:
        """The ids after their hooks, checked, since they index weights.

        On a GPU ids that a hook merely saw are not: the check would wait for the device in every layer.
        """
        forced = self.hook_expert_ids(ids)
        n_experts = self.cfg.n_experts
        checked = forced is not ids or (self.hook_expert_ids.may_change and ids.device.type == "cpu")
        if checked and not 0 <= int(forced.min()) <= int(forced.max()) < n_experts:
            raise HookError(
                f"hook at {self.hook_expert_ids.name}: expected ids from 0 to {n_experts - 1}, "
                f"got {int(forced.min())} to {int(forced.max())}. Return experts that exist."
            )
        return forced

    def _taps(self, batch_pos: torch.Size, ids: Tensor, change: Intervene) -> dict[str, Any]:
        points = (self.hook_expert_pre, self.hook_expert_pre_linear, self.hook_expert_post, self.hook_expert_out)
        names = ("expert_pre", "expert_pre_linear", "expert_post", "expert_out")
        shown = {name: Tap(point, batch_pos) for name, point in zip(names, points, strict=True) if point.listened}
        return shown if change is UNCHANGED else shown | output_tap(ids, change, shown.get("expert_out"))


def experts_at_hand(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, `sorted` finds the matrices of a decode step's experts without looking each one up."""
    layers = [module for module in model.modules() if isinstance(module, Moe) and module.moe_impl == "sorted"]
    return matrices_kept(expert_weight(weight) for layer in layers for weight in (layer.gate_up, layer.down))


def _per_token(argument: Tensor, like: Tensor) -> Tensor:
    """[expert], or [token expert] as [batch pos expert]."""
    return argument if argument.ndim == 1 else argument.view(like.shape)


class Router(nn.Module):
    """The router's weight [expert d_model]."""

    def __init__(self, cfg: Qwen3MoeConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model))


class Tap:
    """Shows a hook point what has one row per token [token ...] as [batch pos ...]."""

    def __init__(self, point: Callable[[Tensor], Tensor], batch_pos: torch.Size, dtype: torch.dtype | None = None):
        self.point, self.batch_pos, self.dtype = point, batch_pos, dtype  # dtype: what the point documents

    def __call__(self, rows: Tensor) -> Tensor:
        return self.point(rows.unflatten(0, self.batch_pos).to(self.dtype or rows.dtype)).flatten(0, 1)


class FusedTap(Tap):
    """A tap at a kernel's boundary, where no gradient passes."""

    def __call__(self, rows: Tensor) -> Tensor:
        new = super().__call__(rows)
        if new.requires_grad:
            raise HookError(f"hook inside the experts: expected a tensor without a gradient. {NO_GRADIENT}")
        return new


def expert_load(ids: Tensor, valid: Tensor | None, n_experts: int) -> Tensor:  # [batch pos k] -> float32 [expert]
    """Share of the token-slots that each expert takes, padding left out; sums to 1."""
    counts = count_slots(ids, n_experts, valid)
    return counts.float() / counts.sum().clamp_min(1)
