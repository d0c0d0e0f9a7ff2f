"""Interventions together: they act in their order, weights follow their experts, and what cannot act is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from recorded import frozen
from torch import Tensor

from workbench.errors import InterventionError
from workbench.interventions import (
    ForceExperts,
    Intervention,
    KnockOut,
    Reweight,
    SteerRouter,
    Where,
)
from workbench.interventions.base import Site
from workbench.interventions.where import Batch
from workbench.models import Qwen3Moe

PREFIX = "blocks.0.mlp.hook_"


def routed(model: Qwen3Moe, tokens: Tensor, items: list[Intervention]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights and logits of the first layer."""
    names = [f"{PREFIX}{leaf}" for leaf in ("expert_ids", "routing_weights", "router_logits")]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names, interventions=items)
    return cache[names[0]], cache[names[1]], cache[names[2]]


def test_forced_experts_take_the_last_slots_and_others_stay_in_theirs(moe: Qwen3Moe, tokens: Tensor) -> None:
    before = routed(moe, tokens, [])[0]
    after = routed(moe, tokens, [ForceExperts(experts=(6, 2))])[0]
    for old, new in zip(before.flatten(0, 1).tolist(), after.flatten(0, 1).tolist(), strict=True):
        missing = [expert for expert in (6, 2) if expert not in old]
        free = [slot for slot, expert in enumerate(old) if expert not in (6, 2)]
        for slot, expert in zip(free[len(free) - len(missing) :], missing, strict=True):
            old[slot] = expert
        assert new == old


def test_recorded_weights_follow_their_expert(moe: Qwen3Moe, tokens: Tensor) -> None:
    freeze = frozen(moe, tokens.flip(0))
    ids, weights, _ = routed(moe, tokens, [freeze])
    new_ids, new_weights, _ = routed(moe, tokens, [freeze, ForceExperts(experts=(4,))])
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        at = tuple(place)
        recorded = dict(zip(ids[at].tolist(), weights[at].tolist(), strict=True))
        found = dict(zip(new_ids[at].tolist(), new_weights[at].tolist(), strict=True))
        assert 4 in found
        assert all(found[expert] == recorded[expert] for expert in found.keys() & recorded.keys())
        assert len(found.keys() & recorded.keys()) >= 2
    forced = ForceExperts(experts=(6, 2, 1), weights=(0.5, 0.3, 0.2))
    swapped_in, given, _ = routed(moe, tokens, [forced, ForceExperts(experts=(4,))])
    assert swapped_in[0, 0].tolist() == [6, 2, 4]
    assert torch.allclose(given[0, 0, :2], torch.tensor([0.5, 0.3]))


@pytest.mark.parametrize("form", ["steermoe", "soft", "hard", "relative"])
@pytest.mark.parametrize("activate", [True, False])
def test_steering_beside_a_masked_expert_is_that_of_the_others(
    moe: Qwen3Moe, tokens: Tensor, form: str, activate: bool
) -> None:
    plain = routed(moe, tokens, [])[2]
    items = [KnockOut(experts=(3,), mode="reroute"), SteerRouter(experts=(5,), form=form, activate=activate)]
    steered = routed(moe, tokens, items)[2]
    rest = [0, 1, 2, 4, 5, 6, 7]
    own, sign = plain[..., 5], 1 if activate else -1
    edge = plain[..., rest].amax(-1) if activate else plain[..., rest].amin(-1)
    expected = {
        "steermoe": edge + sign * 0.01,
        "soft": own + sign * 0.5 * plain[..., rest].std(-1, correction=0),
        "hard": edge,
        "relative": own + sign * 0.03 * own.abs(),
    }[form]
    assert torch.allclose(steered[..., 5], expected, atol=0.006 if form == "hard" else 1e-6)  # ties: six deviations
    assert (steered[..., 3] == -torch.inf).all()
    masked = torch.full((1, 1, 8), -torch.inf)
    masked[..., 0] = 1.0
    item = SteerRouter(experts=(5,), form=form, activate=activate)
    batch = Batch([item])
    batch.positions = torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(item._steer(masked, Site(batch, None, 0)), masked), "masked stays masked"


def reroute(*experts: int, **where: object) -> KnockOut:
    return KnockOut(experts=experts, mode="reroute", where=Where(**where))  # type: ignore[arg-type]


def drop(*experts: int) -> KnockOut:
    return KnockOut(experts=experts, mode="drop")


