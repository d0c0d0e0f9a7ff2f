from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.errors import InterventionError
from workbench.interventions import (
    AddVector,
    BiasRouter,
    ForceExperts,
    FreezeRouting,
    Intervention,
    Interventions,
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
    from_json,
    load_interventions,
    save_interventions,
    to_json,
)
from workbench.interventions.base import KINDS
from workbench.models import Llama, Qwen3Moe


def one_of_each(moe: Qwen3Moe, tokens: Tensor) -> list[Intervention]:
    _, cache = moe.run_with_cache(tokens)
    somewhere = Where(layers=(0, 2), positions=(1, -1), phase="prefill")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return [
        AddVector(vector=vector, scale=0.3, where=somewhere),
        ProjectOut(direction=vector.to(torch.bfloat16), point="mlp_out"),
        SetActivation(value=vector, point="attn_out", where=Where(layers=(1,))),
        SetActivation(value=0.25, point="z", where=Where(heads=(2,))),
        ScaleActivation(factor=0.1, where=somewhere),
        PatchActivations.from_cache({"blocks.2.hook_resid_mid": cache["resid_mid", 2]}, where=somewhere),
        KnockOut(experts=(6, 5), mode="drop"),
        ForceExperts(experts=(3, 1, 2), weights=(0.5, 0.25, 0.25), where=somewhere),
        SteerRouter(experts=(7,), form="steermoe", activate=False),
        Reweight(experts=(2,), factor=3.0, renormalise=True),
        ScaleExperts(experts=(4,), factor=1 / 3),
        SetExpertOutput(experts=(4,), value=vector, add=True),
        BiasRouter(bias=torch.arange(8) / 7, scale=-1.0),
        SwapRouting(rows=(1, 0), where=Where(positions=(3,))),
        FreezeRouting.from_cache(cache, where=Where(layers=(2,), positions=(2, 3))),
    ]


@torch.no_grad()
def test_files_give_back_every_kind_to_the_bit(moe: Qwen3Moe, tokens: Tensor, tmp_path: Path) -> None:
    items = one_of_each(moe, tokens)
    assert {item.kind for item in items} == set(KINDS)
    again = load_interventions(save_interventions(items, tmp_path / "all.json"))
    assert [type(item) for item in again] == [type(item) for item in items]
    assert to_json(again) == to_json(items)
    for one, other in zip(items, again, strict=True):
        assert torch.equal(moe(tokens, interventions=[one]), moe(tokens, interventions=[other])), one.kind
    assert torch.equal(moe(tokens, interventions=items), moe(tokens, interventions=again))
    assert torch.equal(
        moe(tokens, interventions=from_json(json.loads(json.dumps(to_json(items))))), moe(tokens, interventions=items)
    )


def test_large_tensors_lie_beside_the_json(tmp_path: Path) -> None:
    value = torch.randn(3, 20, 100)
    items = [PatchActivations(values={"blocks.0.hook_resid_pre": value}, lengths=(20, 20, 7))]
    path = save_interventions(items, tmp_path / "patch.json")
    assert path.stat().st_size < 400
    (again,) = load_interventions(path)
    assert isinstance(again, PatchActivations)
    assert torch.equal(again.values["blocks.0.hook_resid_pre"], value)
    (tmp_path / "patch.safetensors").unlink()
    with pytest.raises(InterventionError, match=r"expected tensor .* in the .safetensors file, got none"):
        load_interventions(path)


