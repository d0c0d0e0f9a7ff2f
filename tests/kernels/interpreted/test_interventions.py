"""Interventions on the Triton path: the kernels do them, and give what hooks and the other implementations give."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import assert_near
from conftest import QWEN3_MOE
from torch import Tensor

from workbench.hooks import HookPoint
from workbench.interventions import (
    BiasRouter,
    ForceExperts,
    Intervention,
    KnockOut,
    PerRow,
    Reweight,
    ScaleExperts,
    SetExpertOutput,
    SteerRouter,
    Where,
)
from workbench.interventions.kernel_plan import LayerPlan
from workbench.models import Qwen3Moe, build_model, init_weights
from workbench_kernels.moe import stages

TOKENS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(2))  # skinny
FEW = TOKENS[:1, :3]  # decode
MLP = "blocks.0.mlp.hook_"
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(8, generator=torch.Generator().manual_seed(1))
GIVEN = ForceExperts(experts=(6, 2, 1), weights=(0.5, 0.3, 0.2))
ITEMS: dict[str, list[Intervention]] = {
    "bias": [BiasRouter(bias=BIAS, scale=2.0)],
    "reroute": [KnockOut(experts=(0, 1), mode="reroute")],
    "limited": [KnockOut(experts=(0, 1), mode="reroute", where=Where(positions=(1,))), BiasRouter(bias=BIAS)],
    "drop": [KnockOut(experts=(0, 1, 5), mode="drop")],
    "outputs": [
        Reweight(experts=(0, 3), factor=2.5),
        ScaleExperts(experts=(0, 3), factor=-1.5),
        SetExpertOutput(experts=(4, 5), value=VECTOR),
        SetExpertOutput(experts=(6,), value=VECTOR, add=True),
    ],
    "given": [GIVEN, ScaleExperts(experts=(2,), factor=2.0)],
}


def model(impl: str) -> Qwen3Moe:
    cfg = dataclasses.replace(QWEN3_MOE, n_layers=1, sparse_layers=(True,))
    return init_weights(build_model(cfg, moe_impl=impl), seed=1, std=0.2)  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("name", list(ITEMS))
def test_kernels_give_what_hooks_and_sorted_experts_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = model("triton"), model("sorted")
    launches: list[set[str]] = []
    route = stages.route
    monkeypatch.setattr(stages, "route", lambda layer, taps: (launches.append(set(taps)), route(layer, taps))[1])
    for tokens in (FEW, TOKENS):
        plain = ours(tokens)
        with ours.intervene(ITEMS[name]):
            inside = ours(tokens)
            assert {row.ran for row in ours.intervention_table()} == {"kernel"}
            assert launches[-1] == set(), "no tap: everything stays fused"
            with monkeypatch.context() as patch:
                patch.setattr(LayerPlan, "_inside", lambda self: [])
                hooked = ours(tokens)
                assert launches[-1] != set() or name == "outputs"
        assert_near(inside, hooked)
        assert_near(inside, theirs(tokens, interventions=ITEMS[name]))
        assert (inside - plain).abs().max() > 1e-3
        assert torch.equal(ours(tokens), plain)


@torch.no_grad()
def test_a_hook_sees_what_the_kernels_would_have_left() -> None:
    ours, items = (
        model("triton"),
        [*ITEMS["bias"], *ITEMS["reroute"], *ITEMS["outputs"], KnockOut(experts=(2,), mode="drop")],
    )
    unheard = ours(TOKENS, interventions=items)
    for leaf in ("router_logits", "router_probs", "expert_ids", "routing_weights", "expert_out"):
        seen: list[Tensor] = []

        def look(x: Tensor, hook: HookPoint, seen: list[Tensor] = seen) -> None:
            seen.append(x.clone())

        with ours.hooks([(MLP + leaf, look)]):
            assert_near(ours(TOKENS, interventions=items), unheard)
        expected = model("sorted").run_with_cache(TOKENS, names_filter=MLP + leaf, interventions=items)[1][MLP + leaf]
        finite = expected.isfinite()
        assert torch.equal(seen[0].isfinite(), finite), leaf
        assert_near(seen[0][finite].float(), expected[finite].float())


@torch.no_grad()
def test_rows_and_steering_beside_kernels() -> None:
    ours, theirs = model("triton"), model("sorted")
    steer = SteerRouter(experts=(3,), form="soft", strength=2.0)
    items: list[object] = [
        [steer, BiasRouter(bias=BIAS), KnockOut(experts=(0,), mode="reroute")],
        PerRow(
            [[BiasRouter(bias=BIAS)], [KnockOut(experts=(0,), mode="reroute"), ScaleExperts(experts=(1,), factor=2)]]
        ),
    ]
    ran = [["hook", "kernel", "kernel"], ["kernel", "kernel", "hook"]]
    for given, expected in zip(items, ran, strict=True):
        with ours.intervene(given):  # type: ignore[arg-type]
            logits = ours(TOKENS)
            assert [row.ran for row in ours.intervention_table()] == expected
        assert_near(logits, theirs(TOKENS, interventions=given))  # type: ignore[arg-type]
