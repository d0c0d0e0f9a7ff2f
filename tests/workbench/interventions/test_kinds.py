"""Every kind against a computation by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from recorded import frozen
from torch import Tensor

from workbench.hooks import HookPoint
from workbench.interventions import (
    AddVector,
    ForceExperts,
    Intervention,
    KnockOut,
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
from workbench.models import Llama, Qwen3Moe, build_model, init_weights


def cached(model: Llama, tokens: Tensor, leaf: str, change: Intervention | None = None) -> Tensor:
    """The first sparse layer's tensor, as seen by a listener."""
    name = f"blocks.0.{leaf}"
    return model.run_with_cache(tokens, names_filter=name, interventions=[change] if change else ())[1][name]


@torch.no_grad()
def test_the_hard_form_breaks_ties_at_random_and_by_seed(moe: Qwen3Moe) -> None:
    tokens = torch.randint(5, 60, (3, 40), generator=torch.Generator().manual_seed(5))

    def ties(model_tokens: Tensor, layer: int = 0, **options: object) -> Tensor:
        """What was added to the edge, at the experts that are steered [batch pos steered]."""
        name = f"blocks.{layer}.mlp.hook_router_logits"
        item = SteerRouter(experts=(4, 1), form="hard", **options)
        before, after = (
            moe.run_with_cache(model_tokens, names_filter=name, interventions=items)[1][name]
            for items in ([], [replace(item, where=Where(layers=(layer,)))])
        )
        edge = before.amin(-1, keepdim=True) if options.get("activate") is False else before.amax(-1, keepdim=True)
        return (after - edge)[..., [4, 1]]

    drawn = ties(tokens)
    assert 0.7e-3 < float(drawn[0].std()) < 1.4e-3, "N(0, 1e-6)"
    assert abs(float(drawn[0].mean())) < 4e-4
    assert (drawn[0, :, 0] - drawn[0, :, 1]).abs().max() > 1e-3, "each expert has its own"
    assert torch.allclose(drawn[0], drawn[2], atol=1e-6), "each row the same"
    assert torch.allclose(ties(tokens[:1, :7])[0], drawn[0, :7], atol=1e-6), "in any batch"
    assert torch.allclose(ties(tokens, activate=False), drawn, atol=1e-6)
    assert torch.allclose(ties(tokens, strength=1.0), 1000 * drawn, atol=2e-3)
    for other in (ties(tokens, seed=1), ties(tokens, layer=2)):
        assert (other - drawn).abs().max() > 1e-3
    item = SteerRouter(experts=(4, 1), form="hard", strength=3.0, seed=2)
    written = moe.generate(tokens, max_new_tokens=4, stop_ids=(), interventions=[item], record=["router_logits"])
    whole = moe.run_with_cache(written.tokens, interventions=[item])[1]["router_logits", 2]
    recorded = written.record.activations["blocks.2.mlp.hook_router_logits"]
    assert torch.allclose(recorded, whole[:, : recorded.shape[1]], atol=1e-4), "and while decoding"


@torch.no_grad()
def test_activations_are_what_they_are_said_to_become(llama: Llama, tokens: Tensor) -> None:
    x = cached(llama, tokens, "hook_resid_post")
    v = torch.randn(32)

    def after(change: Intervention) -> Tensor:
        return cached(llama, tokens, "hook_resid_post", change)

    first = Where(layers=(0,))
    assert torch.equal(after(AddVector(vector=v, scale=2.0, where=first)), x + 2 * v)
    u = v / v.norm()
    out = after(ProjectOut(direction=v, where=first))
    assert torch.allclose(out, x - (x @ u)[..., None] * u, atol=1e-5)
    assert (out @ u).abs().max() < 1e-5
    assert torch.equal(after(SetActivation(value=v, where=first)), v.expand_as(x))
    assert torch.equal(after(ScaleActivation(factor=3.0, where=first)), 3 * x)
    heads = SetActivation(point="z", value=0.0, where=Where(heads=(1, 4)))
    z = cached(llama, tokens, "attn.hook_z", heads)
    assert (z[:, :, [1, 4]] == 0).all()
    assert torch.equal(z[:, :, [0, 2, 3, 5]], cached(llama, tokens, "attn.hook_z")[:, :, [0, 2, 3, 5]])