def test_defaults_are_left_out_of_the_json() -> None:
    assert to_json([KnockOut(experts=(3,), mode="reroute", where=Where(layers=(2,)))]) == {
        "format": 1,
        "interventions": [{"kind": "knock_out", "experts": [3], "mode": "reroute", "where": {"layers": [2]}}],
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "knockout"}, "intervention 0: expected a kind among add_vector, .*, got 'knockout'"),
        (
            {"kind": "knock_out", "experts": [1]},
            r"intervention 0 \(knock_out\): expected where, experts, mode, got no mode",
        ),
        ({"kind": "knock_out", "experts": [1], "mode": "mask"}, "mode: expected one of reroute, drop, drop_renorm"),
        ({"kind": "knock_out", "experts": [1, 1], "mode": "drop"}, "experts: expected different expert numbers"),
        ({"kind": "scale_activation", "factor": 1, "size": 2}, "got an unknown size"),
        ({"kind": "scale_activation", "size": 2}, "got no factor and an unknown size"),
        (
            {"kind": "scale_activation", "factor": 1, "where": {"layer": 1}},
            "where: expected some of layers, .*, got layer",
        ),
        ({"kind": "add_vector", "vector": ["a"]}, "vector: expected numbers"),
        ({"kind": "add_vector", "vector": [float("nan")]}, "vector: expected finite numbers"),
        ({"kind": "project_out", "direction": [0, 0]}, "direction: expected a vector with a length, got zeros"),
        ({"kind": "steer_router", "experts": 1, "form": "loud"}, "form: expected one of steermoe"),
        ("knock_out", "expected a kind among"),
    ],
)
def test_entries_that_are_wrong_are_named(entry: object, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        from_json({"format": 1, "interventions": [entry]})


def test_a_list_knows_its_file_and_its_document(tmp_path: Path) -> None:
    items = [KnockOut(experts=(3,), mode="drop"), SteerRouter(experts=(2,), form="hard", seed=7)]
    path = save_interventions(items, tmp_path / "two.json")
    document = json.loads(path.read_text())
    for given in (
        Interventions.load(path, langs=["ja"]),
        Interventions.from_json(document, langs=["ja"]),
        Interventions.from_json(path.read_text(), langs=["ja"]),
    ):
        assert to_json(given.items) == document
        assert given.langs == ["ja"]
    for text, message in (
        ("{", "interventions: expected JSON, got Expecting property name"),
        ("[" * 10**5, "interventions: expected JSON, got maximum recursion depth"),
        ("[]", "interventions: expected .*format"),
        (document | {"format": 2}, "interventions: expected .*format"),
    ):
        with pytest.raises(InterventionError, match=message):
            Interventions.from_json(text)
    document["interventions"][1]["seed"] = "7"
    with pytest.raises(InterventionError, match=r"intervention 1 \(steer_router\): seed: expected whole numbers"):
        Interventions.from_json(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InterventionError, match=r"two\.json: intervention 1 \(steer_router\): seed: expected"):
        Interventions.load(path)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(InterventionError, match="expected interventions as JSON"):
        load_interventions(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InterventionError, match=r"list\.json: interventions: expected"):
        load_interventions(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            AddVector(vector=torch.ones(31)),
            r"vector: expected the last axes of .* \(32,\), got \(31,\)",
        ),
        (AddVector(vector=torch.ones(32), point="resid_past"), "point: .*resid_past.*Did you mean"),
        (AddVector(vector=torch.ones(32), point="normalized"), "point: expected one of .*ln1.*ln2"),
        (AddVector(vector=torch.ones(32), where=Where(layers=(3,))), "add_vector layers: expected 0 to 2, got 3"),
        (ScaleActivation(factor=1.0, point="pattern"), "expected a point with an activation for every token"),
        (
            ScaleActivation(factor=1.0, point="expert_load", where=Where(layers=(0,))),
            "expected a point with an activation",
        ),
        (ScaleActivation(factor=1.0, where=Where(heads=(0,))), "heads: expected a point with a head axis"),
        (ScaleActivation(factor=1.0, point="v", where=Where(heads=(2,))), "heads: expected 0 to 1, got 2"),
        (KnockOut(experts=(8,), mode="drop"), "knock_out experts: expected 0 to 7, got 8"),
        (KnockOut(experts=(0,), mode="drop", where=Where(layers=(1,))), "expected a layer with experts, got 1"),
        (KnockOut(experts=tuple(range(6)), mode="reroute"), "expected at least k = 3 experts to be left, got 2"),
        (ForceExperts(experts=(0, 1, 2, 3)), "expected at most k = 3 experts, got 4"),
        (ForceExperts(experts=(0,), weights=(1.0,)), "expected all k = 3 experts and as many weights, got 1 and 1"),
        (BiasRouter(bias=torch.zeros(7)), r"bias: expected \[8\], got \(7,\)"),
        (SetExpertOutput(experts=(0,), value=torch.zeros(3)), r"value: expected \[32\], got \(3,\)"),
        (FreezeRouting(ids={0: torch.zeros(1, 2, 2).long()}, lengths=(2,)), r"expected expert_ids \[row position 3\]"),
    ],
)
def test_what_does_not_fit_the_model_is_named(moe: Qwen3Moe, item: Intervention, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        Interventions([item]).check(moe)


def test_experts_in_a_dense_model_are_named(llama: Llama) -> None:
    with pytest.raises(InterventionError, match="expected a mixture of experts, got 'llama' without any"):
        Interventions([KnockOut(experts=(0,), mode="drop")]).check(llama)
    with pytest.raises(InterventionError, match="interventions: expected values such as"):
        Interventions([{"kind": "knock_out"}])  # type: ignore[list-item]
