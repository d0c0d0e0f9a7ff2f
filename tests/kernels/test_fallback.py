"""The torch implementations of `fused_moe` against the oracle: every need, every intervention, ties, NaN, no tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench_kernels import IMPLEMENTATIONS, Intervene, Need, Routing, fused_moe, quantize
from workbench_kernels.fallback import router_logits, top_k
from workbench_kernels.moe.plan import NEEDS, ROUTED
from workbench_kernels.moe.reference import reference_moe

E, K, D, F = 6, 2, 24, 16
FIELDS = ("router_bias", "keep_mask", "expert_scale", "expert_add", "forced_ids", "forced_weights", "replace")


def layer(t: int, seed: int = 0, dtype: torch.dtype = torch.float32, d: int = D, f: int = F) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((t, d), (E, d), (E, 2 * f, d), (E, d, f))
    return [(torch.randn(shape, generator=g) * 0.4).to(dtype) for shape in shapes]


def intervention(fields: set[str], t: int, seed: int = 0, k: int = K) -> Intervene:
    g = torch.Generator().manual_seed(seed)
    keep = torch.ones(E, dtype=torch.bool)
    keep[torch.randperm(E, generator=g)[: E - k]] = False
    values = {
        "router_bias": torch.randn((t, E), generator=g),
        "keep_mask": keep,
        "expert_scale": torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0, 1.0]),
        "expert_add": torch.randn((E, D), generator=g),
        "forced_ids": torch.rand((t, E), generator=g).argsort(-1)[:, :k],
        "forced_weights": torch.rand((t, k), generator=g),
        "replace_experts": torch.arange(E) % 2 == 0,
        "replace_rows": torch.randn((t, k, D), generator=g),
    }  # fmt: skip
    chosen = {name for name in values if name.removesuffix("_experts").removesuffix("_rows") in fields}
    return Intervene(**{name: values[name] for name in chosen})


def assert_same(got: tuple[Tensor, Routing], expected: tuple[Tensor, Routing], tolerance: float = 2e-5) -> None:
    assert torch.equal(got[1].expert_ids, expected[1].expert_ids)
    torch.testing.assert_close(got[0].double(), expected[0], atol=tolerance, rtol=tolerance)
    for name in ("router_logits", "routing_weights", "expert_load", *NEEDS):
        mine, theirs = getattr(got[1], name), getattr(expected[1], name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            bound = max(tolerance, 1e-7) if name == "expert_load" else tolerance  # a share is always float32
            torch.testing.assert_close(
                mine.double(), theirs, atol=bound, rtol=bound, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("t", [0, 1, 2, 3, 7, 16, 33, 128])
def test_every_need_equals_the_oracle(impl: str, t: int) -> None:
    args = layer(t)
    got = fused_moe(*args, K, need=NEEDS, impl=impl)
    assert got[1].impl == impl
    assert_same(got, reference_moe(*args, K, need=NEEDS))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(
    fields=st.sets(st.sampled_from(FIELDS)), t=st.integers(0, 9), seed=st.integers(0, 99), normalise=st.booleans(),
    names=st.sets(st.sampled_from(NEEDS)), experts=st.none() | st.sets(st.integers(0, E - 1)),
    tokens=st.none() | st.just([0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_interventions_and_needs_combine_as_in_the_oracle(
    impl: str, fields: set[str], t: int, seed: int, normalise: bool, names: set[str], experts: set[int] | None,
    tokens: list[int] | None,
) -> None:  # fmt: skip
    args, change = layer(t, seed), intervention(fields, t, seed)
    need = Need(tuple(names), None if experts is None else sorted(experts), tokens if t else None)
    run = {"norm_topk_prob": normalise, "need": need, "intervene": change}
    assert_same(fused_moe(*args, K, impl=impl, **run), reference_moe(*args, K, **run), 2e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_asking_changes_no_bit(impl: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = layer(33, dtype=dtype)
        assert torch.equal(fused_moe(*args, K, need=NEEDS, impl=impl)[0], fused_moe(*args, K, impl=impl)[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_oracle(impl: str, dtype: torch.dtype) -> None:
    args = layer(65, dtype=dtype, d=128, f=96)
    y, routing = fused_moe(*args, K, impl=impl, need=ROUTED)
    expected, record = reference_moe(*args, K, need=ROUTED)
    assert y.dtype == dtype
    assert torch.equal(routing.expert_ids, record.expert_ids)
    assert float((y.double() - expected).norm() / expected.norm()) < 6e-3
    assert routing.expert_out.dtype == dtype


def test_a_float64_layer_is_float64_throughout() -> None:
    args = layer(7, dtype=torch.float64)
    assert_same(fused_moe(*args, K, need=NEEDS), reference_moe(*args, K, need=NEEDS), 1e-12)


def test_ties_take_the_lowest_expert_and_nan_stays_in_its_token() -> None:
    x, router, gate_up, down = layer(5)
    router[3] = router[1]  # experts 1 and 3 tie for every token
    for impl in IMPLEMENTATIONS:
        ids = fused_moe(x, router, gate_up, down, 1, impl=impl)[1].expert_ids
        assert 3 not in ids.flatten().tolist()
    clean = fused_moe(x, router, gate_up, down, K)[0]
    x[2] = torch.nan
    x[4, 0] = torch.inf
    for impl in IMPLEMENTATIONS:
        y, routing = fused_moe(x, router, gate_up, down, K, impl=impl)
        assert routing.expert_ids[2].tolist() == [0, 1]  # a row of NaN is one tie
        assert y[2].isnan().all()
        torch.testing.assert_close(y[[0, 1, 3]], clean[[0, 1, 3]])


@given(st.integers(0, 999), st.integers(1, E), st.booleans())
@settings(max_examples=50, deadline=None)
def test_fast_selection_equals_the_stable_sort(seed: int, k: int, coarse: bool) -> None:
    logits = torch.randn(9, E, generator=torch.Generator().manual_seed(seed))
    logits = (logits * 2).round() if coarse else logits  # coarse ones tie
    probs = logits.softmax(-1)
    order = probs.sort(dim=-1, descending=True, stable=True).indices
    ids, margin = top_k(probs, logits, k, want_margin=True)
    assert torch.equal(ids, order[:, :k])
    ranked = logits.gather(-1, order)
    assert margin.isnan().all() if k == E else torch.equal(margin, ranked[:, k - 1] - ranked[:, k])


def test_ablation_silences_and_keep_mask_reroutes() -> None:
    args = layer(9)
    scale, keep = torch.ones(E), torch.ones(E, dtype=torch.bool)
    y, routing = fused_moe(*args, K)
    expert = int(routing.expert_ids[0, 0])
    scale[expert], keep[expert] = 0, False
    _, ablated = fused_moe(*args, K, intervene=Intervene(expert_scale=scale), need=("expert_out",))
    assert torch.equal(ablated.expert_ids, routing.expert_ids)
    assert not ablated.expert_out[ablated.expert_ids == expert].any()
    moved, rerouted = fused_moe(*args, K, intervene=Intervene(keep_mask=keep))
    assert (rerouted.expert_ids != expert).all()
    untouched = (routing.expert_ids != expert).all(-1)
    assert untouched.any()
    torch.testing.assert_close(moved[untouched], y[untouched])
    torch.testing.assert_close(rerouted.routing_weights.sum(-1), torch.ones(9))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_reach_every_tensor(impl: str) -> None:
    args = [tensor.requires_grad_() for tensor in layer(7)]
    ours = torch.autograd.grad(fused_moe(*args, K, impl=impl)[0].square().sum(), args)
    theirs = torch.autograd.grad(reference_moe(*args, K)[0].square().sum(), args)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 64), (4, 128)])
@pytest.mark.parametrize("impl", ["sorted", "reference"])
def test_quantised_experts_equal_the_oracle_on_the_same_weights(impl: str, bits: int, group: int) -> None:
    x, router, gate_up, down = layer(17, d=256, f=128)
    small = quantize(gate_up, bits, group), quantize(down, bits, group)
    with pytest.warns(UserWarning, match=f"moe_impl '{impl}': dequantises"):
        got = fused_moe(x, router, *small, K, impl=impl, need=ROUTED)
    assert_same(got, reference_moe(x, router, *small, K, need=ROUTED))


def test_grouped_mm_refuses_quantised_experts() -> None:
    x, router, gate_up, down = layer(3, d=64, f=64)
    small = quantize(gate_up, 8), quantize(down, 8)
    with pytest.raises(ValueError, match="expected triton or sorted for int8 experts"):
        fused_moe(x, router, *small, K, impl="grouped_mm")


def test_grouped_mm_names_the_widths_it_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"d_expert: expected rows of a multiple of 16 bytes for 'grouped_mm', got 40"):
        fused_moe(*layer(3, f=10), K, impl="grouped_mm")


def test_hf_numerics_round_where_transformers_does() -> None:
    args = layer(33, dtype=torch.bfloat16, d=64, f=32)
    y, routing = fused_moe(*args, K, numerics="hf")
    for tensor in (routing.router_logits, routing.routing_weights):
        assert torch.equal(tensor, tensor.bfloat16().float())
    trained = fused_moe(*args, K)[0]
    assert float((y.float() - trained.float()).norm() / trained.float().norm()) < 2e-2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_whose_sum_is_below_the_normal_numbers_still_sum_to_one(impl: str) -> None:
    """Forced onto experts of probability 1e-40, a token's weights are their true shares; onto 0, they stay 0."""
    x, router, gate_up, down = layer(2)
    x.zero_()
    bias = torch.zeros(2, E)
    bias[0, :K], bias[1, :K] = torch.tensor(-92.0), -torch.inf
    change = Intervene(router_bias=bias, forced_ids=torch.arange(K).expand(2, K))
    weights = fused_moe(x, router, gate_up, down, K, impl=impl, intervene=change)[1].routing_weights
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forced_weights_are_used_as_they_are_in_hf_numerics(impl: str) -> None:
    """Their products with the outputs are in the wider dtype of the two, as in transformers."""
    args, exact = layer(5, dtype=torch.bfloat16), torch.full((5, K), 1 / 3)
    y, routing = fused_moe(
        *args, K, impl=impl, numerics="hf", need=("expert_out",), intervene=Intervene(forced_weights=exact)
    )
    assert torch.equal(routing.routing_weights, exact)
    assert torch.equal(y, (routing.expert_out.float() * exact.unsqueeze(-1)).sum(1).bfloat16())
    short = exact.bfloat16()
    y, routing = fused_moe(
        *args, K, impl=impl, numerics="hf", need=("expert_out",), intervene=Intervene(forced_weights=short)
    )
    assert torch.equal(y, (routing.expert_out * short.unsqueeze(-1)).sum(1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_hf_numerics_the_router_computes_in_its_own_dtype(
    impl: str, router: torch.dtype, dtype: torch.dtype
) -> None:
    x, weight, *experts = layer(33, dtype=dtype)
    weight = (weight.float() * 1.001).to(router)
    own = torch.float32 if router == torch.float64 else router  # float64 is for float64 layers
    logits = torch.nn.functional.linear(x.to(own), weight.to(own))
    probs = logits.softmax(-1, dtype=torch.float32)
    order = probs.sort(dim=-1, descending=True, stable=True).indices[:, :K]
    weights = probs.gather(-1, order)
    weights = (weights / weights.sum(-1, keepdim=True)).to(own)
    y, routing = fused_moe(x, weight, *experts, K, impl=impl, numerics="hf", need=("expert_out",))
    assert torch.equal(routing.router_logits, logits.float())
    assert torch.equal(routing.expert_ids, order)
    assert torch.equal(routing.routing_weights, weights.float())
    assert torch.equal(y, (routing.expert_out * weights.unsqueeze(-1)).sum(1).to(dtype))


@pytest.mark.parametrize("e", [2, 5, 9, 15, 17, 60, 65, 128])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_experts_with_one_router_row_tie_exactly_and_the_lowest_ids_win(impl: str, e: int) -> None:
    """A plain product on CPU gives some of them another last bit, for most numbers of experts."""
    for t in (1, 2, 7, 33):
        g = torch.Generator().manual_seed(t)
        x, row = torch.randn(t, D, generator=g), torch.randn(1, D, generator=g)
        gate_up, down = torch.randn(e, 2 * F, D, generator=g), torch.randn(e, D, F, generator=g)
        _, routing = fused_moe(x, row.expand(e, D).contiguous(), gate_up, down, 2, need=("margin",), impl=impl)
        assert (routing.router_logits == routing.router_logits[:, :1]).all()
        assert torch.equal(routing.expert_ids, torch.tensor([[0, 1]] * t))
        assert routing.margin is not None
        assert routing.margin.isnan().all() if e == 2 else (routing.margin == 0).all()


def test_padding_the_router_changes_no_value_and_passes_gradients_on() -> None:
    x, router = layer(5)[:2]
    x, router = x.requires_grad_(), router.requires_grad_()
    padded, plain = router_logits(x, router), x @ router.T
    torch.testing.assert_close(padded, plain)
    for one, other in zip(
        torch.autograd.grad(padded.square().sum(), (x, router)),
        torch.autograd.grad(plain.square().sum(), (x, router)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert torch.equal(router_logits(x, router, "hf"), torch.nn.functional.linear(x, router))
