"""`fused_moe`: one mixture-of-experts layer in one call, with its routing, what was asked for, and interventions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench_kernels.moe.blocks import Blocks, blocks_for, choose_path
from workbench_kernels.moe.checks import Weight, check_intervene, check_layer
from workbench_kernels.moe.choice import choose_implementation, interpreting
from workbench_kernels.moe.plan import NEEDS, Intervene, Need, Routing
from workbench_kernels.quant import QuantizedExperts


def fused_moe(
    x: Tensor,  # [T, d_model]
    router_weight: Tensor,  # [E, d_model]
    gate_up: Weight,  # [E, 2·d_expert, d_model], gate rows first
    down: Weight,  # [E, d_model, d_expert]
    k: int,
    *,
    norm_topk_prob: bool = True,
    need: Need | tuple[str, ...] | None = None,
    intervene: Intervene | None = None,
    impl: str = "auto",
    path: str = "auto",
    numerics: str = "trained",
    _blocks: Blocks | None = None,
) -> tuple[Tensor, Routing]:
    """y [T, d_model] in x's dtype, and the Routing: where tokens went, what `need` asked for, which code ran.

    need: names, or a `Need` that restricts them to experts and tokens. intervene: an `Intervene`. Both leave the layer
    fused; plan.py says what happens in which order. x may be strided; gate_up and down may be QuantizedExperts.
    impl: triton, grouped_mm, sorted, reference, or auto: triton on CUDA from sm_80 on, else sorted; the Routing says
    which. path pins the Triton path (decode, skinny, tile) so that two runs use the same arithmetic whatever their T;
    auto decides by T, E and k alone. numerics: trained (float32 router and interior) or hf (rounds where transformers'
    grouped_mm rounds; ties still go to the lowest id).

    The Triton path has no gradients: a backward pass through y or any floating tensor of its Routing, to whatever
    argument or intervention asks for one, raises RuntimeError naming the implementations that have them. The same
    input gives the same bits, run after run. Raises ValueError for arguments that do not fit; values on a GPU are not
    looked at, and a forced id that does not exist there gives its token NaN.
    """
    need, change = Need.of(need), Intervene() if intervene is None else intervene
    check_layer(x, router_weight, gate_up, down, k, path, numerics)
    check_intervene(change, x.shape[0], router_weight.shape[0], k, x.shape[1], x)
    need = need.of_layer(router_weight.shape[0], x.shape[0], x.device)
    impl = choose_implementation(impl, x.device, x.dtype, gradients=False, weights=(gate_up, down))
    if impl != "triton":
        from workbench_kernels.fallback import fallback_moe

        if path != "auto":
            raise ValueError(f"path: expected auto with impl {impl!r}, got {path!r}. Paths are those of triton.")
        return fallback_moe(
            x, router_weight, gate_up, down, k,
            norm_topk_prob=norm_topk_prob, need=need, intervene=change, impl=impl, numerics=numerics,
        )  # fmt: skip
    layer = plan_layer(x, router_weight, gate_up, down, k, norm_topk_prob, need, change, path, numerics, _blocks)
    with torch.no_grad():
        y, routing = run_layer(layer)
    sources = x, router_weight, gate_up, down, *(getattr(change, name) for name in change.active)
    return without_gradient(y, *sources), _without_gradient(routing, *sources)


def plan_layer(
    x: Tensor, router_weight: Tensor, gate_up: Weight, down: Weight, k: int, norm_topk_prob: bool, need: Need,
    change: Intervene, path: str, numerics: str, blocks: Blocks | None = None,
) -> Any:  # fmt: skip
    """A stages.Layer with its path and block sizes settled. stages is imported here: it needs triton."""
    from workbench_kernels.moe.stages import Layer

    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.device.type == "cpu" and not interpreting():
        raise ValueError(f"x: expected a GPU tensor for 'triton', got {x.device}. Move it, or choose another impl.")
    for name, weight in (("gate_up", gate_up), ("down", down)):
        stored = (weight.values, weight.scales) if isinstance(weight, QuantizedExperts) else (weight,)
        for tensor in stored:
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous weight, got strides {tensor.stride()}. Copy it once.")
    path = choose_path(path, x.shape[0], router_weight.shape[0], k)
    blocks = blocks or blocks_for(path, x, gate_up, down, k)
    return Layer(
        x, router_weight.contiguous(), gate_up, down, k, norm_topk_prob, need, change, path, numerics == "hf", blocks
    )


def run_layer(layer: Any) -> tuple[Tensor, Routing]:
    """All stages without a tap."""
    from workbench_kernels.moe import stages

    routed, tiles = stages.order(layer, stages.route(layer))
    y, found = stages.experts(layer, routed, tiles)
    return y, _routing(layer, routed, found)


def _routing(layer: Any, routed: Any, found: dict[str, Tensor]) -> Routing:
    probs = routed.probs if "router_probs" in layer.need.names else None
    return Routing(
        routed.logits, routed.ids, routed.weights, routed.load, "triton", layer.path, probs, routed.margin, **found
    )


NO_GRADIENT = (
    "gradient through the experts: expected an implementation that has one, got 'triton'. "
    "Use moe_impl='grouped_mm' or 'sorted' (impl= in fused_moe)."
)


class _NoGradient(torch.autograd.Function):
    """The identity on a result that was computed without a graph; its backward pass says what to use instead."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, error: type[Exception], *inputs: Tensor) -> Tensor:
        ctx.error = error
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ctx.error(NO_GRADIENT)


def without_gradient(y: Tensor, *inputs: Any, error: type[Exception] = RuntimeError) -> Tensor:
    """y, such that a backward pass which would reach `inputs` raises `error` instead of passing them by."""
    tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _NoGradient.apply(y, error, *tensors)
    return y


def _without_gradient(routing: Routing, *inputs: Any) -> Routing:
    """The same for all that has a gradient elsewhere; ids and their counts have none anywhere."""
    names = ("router_logits", "routing_weights", *NEEDS)
    found = {name: getattr(routing, name) for name in names if getattr(routing, name) is not None}
    guarded: dict[str, Any] = {name: without_gradient(tensor, *inputs) for name, tensor in found.items()}
    return replace(routing, **guarded)
