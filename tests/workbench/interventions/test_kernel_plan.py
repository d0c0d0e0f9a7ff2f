"""What a layer's kernels do of an intervention by themselves: the same numbers as hooks, and hooks see the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_near
from conftest import QWEN3_MOE
from recorded import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.hooks import HookPoint
from workbench.interventions import (
    AddVector,
    BiasRouter,
    ForceExperts,
    Intervention,
    Interventions,
    KnockOut,
    PerRow,
    Reweight,
    ScaleActivation,
    ScaleExperts,
    SetActivation,
    SetExpertOutput,
    SteerRouter,
    Where,
)
from workbench.interventions.kernel_plan import LayerPlan
from workbench.models import Qwen3Moe, build_model, init_weights

MLP = "blocks.0.mlp.hook_"
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(8, generator=torch.Generator().manual_seed(1))
GIVEN = ForceExperts(experts=(6, 2, 1), weights=(0.5, 0.3, 0.2))
SOME = Where(positions=(1, -1))
SINGLE: list[Intervention] = [
    BiasRouter(bias=BIAS, scale=2.0),
    BiasRouter(bias=BIAS, scale=2.0, where=SOME),
    AddVector(vector=3 * BIAS, point="router_logits", where=Where(layers=(0, 2))),
    KnockOut(experts=(0, 1), mode="reroute"),
    KnockOut(experts=(0, 1), mode="reroute", where=SOME),
    KnockOut(experts=(0, 1, 5), mode="drop"),
    Reweight(experts=(0, 3), factor=2.5),
    ScaleExperts(experts=(0, 3), factor=-1.5),
    SetExpertOutput(experts=(4, 5), value=VECTOR),
    SetExpertOutput(experts=(4, 5), value=VECTOR, add=True),
    AddVector(vector=VECTOR, point="expert_out", where=Where(layers=(0, 2))),
    SetActivation(value=0.25, point="expert_out", where=Where(layers=(0, 2))),
    ScaleActivation(factor=0.5, point="expert_out", where=Where(layers=(0, 2))),
    GIVEN,
]
EVERYTHING = [
    SteerRouter(experts=(3,), form="soft", strength=2.0),
    BiasRouter(bias=BIAS),
    KnockOut(experts=(0,), mode="reroute"),
    BiasRouter(bias=-2 * BIAS, where=SOME),
    KnockOut(experts=(1,), mode="drop"),
    Reweight(experts=(2, 4), factor=0.5),
    ScaleExperts(experts=(2, 3), factor=2.0),
    SetExpertOutput(experts=(3,), value=VECTOR, add=True),
    SetExpertOutput(experts=(4,), value=VECTOR),
]


@pytest.fixture(params=["sorted", "grouped_mm", "reference"])
def impl(request: pytest.FixtureRequest) -> Qwen3Moe:
    return init_weights(build_model(QWEN3_MOE, moe_impl=request.param), seed=1, std=0.2)  # type: ignore[return-value]


def how(model: Qwen3Moe, tokens: Tensor, items: object) -> tuple[Tensor, list[str]]:
    """Logits, and what ran."""
    with torch.no_grad(), model.intervene(items):  # type: ignore[arg-type]
        logits = model(tokens)
        return logits, [row.ran for row in model.intervention_table()]


def as_hooks(monkeypatch: pytest.MonkeyPatch, run: Callable[[], tuple[Tensor, list[str]]]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(LayerPlan, "_inside", lambda self: [])
        logits, ran = run()
    assert set(ran) == {"hook"}
    return logits


def test_every_kind_gives_what_its_hooks_give(impl: Qwen3Moe, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = impl(tokens)
    for item in SINGLE:
        logits, ran = how(impl, tokens, item)
        assert ran == ["kernel"], item
        assert_near(logits, as_hooks(monkeypatch, lambda item=item: how(impl, tokens, item)))
        assert (logits - plain).abs().max() > 1e-3, item
        assert torch.equal(impl(tokens), plain), item
    assert not any(point.fwd_hooks for point in impl.hook_dict.values())
    assert all(getattr(block.mlp, "plan", None) is None for block in impl.blocks)


def test_where_the_arithmetic_is_the_same_so_are_the_bits(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = init_weights(build_model(QWEN3_MOE, moe_impl="reference"), seed=1, std=0.2)
    assert isinstance(model, Qwen3Moe)
    for item in SINGLE:
        if not isinstance(item, Reweight):  # it multiplies the output where the hook multiplies the weight
            expected = as_hooks(monkeypatch, lambda item=item: how(model, tokens, item))
            assert torch.equal(how(model, tokens, item)[0], expected), item


def test_together_they_act_in_their_order(impl: Qwen3Moe, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[object] = [
        EVERYTHING,
        EVERYTHING[::-1],
        [GIVEN, Reweight(experts=(2,), factor=3.0), ScaleExperts(experts=(1,), factor=-1.0)],
        [ScaleExperts(experts=(2,), factor=2.0), SetExpertOutput(experts=(2,), value=VECTOR, add=True, where=SOME)],
        [Reweight(experts=(2,), factor=2.0), KnockOut(experts=(3,), mode="drop_renormalise")],
        [KnockOut(experts=(3,), mode="drop_renormalise"), Reweight(experts=(2,), factor=2.0)],
        [BiasRouter(bias=BIAS), AddVector(vector=torch.ones(8) / 9, point="router_probs", where=Where(layers=(0, 2)))],
        PerRow(
            [[BiasRouter(bias=BIAS), KnockOut(experts=(0,), mode="reroute")], [KnockOut(experts=(2,), mode="drop")]]
        ),
    ]
    for items in lists:
        logits = how(impl, tokens, items)[0]
        assert_near(logits, as_hooks(monkeypatch, lambda items=items: how(impl, tokens, items)))
    assert how(impl, tokens, EVERYTHING)[1] == ["hook", *["kernel"] * 8]
    assert how(impl, tokens, lists[2])[1] == ["kernel"] * 3
    assert how(impl, tokens, lists[3])[1] == ["kernel", "hook"]
    assert how(impl, tokens, lists[4])[1] == ["hook", "hook"], "what renormalises has to see what was done before"
    assert how(impl, tokens, lists[5])[1] == ["hook", "kernel"]
    assert how(impl, tokens, lists[7])[1] == ["kernel", "kernel", "hook"]


def test_the_table_says_why(moe: Qwen3Moe, tokens: Tensor) -> None:
    freeze = frozen(moe, tokens, weights=False)
    items = [
        KnockOut(experts=(1,), mode="drop", where=SOME),
        freeze,
        AddVector(vector=VECTOR),
        SteerRouter(experts=(2,), form="soft"),
    ]
    with moe.intervene(items):
        assert [row.ran for row in moe.intervention_table()] == [""] * 4
        moe(tokens)
        table = moe.intervention_table()
    assert [(row.kind, row.points, row.layers, row.why) for row in table] == [
        ("knock_out", ("routing_weights",), (0, 2), "limited to some tokens"),
        ("freeze_routing", ("expert_ids",), (0, 2), "the kernels have no argument for it"),
        ("add_vector", ("resid_post",), (0, 1, 2), "not part of the experts' kernels"),
        ("steer_router", ("router_logits",), (0, 2), "the kernels have no argument for it"),
    ]
    assert moe.intervention_table() == []


SEEN = {
    "router_logits": [BiasRouter(bias=BIAS), KnockOut(experts=(0,), mode="reroute")],
    "router_probs": [BiasRouter(bias=BIAS), KnockOut(experts=(0,), mode="reroute")],
    "expert_ids": [GIVEN],
    "routing_weights": [KnockOut(experts=(1, 2), mode="drop"), Reweight(experts=(3,), factor=2.0)],
    "expert_out": [ScaleExperts(experts=(1, 2), factor=2.0), SetExpertOutput(experts=(3,), value=VECTOR)],
}


@torch.no_grad()
@pytest.mark.parametrize("leaf", list(SEEN))
def test_a_hook_sees_what_interventions_leave_and_acts_after(
    leaf: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = init_weights(build_model(QWEN3_MOE, moe_impl="reference"), seed=1, std=0.2)
    items, seen = SEEN[leaf], []

    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        seen.append(x.clone())
        return x.flip(1)

    def run() -> tuple[Tensor, list[str]]:
        with model.intervene(items), model.hooks([(MLP + leaf, edit)]):
            return model(tokens), [row.ran for row in model.intervention_table()]

    expected = as_hooks(monkeypatch, run)
    unheard = how(model, tokens, items)  # type: ignore[arg-type]
    logits, ran = run()
    assert torch.equal(seen[0], seen[1]), "the same, whoever does it"
    assert torch.equal(logits, expected)
    assert unheard[1] == ["kernel"] * len(items)
    inside = "kernel" if leaf == "expert_out" else "kernel, hook"  # the other layer has no listener
    assert ran == [inside] * len(items)
    assert torch.equal(how(model, tokens, items)[0], unheard[0])  # type: ignore[arg-type]


@torch.no_grad()
def test_ids_that_a_later_hook_edits_are_the_ones_that_count(moe: Qwen3Moe, tokens: Tensor) -> None:
    """Also for a hook that was attached after the intervention."""
    forced = torch.tensor([5, 1, 2])
    drop = KnockOut(experts=(5,), mode="drop", where=Where(layers=(0,)))
    force = [(MLP + "expert_ids", lambda ids, hook: forced.expand_as(ids).clone())]
    with moe.intervene(drop), moe.hooks(force):
        _, cache = moe.run_with_cache(tokens, names_filter=MLP + "routing_weights")
    weights = cache[MLP + "routing_weights"]
    assert (weights[..., 0] == 0).all()
    assert (weights[..., 1:] > 0).all()


@torch.no_grad()
def test_arguments_stay_where_they_are_and_change_in_place(moe: Qwen3Moe, tokens: Tensor) -> None:
    items = [BiasRouter(bias=BIAS), ScaleExperts(experts=(1,), factor=2.0)]
    limited = BiasRouter(bias=BIAS, where=Where(positions=(-1,)))
    with moe.intervene(items), moe.intervene(limited):
        plan = moe.blocks[0].mlp.plan
        moe(tokens)
        first = plan.settle(tokens.shape)
        before, scale = first.router_bias.clone(), first.expert_scale
        moe(tokens, torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
        second = plan.settle(tokens.shape)
        assert second.router_bias.data_ptr() == first.router_bias.data_ptr()
        assert second.expert_scale.data_ptr() == scale.data_ptr()
        assert not torch.equal(second.router_bias, before), "the last token of a row is another one"
        for n_pos in range(1, 8):
            moe(tokens[:, :n_pos])
        assert len(plan._kept) <= 4


class _Cache:
    """What a batch asks of a cache: to be told from others, and which sequence a row continues."""

    def __init__(self) -> None:
        self.rows: dict[int, _Cache] = {}

    def of_row(self, row: int) -> _Cache:
        return self.rows.setdefault(row, _Cache())


class _Sent(TorchDispatchMode):
    """Counts copies of tensors on the host to the device, which is "meta" here."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        tensors = [value for value in args if isinstance(value, Tensor)]
        arrives = isinstance(out, Tensor) and out.device.type == "meta"
        self.n += arrives and any(tensor.device.type != "meta" for tensor in tensors)
        return out


