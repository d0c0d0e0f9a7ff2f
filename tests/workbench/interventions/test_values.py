"""What a field may hold: everything else is one InterventionError, when read or when attached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_near
from torch import Tensor

from workbench.errors import InterventionError
from workbench.interventions import (
    AddVector,
    BiasRouter,
    FreezeRouting,
    Intervention,
    Interventions,
    PatchActivations,
    ProjectOut,
    Reweight,
    ScaleActivation,
    SetActivation,
    SetExpertOutput,
    SwapRouting,
    Where,
    from_json,
    load_interventions,
    save_interventions,
)
from workbench.models import Qwen3Moe

VECTOR = [0.5] * 32
IDS = [[[0, 1, 2]]]
POINT = "blocks.0.hook_resid_post"
WRONG = {
    "kind a list": {"kind": ["knock_out"]},
    "tensor a list": {"kind": "add_vector", "vector": {"tensor": ["a"]}},
    "dtype a module": {"kind": "add_vector", "vector": {"dtype": "nn", "values": VECTOR}},
    "dtype unknown": {"kind": "add_vector", "vector": {"dtype": "nonsense", "values": VECTOR}},
    "values a text": {"kind": "add_vector", "vector": {"dtype": "float32", "values": "abc"}},
    "values ragged": {"kind": "add_vector", "vector": {"dtype": "float32", "values": [[1], [1, 2]]}},
    "ids a list": {"kind": "freeze_routing", "ids": [1], "lengths": [1]},
    "ids empty": {"kind": "freeze_routing", "ids": {}, "lengths": [1]},
    "ids of no layer": {"kind": "freeze_routing", "ids": {"x": IDS}, "lengths": [1]},
    "ids fractional": {"kind": "freeze_routing", "ids": {"0": [[[0.7, 1.7, 2.7]]]}, "lengths": [1]},
    "ids too large": {"kind": "freeze_routing", "ids": {"0": [[[0, 1, 8]]]}, "lengths": [1]},
    "ids twice": {"kind": "freeze_routing", "ids": {"0": [[[3, 3, 3]]]}, "lengths": [1]},
    "values empty": {"kind": "patch_activations", "values": {}, "lengths": [1]},
    "values a list": {"kind": "patch_activations", "values": [1], "lengths": [1]},
    "patch length a text": {"kind": "patch_activations", "values": {POINT: [[VECTOR]]}, "lengths": ["1"]},
    "patch length negative": {"kind": "patch_activations", "values": {POINT: [[VECTOR]]}, "lengths": [-5]},
    "scale a text": {"kind": "add_vector", "vector": VECTOR, "scale": "2"},
    "scale none": {"kind": "add_vector", "vector": VECTOR, "scale": None},
    "scale a list": {"kind": "add_vector", "vector": VECTOR, "scale": [2]},
    "scale true": {"kind": "add_vector", "vector": VECTOR, "scale": True},
    "scale not finite": {"kind": "add_vector", "vector": VECTOR, "scale": float("nan")},
    "scale of project_out": {"kind": "project_out", "direction": VECTOR, "scale": "x"},
    "scale of bias_router": {"kind": "bias_router", "bias": [1.0] * 8, "scale": "x"},
    "point a number": {"kind": "add_vector", "vector": VECTOR, "point": 5},
    "renormalise a text": {"kind": "reweight", "experts": [1], "factor": 2, "renormalise": "false"},
    "activate a text": {"kind": "steer_router", "experts": [1], "form": "soft", "activate": "false"},
    "add a text": {"kind": "set_expert_output", "experts": [1], "value": VECTOR, "add": "no"},
    "form a list": {"kind": "steer_router", "experts": [1], "form": ["soft"]},
    "rows booleans": {"kind": "swap_routing", "rows": [True, False]},
} | {f"lengths {v}": {"kind": "freeze_routing", "ids": {"0": IDS}, "lengths": v} for v in ("9", [1, 1], [99], [-3], 5)}


@pytest.mark.parametrize("entry", WRONG.values(), ids=WRONG.keys())
def test_wrong_values_are_one_clear_error(moe: Qwen3Moe, entry: dict[str, object]) -> None:
    with pytest.raises(InterventionError, match="expected"):
        Interventions(from_json({"format": 1, "interventions": [entry]})).check(moe)


@pytest.mark.parametrize(
    "value", [{"format": True, "interventions": []}, {"format": 1, "interventions": [], "where": {"layers": [2]}}]
)
def test_the_top_level_holds_format_and_interventions_only(value: dict[str, object]) -> None:
    with pytest.raises(InterventionError, match=r'interventions: expected \{"format": 1, "interventions"'):
        from_json(value)


def test_constructors_say_the_same_as_files() -> None:
    for make in (
        lambda: Reweight(experts=1.5, factor=2.0),  # type: ignore[arg-type]
        lambda: SwapRouting(rows=3),  # type: ignore[arg-type]
        lambda: FreezeRouting(ids=[1], lengths=(1,)),  # type: ignore[arg-type]
        lambda: ScaleActivation(factor=[2]),  # type: ignore[arg-type]
        lambda: Interventions(3),  # type: ignore[arg-type]
    ):
        with pytest.raises(InterventionError, match="expected"):
            make()


@torch.no_grad()
def test_a_whole_cache_can_be_patched_and_saved(moe: Qwen3Moe, tokens: Tensor, tmp_path: Path) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    logits, cache = moe.run_with_cache(tokens.flip(0), attention_mask=mask)
    patch = PatchActivations.from_cache(cache, mask)
    assert "blocks.0.mlp.hook_expert_load" in cache
    assert set(patch.values) == {name for name, value in cache.items() if value.ndim > 2 and value.is_floating_point()}
    assert_near(moe(tokens, mask, interventions=[patch])[mask.bool()], logits[mask.bool()])
    path = save_interventions([patch], tmp_path / "patch.json")
    assert torch.equal(
        moe(tokens, mask, interventions=load_interventions(path)), moe(tokens, mask, interventions=[patch])
    )


def test_large_tensors_that_share_storage_are_saved(tmp_path: Path) -> None:
    base = torch.randn(2, 50, 100)
    shared = PatchActivations(
        values={"blocks.0.hook_resid_post": base, "blocks.1.hook_resid_pre": base}, lengths=(50, 50)
    )
    first, second = load_interventions(save_interventions([shared, shared], tmp_path / "shared.json"))
    for again in (first, second):
        assert isinstance(again, PatchActivations)
        assert all(torch.equal(value, base) for value in again.values.values())


def test_numpy_numbers_are_saved(tmp_path: Path) -> None:
    item = ScaleActivation(factor=np.float32(0.1))  # type: ignore[arg-type]
    (again,) = load_interventions(save_interventions([item], tmp_path / "factor.json"))
    assert isinstance(again, ScaleActivation)
    assert again.factor == float(np.float32(0.1))


def test_values_stay_what_they_were() -> None:
    given, array = torch.ones(4), np.ones(4, dtype=np.float32)
    recorded, ids = torch.ones(1, 2, 4), torch.tensor([[[0, 1, 2]]])
    held = [
        AddVector(vector=given).vector,
        AddVector(vector=array).vector,  # type: ignore[arg-type]
        ProjectOut(direction=given).direction,
        SetActivation(value=given).value,
        SetExpertOutput(experts=(0,), value=given).value,
        BiasRouter(bias=given).bias,
        PatchActivations(values={"a": recorded}, lengths=(2,)).values["a"],
        FreezeRouting(ids={0: ids}, lengths=(1,)).ids[0],
    ]
    before = [torch.as_tensor(value).clone() for value in held]
    for caller in (given, array, recorded, ids):
        caller += 5
    assert all(torch.equal(torch.as_tensor(now), then) for now, then in zip(held, before, strict=True))


@pytest.mark.parametrize(
    ("item", "leaf"),
    [
        (AddVector(vector=torch.zeros(32)), "hook_resid_post"),
        (AddVector(vector=torch.ones(32), scale=0.0), "hook_resid_post"),
        (BiasRouter(bias=torch.zeros(8)), "mlp.hook_router_logits"),
        (SetExpertOutput(experts=(0, 1, 2), value=torch.zeros(32), add=True), "mlp.hook_expert_out"),
    ],
)
def test_adding_zeros_keeps_the_sign_of_zero(moe: Qwen3Moe, tokens: Tensor, item: Intervention, leaf: str) -> None:
    point = moe.hook_dict[f"blocks.0.{leaf}"]
    seen: list[Tensor] = []
    everywhere = Where(positions=tuple(range(7)))  # as a hook: a kernel's scale of 0 leaves +0.0
    items = Interventions([SetActivation(value=-0.0, point=point.name, where=everywhere), item])
    with torch.no_grad(), moe.intervene(items), moe.hooks([(point.name, lambda x, hook: seen.append(x))]):
        moe(tokens)
    assert torch.signbit(seen[0]).all()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (PatchActivations(values={POINT: torch.ones(1, 1, 32)}, lengths=(1,), where=Where(heads=(0,))), "a head axis"),
        (Reweight(experts=(0,), factor=2.0, where=Where(heads=(0,))), "reweight heads: expected none"),
        (BiasRouter(bias=torch.ones(8), where=Where(heads=(0,))), "bias_router heads: expected none"),
        (SwapRouting(rows=(0, 1), where=Where(heads=())), "swap_routing heads: expected none"),
        (
            AddVector(vector=torch.ones(32), point=POINT, where=Where(layers=(1,))),
            "layers: expected none with the full",
        ),
        (AddVector(vector=torch.ones(32), point="hook_embed", where=Where(layers=(0,))), "layers: expected none with"),
        (
            PatchActivations(values={POINT: torch.ones(1, 1, 32)}, lengths=(1,), where=Where(layers=(1, 2))),
            r"layers: expected some with recorded values, got \(1, 2\)",
        ),
    ],
)
def test_limits_that_would_be_ignored_are_refused(moe: Qwen3Moe, item: Intervention, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        Interventions([item]).check(moe)


@torch.no_grad()
def test_heads_of_a_patch_are_heads(moe: Qwen3Moe, tokens: Tensor) -> None:
    name = "blocks.0.attn.hook_z"
    other = moe.run_with_cache(tokens.flip(0))[1][name]
    own = moe.run_with_cache(tokens)[1][name]
    patch = PatchActivations.from_cache({name: other}, where=Where(heads=(1,)))
    found = moe.run_with_cache(tokens, interventions=[patch])[1][name]
    assert torch.equal(found[:, :, 1], other[:, :, 1])
    assert torch.equal(found[:, :, [0, 2, 3, 4, 5]], own[:, :, [0, 2, 3, 4, 5]])
    with pytest.raises(InterventionError, match="patch_activations heads: expected 0 to 5, got 6"):
        Interventions([PatchActivations.from_cache({name: other}, where=Where(heads=(6,)))]).check(moe)


def test_the_name_of_a_file_is_no_list_of_interventions() -> None:
    with pytest.raises(InterventionError, match=r"got 'change.json'. Use Interventions.load"):
        Interventions("change.json")  # type: ignore[arg-type]