@torch.no_grad()
def test_reroute_and_drop_are_told_apart(moe: Qwen3Moe, tokens: Tensor) -> None:
    ids, g = (cached(moe, tokens, f"mlp.hook_{leaf}") for leaf in ("expert_ids", "routing_weights"))
    logits = cached(moe, tokens, "mlp.hook_router_logits")
    gone = int(ids[0, 0, 0])

    reroute = KnockOut(experts=(gone,), mode="reroute")
    rerouted = cached(moe, tokens, "mlp.hook_expert_ids", reroute)
    masked = logits.clone()
    masked[..., gone] = -torch.inf
    probs = masked.softmax(-1)
    assert torch.equal(rerouted, probs.topk(3, dim=-1).indices)
    expected = probs.gather(-1, rerouted)
    new_g = cached(moe, tokens, "mlp.hook_routing_weights", reroute)
    assert torch.allclose(new_g, expected / expected.sum(-1, keepdim=True))

    held = ids == gone
    dropped = cached(moe, tokens, "mlp.hook_routing_weights", KnockOut(experts=(gone,), mode="drop"))
    assert torch.equal(dropped, g * ~held)
    assert torch.equal(cached(moe, tokens, "mlp.hook_expert_ids", KnockOut(experts=(gone,), mode="drop")), ids)
    filled = cached(moe, tokens, "mlp.hook_routing_weights", KnockOut(experts=(gone,), mode="drop_renormalise"))
    assert torch.allclose(filled.sum(-1), torch.ones(2, 7))
    assert torch.equal(filled[~held.any(-1)], g[~held.any(-1)])
    assert (filled[held] == 0).all()


@torch.no_grad()
def test_knock_outs_keep_the_sum_of_a_model_that_does_not_renormalise(moe: Qwen3Moe, tokens: Tensor) -> None:
    moe = init_weights(build_model(replace(moe.cfg, norm_topk_prob=False)), seed=1, std=0.2)
    assert isinstance(moe, Qwen3Moe)
    ids, g = (cached(moe, tokens, f"mlp.hook_{leaf}") for leaf in ("expert_ids", "routing_weights"))
    gone = int(ids[0, 0, 0])
    held = ids == gone
    some_left = held.any(-1)
    filled = cached(moe, tokens, "mlp.hook_routing_weights", KnockOut(experts=(gone,), mode="drop_renormalise"))
    assert (g.sum(-1) < 0.95).all(), "these weights are bare probabilities"
    assert torch.allclose(filled.sum(-1), g.sum(-1)), "the sum that all k had, not 1"
    assert (filled[held] == 0).all()
    share = filled[some_left] / (g * ~held)[some_left]
    assert torch.allclose(share.nan_to_num(1).amax(-1), (g.sum(-1) / (g * ~held).sum(-1))[some_left])
    rerouted = cached(moe, tokens, "mlp.hook_routing_weights", KnockOut(experts=(gone,), mode="reroute"))
    probs = cached(moe, tokens, "mlp.hook_router_logits").softmax(-1)
    new_ids = cached(moe, tokens, "mlp.hook_expert_ids", KnockOut(experts=(gone,), mode="reroute"))
    expected = probs.gather(-1, new_ids) / (1 - probs[..., gone : gone + 1])
    assert torch.allclose(rerouted, expected, atol=1e-6), "probabilities over the experts that are left"


