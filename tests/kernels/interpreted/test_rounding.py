"""hf numerics to the bit, and the guards that only unusual values, widths and layouts reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_problems import BLOCKS, check, problem

from tests.hf_moe import model
from workbench_kernels import Intervene, Need, fused_moe
from workbench_kernels.hf import register_with_transformers
from workbench_kernels.moe import stages
from workbench_kernels.moe.api import plan_layer, run_layer
from workbench_kernels.moe.plan import PATHS

BF16 = torch.bfloat16
TWO = ("decode", "skinny")  # tile is skinny with the operands of its products exchanged


@pytest.mark.parametrize("path", TWO)
@torch.no_grad()
def test_hf_numerics_have_the_bits_of_transformers(path: str) -> None:
    """Without any one of its roundings at most 0.8 of the outputs (or none of the logits or weights) are the same."""
    pytest.importorskip("transformers", minversion="5.0")
    built = model(BF16, k=4)
    built.set_experts_implementation("grouped_mm")
    mlp, x = built.model.layers[0].mlp, torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    weights = mlp.experts.gate_up_proj.normal_(std=0.3), mlp.experts.down_proj.normal_(std=0.3)
    logits, routing_weights, ids = mlp.gate(x)
    y, routing = fused_moe(x, mlp.gate.weight, *weights, 4, impl="triton", path=path, numerics="hf", _blocks=BLOCKS)
    same = (routing.expert_ids == ids).all(-1)
    assert same.float().mean() > 0.7, "ties aside, the same experts"
    assert (routing.router_logits == logits).float().mean() > 0.97
    assert (routing.routing_weights == routing_weights)[same].float().mean() > 0.97
    assert (y == mlp(x[None])[0])[same].float().mean() > 0.97


@pytest.mark.parametrize("path", TWO)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@torch.no_grad()
def test_hf_weights_of_any_dtype_have_the_bits_of_transformers(path: str, dtype: torch.dtype) -> None:
    """Products with bfloat16 weights are rounded before they are added, those with float32 weights are not."""
    pytest.importorskip("transformers", minversion="5.0")
    built = model(BF16, k=4)
    built.set_experts_implementation("grouped_mm")
    experts, g = built.model.layers[0].mlp.experts, torch.Generator().manual_seed(0)
    x, ids = torch.randn(8, 64, generator=g).to(BF16), torch.rand(8, 8, generator=g).argsort(-1)[:, :4]
    stacked = experts.gate_up_proj.normal_(std=0.3), experts.down_proj.normal_(std=0.3)
    weights = torch.rand(8, 4, generator=g).to(dtype)
    change = Intervene(forced_ids=ids, forced_weights=weights)
    options = {"impl": "triton", "path": path, "numerics": "hf", "_blocks": BLOCKS}
    y, routing = fused_moe(x, torch.zeros(8, 64, dtype=BF16), *stacked, 4, intervene=change, **options)
    assert torch.equal(routing.routing_weights, weights.float())
    expected = experts(x, ids, weights)
    assert (y == expected).float().mean() > 0.97
    for implementation in ("grouped_mm", "sorted"):
        register_with_transformers()
        built.set_experts_implementation(f"workbench_{implementation}")
        assert torch.equal(experts(x, ids, weights), expected), implementation


@pytest.mark.parametrize("path", TWO)
@pytest.mark.parametrize(("dtype", "router"), [(BF16, torch.float32), (torch.float32, BF16), (BF16, torch.float64)])
def test_in_hf_numerics_the_router_computes_in_its_own_dtype(
    path: str, dtype: torch.dtype, router: torch.dtype
) -> None:
    """Its weight is not rounded to x's dtype first; outputs that are changed are mixed in a launch apart."""
    p = problem(16, 70, 36, 8, 2, dtype)
    args = p.x, (p.router.float() * 1.001).to(router), p.gate_up, p.down, p.k
    scale, options = Intervene(expert_scale=torch.full((8,), 1 / 3)), {"need": ("expert_out",), "numerics": "hf"}
    for change in (Intervene(), scale):
        y, got = fused_moe(*args, impl="triton", path=path, intervene=change, _blocks=BLOCKS, **options)
        theirs, expected = fused_moe(*args, impl="sorted", intervene=change, **options)
        assert torch.equal(got.expert_ids, expected.expert_ids)
        if router == BF16:
            assert (got.router_logits == expected.router_logits).float().mean() > 0.97
            assert (got.routing_weights == expected.routing_weights).float().mean() > 0.97
        torch.testing.assert_close(
            got.router_logits, expected.router_logits, atol=1e-6, rtol=1e-2 if router == BF16 else 1e-5
        )
        assert (got.expert_out == expected.expert_out).float().mean() > 0.97 or dtype == torch.float32
        weighted = got.expert_out.float() * got.routing_weights.unsqueeze(-1)
        assert torch.equal(y, weighted.sum(1).to(dtype)), "products are float32"
        torch.testing.assert_close(y, theirs)


