"""Where a gradient is wanted that the kernels do not have, the backward pass says so instead of leaving it out."""

from __future__ import annotations

import pytest
import torch
from moe_problems import problem

from tests.hf_moe import model
from workbench_kernels import Intervene, fused_moe
from workbench_kernels.hf import register_with_transformers
from workbench_kernels.moe.plan import NEEDS

REFUSAL = r"got 'triton'\. Use moe_impl='grouped_mm' or 'sorted'"
FLOATING = {
    "router_bias": (4,), "expert_scale": (4,), "expert_add": (4, 12), "forced_weights": (2, 2),
    "replace_rows": (2, 2, 12),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATING)
def test_every_intervention_that_learns_is_refused(name: str) -> None:
    given = {name: torch.ones(FLOATING[name], requires_grad=True)}
    if name == "replace_rows":
        given["replace_experts"] = torch.tensor([True, False, True, False])
    y, _ = fused_moe(*problem(2, 12, 6, 4, 2).args, impl="triton", intervene=Intervene(**given))
    with pytest.raises(RuntimeError, match=REFUSAL):
        y.sum().backward()


def test_everything_that_the_routing_records_refuses_as_well() -> None:
    p = problem(2, 12, 6, 4, 2)
    p.router.requires_grad_()
    _, routing = fused_moe(*p.args, impl="triton", need=NEEDS)
    for name in ("router_logits", "routing_weights", *NEEDS):
        with pytest.raises(RuntimeError, match=REFUSAL):
            getattr(routing, name).sum().backward()
    assert not routing.expert_ids.requires_grad
    assert not routing.expert_load.requires_grad
    with torch.no_grad():
        y, routing = fused_moe(*p.args, impl="triton", need=NEEDS)
    assert not any(tensor.requires_grad for tensor in (y, routing.router_logits, routing.expert_out))


def test_a_router_of_transformers_that_learns_is_refused() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    register_with_transformers()
    built = model(torch.float32).requires_grad_(False)
    built.set_experts_implementation("workbench_triton")
    layer = built.model.layers[0].mlp
    layer.gate.weight.requires_grad_()
    out = layer(torch.ones(1, 1, 64))
    with pytest.raises(RuntimeError, match=REFUSAL):
        out.sum().backward()