@torch.no_grad()
def test_a_direction_of_any_length_is_projected_out(llama: Llama, tokens: Tensor) -> None:
    where = Where(layers=(0,))
    x = cached(llama, tokens, "hook_resid_post")
    u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(3)), dim=0)
    for length in (1e-3, 1.0, 20.0, 1e4):
        out = cached(llama, tokens, "hook_resid_post", ProjectOut(direction=length * u, where=where))
        assert torch.allclose(out, x - (x @ u)[..., None] * u, atol=1e-5), length


@torch.no_grad()
def test_dropping_all_of_a_tokens_experts_leaves_nothing(moe: Qwen3Moe, tokens: Tensor) -> None:
    for mode in ("drop", "drop_renormalise"):
        out = cached(moe, tokens, "hook_mlp_out", KnockOut(experts=tuple(range(8)), mode=mode))
        assert (out == 0).all()


@torch.no_grad()
def test_forced_experts_run_with_the_routers_own_weights(moe: Qwen3Moe, tokens: Tensor) -> None:
    ids = cached(moe, tokens, "mlp.hook_expert_ids")
    probs = cached(moe, tokens, "mlp.hook_router_probs")
    forced = cached(moe, tokens, "mlp.hook_expert_ids", ForceExperts(experts=(6, 2)))
    assert ((forced == 6).any(-1) & (forced == 2).any(-1)).all()
    assert all(len(set(row.tolist())) == 3 for row in forced.flatten(0, 1)), "no expert twice"
    best = torch.where(torch.isin(ids, torch.tensor([6, 2])), -1, ids)
    third = [next(e for e in row.tolist() if e >= 0) for row in best.flatten(0, 1)]
    assert all(e in row.tolist() for e, row in zip(third, forced.flatten(0, 1), strict=True)), (
        "the best other one stays"
    )
    g = cached(moe, tokens, "mlp.hook_routing_weights", ForceExperts(experts=(6, 2)))
    own = probs.gather(-1, forced)
    assert torch.allclose(g, own / own.sum(-1, keepdim=True))
    fixed = ForceExperts(experts=(6, 2, 1), weights=(0.5, 0.3, 0.2))
    assert torch.equal(cached(moe, tokens, "mlp.hook_expert_ids", fixed)[1, 3], torch.tensor([6, 2, 1]))
    assert torch.allclose(cached(moe, tokens, "mlp.hook_routing_weights", fixed)[1, 3], torch.tensor([0.5, 0.3, 0.2]))


@torch.no_grad()
def test_steering_forms_are_the_published_ones(moe: Qwen3Moe, tokens: Tensor) -> None:
    z = cached(moe, tokens, "mlp.hook_router_logits")

    def steered(form: str, **options: object) -> Tensor:
        return cached(moe, tokens, "mlp.hook_router_logits", SteerRouter(experts=(4, 1), form=form, **options))

    # SteerMoE writes into the log-softmax and takes another softmax: the same probabilities
    scores = z.log_softmax(-1)
    scores[..., [4, 1]] = scores.amax(-1, keepdim=True) + 0.01
    assert torch.allclose(steered("steermoe").softmax(-1), scores.softmax(-1), atol=1e-6)
    scores = z.log_softmax(-1)
    scores[..., [4, 1]] = scores.amin(-1, keepdim=True) - 0.01
    assert torch.allclose(steered("steermoe", activate=False).softmax(-1), scores.softmax(-1), atol=1e-6)
    soft = z.clone()
    soft[..., [4, 1]] += 0.5 * z.std(-1, keepdim=True, correction=0)
    assert torch.allclose(steered("soft"), soft)
    ids = cached(moe, tokens, "mlp.hook_expert_ids", SteerRouter(experts=(4, 1), form="hard"))
    assert ((ids == 4).any(-1) & (ids == 1).any(-1)).all()
    relative = z.clone()
    relative[..., [4, 1]] -= 0.1 * z[..., [4, 1]].abs()
    assert torch.allclose(steered("relative", strength=0.1, activate=False), relative)
    others = [e for e in range(8) if e not in (4, 1)]
    for form in ("steermoe", "soft", "hard", "relative"):
        assert torch.equal(steered(form)[..., others], z[..., others])


