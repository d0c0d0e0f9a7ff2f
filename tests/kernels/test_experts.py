"""The implementations of the routed experts against a loop over tokens written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench_kernels import IMPLEMENTATIONS, choose_implementation, experts, matrices_kept, routed_experts
from workbench_kernels.experts import TAPS


def problem(t: int, d: int, f: int, e: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(e, generator=g)[:k] for _ in range(t)]) if t else torch.empty(0, k).long()
    weights = torch.rand(t, k, generator=g)
    tensors = [torch.randn(t, d, generator=g), torch.randn(e, 2 * f, d, generator=g), torch.randn(e, d, f, generator=g)]
    x, gate_up, down = [(tensor * 0.3).to(dtype) for tensor in tensors]
    return [x, ids, weights, gate_up, down]


def by_hand(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    x, weights, gate_up, down = x.double(), weights.double(), gate_up.double(), down.double()
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            y[token] += weights[token, slot] * (down[expert] @ (F.silu(gate) * up))
    return y


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("t", "d", "f", "e", "k"), [(1, 16, 8, 4, 2), (7, 32, 16, 8, 8), (33, 48, 32, 60, 4), (128, 64, 16, 128, 8)]
)
def test_every_implementation_equals_the_loop(impl: str, t: int, d: int, f: int, e: int, k: int) -> None:
    args = problem(t, d, f, e, k)
    assert relative(routed_experts(*args, impl=impl), by_hand(*args)) < 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_stays_near_the_loop(impl: str) -> None:
    args = problem(33, 64, 32, 8, 4, dtype=torch.bfloat16)
    y = routed_experts(*args, impl=impl)
    assert y.dtype == torch.bfloat16
    assert relative(y, by_hand(*args)) < 6e-3


@pytest.mark.parametrize("impl", ["sorted", "reference"])
@given(
    t=st.integers(0, 9), d=st.integers(1, 9), f=st.integers(1, 7), e=st.integers(1, 6), k=st.integers(1, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_odd_shapes_and_no_tokens(impl: str, t: int, d: int, f: int, e: int, k: int, seed: int) -> None:
    args = problem(t, d, f, e, min(k, e), seed)
    assert torch.allclose(routed_experts(*args, impl=impl).double(), by_hand(*args), atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_expert_may_take_everything(impl: str) -> None:
    x, _, weights, gate_up, down = problem(9, 16, 8, 6, 2)
    ids = torch.full((9, 2), 4)  # the same expert in both slots, as forcing experts may ask for
    assert (
        relative(routed_experts(x, ids, weights, gate_up, down, impl=impl), by_hand(x, ids, weights, gate_up, down))
        < 1e-6
    )


@pytest.mark.parametrize("t", [1, 3, 11])  # up to four tokens `sorted` leaves slots where they are
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_taps_see_slots_and_change_no_bit(impl: str, t: int) -> None:
    args = problem(t, 16, 8, 6, 3)
    plain, seen = routed_experts(*args, impl=impl), {}
    taps = {name: (lambda slots, name=name: seen.setdefault(name, slots)) for name in TAPS}
    assert torch.equal(routed_experts(*args, impl=impl, taps=taps), plain)
    x, ids, weights, gate_up, _ = args
    assert {name: tuple(slots.shape) for name, slots in seen.items()} == {
        "expert_pre": (t, 3, 8), "expert_pre_linear": (t, 3, 8), "expert_post": (t, 3, 8), "expert_out": (t, 3, 16),
    }  # fmt: skip
    gate, up = torch.einsum("td,tkfd->tkf", x, gate_up[ids]).chunk(2, -1)
    assert torch.allclose(seen["expert_pre"], gate, atol=1e-5)
    assert torch.allclose(seen["expert_pre_linear"], up, atol=1e-5)
    assert torch.allclose(seen["expert_post"], F.silu(gate) * up, atol=1e-5)
    assert torch.allclose((seen["expert_out"] * weights[..., None]).sum(1), plain, atol=1e-5)


@pytest.mark.parametrize("t", [4, 5])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tap_that_edits_one_slot_moves_one_token(impl: str, t: int) -> None:
    args = problem(t, 16, 8, 6, 2)
    plain = routed_experts(*args, impl=impl)
    for name in TAPS:

        def silence(slots: Tensor) -> Tensor:
            slots = slots.clone()
            slots[3, 1] = 0
            return slots

        moved = routed_experts(*args, impl=impl, taps={name: silence})
        changed = (moved != plain).any(-1).tolist()
        assert changed == [token == 3 for token in range(t)], name


@pytest.mark.parametrize("t", [1, 4, 6])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_equal_those_of_the_loop(impl: str, t: int) -> None:
    args = [tensor if tensor.dtype == torch.int64 else tensor.requires_grad_() for tensor in problem(t, 16, 8, 5, 2)]
    leaves = [tensor for tensor in args if tensor.requires_grad]
    ours = torch.autograd.grad(routed_experts(*args, impl=impl).square().sum(), leaves)
    theirs = torch.autograd.grad(by_hand(*args).square().sum(), leaves)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(got, expected.float(), atol=1e-5)


@pytest.mark.parametrize("t", [4, 6])
def test_nan_in_one_token_stays_there(t: int) -> None:
    args = problem(t, 16, 8, 5, 2)
    args[0][2] = torch.nan
    for impl in IMPLEMENTATIONS:
        bad = routed_experts(*args, impl=impl).isnan().any(-1).tolist()
        assert bad == [token == 2 for token in range(t)], impl


def test_a_few_tokens_have_the_same_bits_in_any_company() -> None:
    """What four tokens share an expert with, or whether they do, is nothing to a token."""
    x, ids, *weights = problem(4, 48, 24, 5, 3)
    together = routed_experts(x, ids, *weights)
    for token in range(4):
        for others in ([], [token], [(token + 1) % 4], [0, 1, 2]):
            rows = torch.tensor([token, *others])
            mixed = routed_experts(x[rows], ids[rows], weights[0][rows], *weights[1:])
            assert torch.equal(mixed[0], together[token]), (token, others)


def test_large_matrices_are_read_once_for_all_that_share_them() -> None:
    ids = torch.zeros(4, 2, dtype=torch.int64)
    small, large = torch.empty(8, 64, 128), torch.empty(8, 512, 512)
    assert experts.Groups.of(ids, small, "sorted", False).apart
    assert not experts.Groups.of(ids, large, "sorted", False).apart
    assert experts.Groups.of(ids, large, "sorted", False).hit == ([0], [8])
    assert experts.Groups.of(ids[:1], large, "sorted", False).apart  # a lone token shares with nobody


def test_matrices_kept_change_no_bit_and_follow_the_weights() -> None:
    x, ids, weights, gate_up, down = problem(3, 16, 8, 6, 2)
    gate_up, down = torch.nn.Parameter(gate_up, False), torch.nn.Parameter(down, False)
    args = x, ids, weights, gate_up, down
    plain = routed_experts(*args)
    with matrices_kept([gate_up, down]):
        assert experts._kept(gate_up) is not None
        assert torch.equal(routed_experts(*args), plain)
        gate_up *= 2  # in place: the views see it
        assert relative(routed_experts(*args), by_hand(*args)) < 1e-6
        gate_up.data = gate_up.data / 3  # other memory: the views are old, and not used
        assert experts._kept(gate_up) is None
        assert relative(routed_experts(*args), by_hand(*args)) < 1e-6
        with matrices_kept([gate_up]):
            assert experts._kept(gate_up) is not None
        assert experts._kept(gate_up) is None
    assert not experts._KEPT


def test_the_choice_of_implementation_is_explicit() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_implementation("auto", cpu, torch.bfloat16) == "sorted"
    assert choose_implementation("auto", cuda, torch.bfloat16) == "grouped_mm"
    assert choose_implementation("auto", cuda, torch.float32) == "sorted"
    assert choose_implementation("reference", cuda, torch.float32) == "reference"
    with pytest.raises(ValueError, match="expected sorted or reference for a float64 model, got 'grouped_mm'"):
        choose_implementation("grouped_mm", cpu, torch.float64)
    names = "auto, sorted, grouped_mm, reference, triton"
    with pytest.raises(ValueError, match=f"moe_impl: expected one of {names}, got 'fast'"):
        choose_implementation("fast", cpu, torch.float32)


def test_the_loop_over_experts_that_were_hit_makes_the_bits_of_the_loop_over_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    x, ids = torch.randn(6, 32, generator=draw), torch.rand(6, 16, generator=draw).topk(4).indices
    weights = torch.rand(6, 4, generator=draw)
    gate_up, down = torch.randn(16, 48, 32, generator=draw), torch.randn(16, 32, 24, generator=draw)
    found = {}
    for limit in (0, 64):
        monkeypatch.setattr(experts, "_FEW_ROWS", limit)
        found[limit] = [routed_experts(x, ids, weights, gate_up, down, rows_per_expert=n) for n in (None, 6)]
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[64], strict=True))