@pytest.mark.parametrize("per_row", [False, True])
def test_a_decode_pass_sends_nothing_to_the_device_after_the_first(
    per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limited to positions, phases and languages as well as everywhere."""
    model, make = build_model(QWEN3_MOE, device="meta", moe_impl="sorted"), torch.tensor
    limited = [
        BiasRouter(bias=BIAS, where=SOME),
        KnockOut(experts=(0,), mode="reroute", where=Where(phase="decode", langs=("ja",))),
        KnockOut(experts=(1,), mode="reroute", where=Where(positions=(8, 9))),
    ]
    items = [*limited, *EVERYTHING[1:3], *EVERYTHING[4:]]
    rows = [Interventions(items, langs=["ja"]), Interventions(items[:-1], langs=["en"])]
    attached = PerRow(rows) if per_row else Interventions(items, langs=["ja", "en"])
    cache, sent = _Cache(), []

    def settle(positions: range) -> dict[str, Tensor]:
        counted = _Sent()

        def count(*args: Any, **kwargs: Any) -> Tensor:
            counted.n += 1
            return make(*args, **kwargs)

        where = make([list(positions)] * 2).to("meta")
        with monkeypatch.context() as patch, counted:
            patch.setattr(torch, "tensor", count)
            for batch in model.batches:
                batch.begin(None, where, None, positions.start > 0, cache)
            change = model.blocks[0].mlp.plan.settle(where.shape)
        sent.append(counted.n)
        return {name: getattr(change, name) for name in change.active}

    with torch.no_grad(), model.intervene(attached):
        settle(range(7))
        buffers = settle(range(7, 8))
        for position in (8, 9):
            again = settle(range(position, position + 1))
            assert all(again[name] is buffers[name] for name in buffers)
        outside = {row.kind for row in model.intervention_table() if row.ran != "kernel"}
    assert set(buffers) >= {"router_bias", "keep_mask"}
    assert per_row or not outside, "all of it in the kernels"
    assert sent[0] > 0
    assert sent[2:] == [0, 0]


def test_gradients_after_a_pass_in_inference_mode(moe: Qwen3Moe, tokens: Tensor) -> None:
    items = Interventions([BiasRouter(bias=BIAS, where=SOME), KnockOut(experts=(0,), mode="drop"), *EVERYTHING[6:]])

    def gradient() -> Tensor:
        return torch.autograd.grad(moe(tokens).square().sum(), moe.blocks[0].mlp.router.weight)[0]

    with moe.intervene(items):
        expected = gradient()
        moe.generate(tokens, max_new_tokens=2, stop_ids=())
        assert torch.equal(gradient(), expected)
    assert not torch.equal(gradient(), expected)


@torch.no_grad()
def test_half_precision_agrees_to_its_rounding(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for router_dtype in ("float32", "model"):
        model = init_weights(build_model(QWEN3_MOE, torch.bfloat16, router_dtype=router_dtype), seed=1, std=0.2)
        for item in SINGLE:
            logits, ran = how(model, tokens, item)  # type: ignore[arg-type]
            rounds = router_dtype == "model" and isinstance(item, BiasRouter | AddVector) and item in SINGLE[:3]
            assert ran == ["hook" if rounds else "kernel"], item
            expected = as_hooks(monkeypatch, lambda item=item, m=model: how(m, tokens, item))  # type: ignore[arg-type]
            assert ((logits - expected).float().norm() / expected.float().norm()) < 0.03, item
        with model.intervene(GIVEN):
            model(tokens)
            forced = model.blocks[0].mlp.plan.settle(tokens.shape).forced_weights
        assert forced.dtype == (torch.float32 if router_dtype == "float32" else torch.bfloat16), "as the router rounds"