@torch.no_grad()
def test_weights_and_outputs_change_at_their_experts_slots_only(moe: Qwen3Moe, tokens: Tensor) -> None:
    ids, g = (cached(moe, tokens, f"mlp.hook_{leaf}") for leaf in ("expert_ids", "routing_weights"))
    out = cached(moe, tokens, "mlp.hook_expert_out")
    held = torch.isin(ids, torch.tensor([3, 5]))
    assert held.any()
    assert not held.all()
    weighted = cached(moe, tokens, "mlp.hook_routing_weights", Reweight(experts=(3, 5), factor=4.0))
    assert torch.equal(weighted, torch.where(held, 4 * g, g))
    summed = cached(moe, tokens, "mlp.hook_routing_weights", Reweight(experts=(3, 5), factor=4.0, renormalise=True))
    assert torch.allclose(summed.sum(-1), torch.ones(2, 7))
    assert torch.allclose(summed, weighted / weighted.sum(-1, keepdim=True))
    value = torch.randn(32)
    for change, expected in (
        (ScaleExperts(experts=(3, 5), factor=-2.0), -2 * out),
        (SetExpertOutput(experts=(3, 5), value=value), value.expand_as(out)),
        (SetExpertOutput(experts=(3, 5), value=value, add=True), out + value),
    ):
        assert torch.equal(
            cached(moe, tokens, "mlp.hook_expert_out", change), torch.where(held[..., None], expected, out)
        )


@torch.no_grad()
def test_swapped_and_frozen_routing_is_the_other_rows(moe: Qwen3Moe, tokens: Tensor) -> None:
    other = tokens.flip(0)
    names = ("expert_ids", "routing_weights")
    own = [cached(moe, tokens, f"mlp.hook_{name}") for name in names]
    swapped = [cached(moe, tokens, f"mlp.hook_{name}", SwapRouting(rows=(1, 0))) for name in names]
    replayed = [cached(moe, tokens, f"mlp.hook_{name}", frozen(moe, other)) for name in names]
    for before, swap, freeze in zip(own, swapped, replayed, strict=True):
        assert torch.equal(swap, before.flip(0))
        assert torch.equal(freeze, before.flip(0))
    ids_only = frozen(moe, other, weights=False)
    assert torch.equal(cached(moe, tokens, "mlp.hook_expert_ids", ids_only), own[0].flip(0))
    probs = cached(moe, tokens, "mlp.hook_router_probs").gather(-1, own[0].flip(0))
    expected = probs / probs.sum(-1, keepdim=True)
    assert torch.allclose(cached(moe, tokens, "mlp.hook_routing_weights", ids_only), expected)


@torch.no_grad()
def test_items_act_in_their_order_and_hooks_see_the_outcome(llama: Llama, tokens: Tensor) -> None:
    x = cached(llama, tokens, "hook_resid_post")
    where = Where(layers=(0,))
    add, double = AddVector(vector=torch.ones(32), where=where), ScaleActivation(factor=2.0, where=where)
    seen: list[Tensor] = []

    def look(tensor: Tensor, hook: HookPoint) -> None:
        seen.append(tensor)

    with llama.hooks([("blocks.0.hook_resid_post", look)]):
        for items in ([add, double], [double, add]):
            llama(tokens, interventions=items)
        with llama.intervene(add), llama.intervene(double):
            llama(tokens)
    assert torch.equal(seen[0], (x + 1) * 2)
    assert torch.equal(seen[1], x * 2 + 1)
    assert torch.equal(seen[2], seen[0]), "the outer block acts first"


def test_gradients_pass_through(moe: Qwen3Moe, tokens: Tensor) -> None:
    vector = torch.ones(32)
    logits = moe(tokens, interventions=[AddVector(vector=vector), Reweight(experts=(0,), factor=2.0)])
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters() if p.grad is not None)
    assert moe.embed.weight.grad is not None
