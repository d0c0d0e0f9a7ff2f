"""For every kind: its identity and its removal change no bit, in one pass and while writing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recorded import frozen, own_cache
from torch import Tensor

from workbench.interventions import (
    AddVector,
    BiasRouter,
    ForceExperts,
    Intervention,
    KnockOut,
    PatchActivations,
    ProjectOut,
    Reweight,
    ScaleActivation,
    ScaleExperts,
    SetActivation,
    SetExpertOutput,
    SteerRouter,
    SwapRouting,
    Where,
)
from workbench.interventions.base import KINDS
from workbench.models import Llama

Make = Callable[[Llama, Tensor], Intervention]
NOWHERE = Where(positions=())


def residual(model: Llama, tokens: Tensor) -> PatchActivations:
    return PatchActivations.from_cache({n: v for n, v in own_cache(model, tokens).items() if "resid_post" in n})


# For each kind: one that changes nothing, and one that changes the logits.
DENSE: dict[str, tuple[Make, Make]] = {
    "add_vector": (
        lambda m, t: AddVector(vector=torch.zeros(32)),
        lambda m, t: AddVector(vector=torch.ones(32), scale=0.5),
    ),
    "project_out": (
        lambda m, t: ProjectOut(direction=torch.ones(32), scale=0.0),
        lambda m, t: ProjectOut(direction=torch.ones(32)),
    ),
    "set_activation": (
        lambda m, t: SetActivation(value=0.0, where=NOWHERE),
        lambda m, t: SetActivation(value=0.0, point="attn_out"),
    ),
    "scale_activation": (lambda m, t: ScaleActivation(factor=1.0), lambda m, t: ScaleActivation(factor=0.5, point="z")),
    "patch_activations": (residual, lambda m, t: residual(m, t.flip(0))),
}
SPARSE: dict[str, tuple[Make, Make]] = {
    "knock_out": (
        lambda m, t: KnockOut(experts=(), mode="reroute"),
        lambda m, t: KnockOut(experts=(0, 1), mode="reroute"),
    ),
    "force_experts": (lambda m, t: ForceExperts(experts=()), lambda m, t: ForceExperts(experts=(5,))),
    "steer_router": (
        lambda m, t: SteerRouter(experts=(2,), form="soft", strength=0.0),
        lambda m, t: SteerRouter(experts=(2,), form="soft", strength=2.0),
    ),
    "reweight": (
        lambda m, t: Reweight(experts=(0, 1, 2, 3), factor=1.0),
        lambda m, t: Reweight(experts=(0, 1, 2, 3), factor=4.0),
    ),
    "scale_experts": (
        lambda m, t: ScaleExperts(experts=(0, 1, 2, 3), factor=1.0),
        lambda m, t: ScaleExperts(experts=(0, 1, 2, 3), factor=0.0),
    ),
    "set_expert_output": (
        lambda m, t: SetExpertOutput(experts=(0, 1), value=torch.zeros(32), add=True),
        lambda m, t: SetExpertOutput(experts=(0, 1), value=torch.ones(32)),
    ),
    "bias_router": (lambda m, t: BiasRouter(bias=torch.zeros(8)), lambda m, t: BiasRouter(bias=torch.arange(8.0))),
    "swap_routing": (lambda m, t: SwapRouting(rows=(0, 1)), lambda m, t: SwapRouting(rows=(1, 0))),
    "freeze_routing": (frozen, lambda m, t: frozen(m, t.flip(0))),
}
CASES = [("llama", kind) for kind in DENSE] + [("moe", kind) for kind in (*DENSE, *SPARSE)]


@pytest.fixture
def case(request: pytest.FixtureRequest, tokens: Tensor) -> tuple[Llama, Intervention, Intervention]:
    architecture, kind = request.param
    model = request.getfixturevalue(architecture)
    return model, *(make(model, tokens) for make in (DENSE | SPARSE)[kind])


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == set(DENSE) | set(SPARSE)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, indirect=True, ids=lambda case: "-".join(case))
def test_identity_and_removal_change_no_bit(case: tuple[Llama, Intervention, Intervention], tokens: Tensor) -> None:
    model, identity, change = case
    plain = model(tokens)
    written = model.generate(tokens, max_new_tokens=5, stop_ids=())
    assert torch.equal(model(tokens, interventions=[identity]), plain)
    with_identity = model.generate(tokens, max_new_tokens=5, stop_ids=(), interventions=[identity])
    assert torch.equal(with_identity.tokens, written.tokens)
    changed = model(tokens, interventions=[change])
    assert (changed - plain).abs().max() > 1e-3, "the change is seen"
    assert torch.equal(model(tokens, interventions=[change]), changed)
    model.generate(tokens, max_new_tokens=5, stop_ids=(), interventions=[change])
    assert torch.equal(model(tokens), plain), "and gone afterwards"
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not model.batches


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, indirect=True, ids=lambda case: "-".join(case))
def test_decoding_with_a_cache_equals_whole_passes(
    case: tuple[Llama, Intervention, Intervention], tokens: Tensor
) -> None:
    model, _, change = case
    written = model.generate(tokens, max_new_tokens=5, stop_ids=(), interventions=[change]).tokens
    for end in range(7, 12):
        assert torch.equal(model(written[:, :end], interventions=[change])[:, -1].argmax(-1), written[:, end])