def force(*experts: int, **where: object) -> ForceExperts:
    return ForceExperts(experts=experts, where=Where(**where))  # type: ignore[arg-type]


def steer(expert: int) -> SteerRouter:
    return SteerRouter(experts=(expert,), form="soft")


@pytest.mark.parametrize("weights", [True, False])
def test_what_cannot_act_beside_frozen_routing_is_refused(moe: Qwen3Moe, tokens: Tensor, weights: bool) -> None:
    freeze = frozen(moe, tokens, weights=weights)
    message = "expected each to act, got a .* that cannot, since freeze_routing decides"
    for items in ([freeze, reroute(1)], [reroute(1), freeze], [force(1), freeze]):
        with pytest.raises(InterventionError, match=message):
            moe(tokens, interventions=items)
        with moe.intervene(items[0]), pytest.raises(InterventionError, match=message):
            moe(tokens, interventions=items[1])
    with pytest.raises(InterventionError, match=message):
        moe(tokens, interventions=[frozen(moe, tokens, weights=weights, where=Where(positions=(2,))), reroute(1)])
    outweighed = [[freeze, steer(1)], [steer(1), freeze], [drop(1), freeze], [Reweight(experts=(1,), factor=2), freeze]]
    for items in outweighed:
        if weights:
            with pytest.raises(InterventionError, match=message):
                moe(tokens, interventions=items)
        else:
            moe(tokens, interventions=items)
    prompt = frozen(moe, tokens, weights=weights, where=Where(phase="prefill"))
    for items in ([freeze, drop(1)], [freeze, force(1)], [prompt, reroute(1, phase="decode")]):
        assert torch.isfinite(moe(tokens, interventions=items)).all()
    assert not moe.batches
    assert not any(point.fwd_hooks for point in moe.hook_dict.values())


def test_an_expert_is_not_knocked_out_and_asked_for_at_once(moe: Qwen3Moe, tokens: Tensor) -> None:
    for items in ([reroute(3), force(3)], [force(3), reroute(3)], [drop(3), force(3)], [reroute(3), steer(3)]):
        with pytest.raises(InterventionError, match=r"expected different experts for knock_out .* got \[3\] in both"):
            moe(tokens, interventions=items)
    for items in ([reroute(3), force(4)], [force(3), drop(3)], [reroute(3, positions=(1,)), force(3, positions=(2,))]):
        assert torch.isfinite(moe(tokens, interventions=items)).all()


def test_reroutes_together_leave_enough_experts(moe: Qwen3Moe, tokens: Tensor) -> None:
    for second in (reroute(3, 4, 5), reroute(3, 4, 5, positions=(-1,)), reroute(3, 4, 5, 6, 7, layers=(0,))):
        few = [reroute(0, 1, 2), second]
        with pytest.raises(InterventionError, match=r"at least k = 3 experts to be left .* got [012]\. Use mode drop"):
            moe(tokens, interventions=few)
        with moe.intervene(few[0]), pytest.raises(InterventionError, match="at least k = 3 experts"):
            moe(tokens, interventions=few[1])
    apart = [
        [reroute(0, 1, 2, positions=(1,)), reroute(3, 4, 5, positions=(2,))],
        [reroute(0, 1, 2, layers=(0,)), reroute(3, 4, 5, layers=(2,))],
        [reroute(0, 1, 2), reroute(2, 3, 4)],
    ]
    for items in apart:
        assert torch.isfinite(moe(tokens, interventions=items)).all()


def test_every_set_of_reroutes_that_meet_is_counted(moe: Qwen3Moe, tokens: Tensor) -> None:
    """One that meets the first but not the second is not forgotten for the second's sake."""
    first, second, third = reroute(0, 1, 2), reroute(7, phase="prefill"), reroute(3, 4, 5, phase="decode")
    for items in itertools.permutations([first, second, third]):
        with pytest.raises(InterventionError, match=r"got 2\. Use mode drop"):
            moe.generate(tokens, max_new_tokens=2, interventions=items)
    many = [reroute(0, positions=(0, place)) for place in range(1, 40)]  # all meet at the first token
    assert torch.isfinite(moe(tokens, interventions=[*many, reroute(1, 2, 3, phase="prefill")])).all()
    with pytest.raises(InterventionError, match=r"got 2\. Use mode drop"):
        moe(tokens, interventions=[*many, reroute(1, 2, 3, 4, 5)])