@pytest.mark.parametrize("path", TWO)
def test_hf_outputs_are_rounded_before_they_are_changed(path: str) -> None:
    p, options = problem(6, 32, 16, 6, 2, BF16), {"need": ("expert_out",), "numerics": "hf"}
    change = Intervene(expert_scale=torch.full((6,), 1 / 3))
    _, got = fused_moe(*p.args, impl="triton", path=path, intervene=change, _blocks=BLOCKS, **options)
    _, expected = fused_moe(*p.args, impl="sorted", intervene=change, **options)
    assert (got.expert_out == expected.expert_out).float().mean() > 0.97


@pytest.mark.parametrize("path", TWO)
def test_a_float32_router_beside_bfloat16_experts_keeps_its_precision(path: str) -> None:
    p = problem(4, 70, 36, 8, 2, BF16)
    p = type(p)(p.x, p.router.float() * 1.001, p.gate_up, p.down, p.k)
    check(p, path, ("router_probs",))  # logits to 1e-5


def test_weights_that_sum_to_zero_stay_zero() -> None:
    p = problem(3, 24, 12, 6, 2)
    change = Intervene(keep_mask=torch.arange(6) > 1, forced_ids=torch.tensor([[0, 1], [2, 3], [1, 0]]))
    y, routing = fused_moe(*p.args, impl="triton", intervene=change)
    assert routing.routing_weights.sum(-1).round(decimals=4).tolist() == [0, 1, 0]
    assert y.any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("path", PATHS)
def test_a_forced_id_that_does_not_exist_gives_its_token_nan(path: str) -> None:
    """As on a GPU, where nobody looks at the values of ids."""
    p = problem(3, 24, 12, 6, 2)
    change = Intervene(forced_ids=torch.tensor([[0, 1], [2, 6], [-1, 0]]))
    y, routing = run_layer(plan_layer(*p.args, True, Need(), change, path, "trained", BLOCKS))
    assert y.isnan().all(-1).tolist() == [False, True, True]
    assert y[0].isfinite().all()
    assert ((routing.expert_ids >= 0) & (routing.expert_ids < 6)).all()


def test_tensor_descriptors_are_for_rows_of_whole_16_byte_units() -> None:
    whole = torch.empty(2, 4, 24, dtype=BF16)
    assert stages._describable(whole)
    assert not stages._describable(torch.empty(2, 4, 20, dtype=BF16))
    assert not stages._describable(whole.flatten()[4:100].view(1, 4, 24))
    tma = BLOCKS | {name: BLOCKS[name] | {"tma": True} for name in ("gate_up", "down")}
    check(problem(3, 37, 19, 6, 2, BF16), "skinny", blocks=tma)  # read through pointers


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_a_weight_that_is_not_contiguous_is_refused(name: str) -> None:
    p = problem(3, 24, 12, 6, 2)
    strided = getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2)
    weights = {"gate_up": p.gate_up, "down": p.down} | {name: strided}
    with pytest.raises(ValueError, match=f"{name}: expected a contiguous weight, got strides"):
        fused_moe(p.x, p.router, *weights.values(), p.k, impl="triton")


@pytest.mark.parametrize("part", ["values", "scales"])
def test_quantised_experts_that_are_not_contiguous_are_refused(part: str) -> None:
    p = problem(3, 128, 64, 6, 2, bits=4)
    strided = getattr(p.gate_up, part).transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="gate_up: expected a contiguous weight, got strides"):
        fused_moe(p.x, p.router, replace(p.gate_up, **{part: strided}), p.down, p.k, impl="triton")
