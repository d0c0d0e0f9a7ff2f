"""Expert patching against contributions computed by hand, and against planted causes of both kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closeness import near
from torch import Tensor

from workbench.errors import ConfigError, ShapeError
from workbench.experiments.expert_controls import _draw_with, expert_controls, find_expert, p_among, split_pairs
from workbench.experiments.expert_patching import patch_experts, run_deltas
from workbench.experiments.metrics import logit_difference
from workbench.experiments.pairs import Pairs
from workbench.hooks import HookPoint
from workbench.interventions import FreezeRouting, PatchActivations, Where
from workbench.models import Llama, Qwen3Moe
from workbench.planted.mechanisms import Mechanism, copying_head, deciding_route, writing_mlp

METRIC = logit_difference(40, 50)


@pytest.fixture(params=["values", "routing"])
def planted(request: pytest.FixtureRequest) -> tuple[Mechanism, str]:
    m = writing_mlp(n_pairs=12) if request.param == "values" else deciding_route(n_pairs=12)
    return m, request.param


@pytest.fixture
def pairs(tokens: Tensor) -> Pairs:
    return Pairs(tokens, tokens.flip(1))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_planted_experts_are_found_and_by_what_they_act(planted: tuple[Mechanism, str], direction: str) -> None:
    m, kind = planted
    task = Pairs(m.clean, m.corrupt), logit_difference(m.correct, m.wrong)
    result = patch_experts(m.model, *task, direction=direction, progress=False)
    means = result.mean("recovered", by=["mode", "layer", "expert", "coalition", "pos"])
    share = {"values": 1.0, "routing": 0.5}[kind]  # of two experts that oppose each other, each carries half
    for mode, layer, expert, coalition, pos, mean, *_ in means.iter_rows():
        found = mean if direction == "denoise" else 1 - mean
        here = (layer, pos) == (m.writer_layer, m.query_pos) and mode in ("both", kind)
        expected = 0.0 if not here else 1.0 if coalition == "every" else share * (expert in m.experts)
        assert found == pytest.approx(expected, abs=0.01), (mode, layer, expert, coalition, pos)
    ran = means.filter(pl.col("expert").is_in(m.experts) & (pl.col("layer") == m.writer_layer))
    assert m.query_pos in ran["pos"], "the planted experts are among those tried"


@torch.no_grad()
def test_contributions_by_hand(moe: Qwen3Moe, pairs: Pairs) -> None:
    """Each mode against experts run one by one on the two inputs, added with a plain hook."""
    layer, pos = 2, 4
    swept = patch_experts(moe, pairs, METRIC, layers=[layer], coalitions={"two": (1, 5)}, progress=False).frame
    mlp, ln2 = moe.blocks[layer].mlp, moe.blocks[layer].ln2

    def parts(tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(dense routing weights, every expert's output) at the position."""
        names = [f"blocks.{layer}.{leaf}" for leaf in ("hook_resid_mid", "mlp.hook_expert_ids")]
        names.append(f"blocks.{layer}.mlp.hook_routing_weights")
        _, cache = moe.run_with_cache(tokens, names_filter=names)
        x = ln2(cache[names[0]][:, pos])
        gate, up = torch.einsum("bd,efd->bef", x, mlp.gate_up).chunk(2, -1)
        out = torch.einsum("bef,edf->bed", torch.nn.functional.silu(gate) * up, mlp.down)
        g = torch.zeros(2, 8).scatter(1, cache[names[1]][:, pos], cache[names[2]][:, pos])
        return g, out

    (g_clean, e_clean), (g_corrupt, e_corrupt) = parts(pairs.clean), parts(pairs.corrupt)
    deltas = {
        "both": g_clean[..., None] * e_clean - g_corrupt[..., None] * e_corrupt,
        "values": g_corrupt[..., None] * (e_clean - e_corrupt),
        "routing": (g_clean - g_corrupt)[..., None] * e_corrupt,
    }  # [pair expert d_model]
    groups: list[tuple[str | int, list[int]]] = [(e, [e]) for e in range(8)]
    for mode, delta in deltas.items():
        for name, experts in [*groups, ("two", [1, 5]), ("every", list(range(8)))]:
            moved = delta[:, experts].sum(1)  # [pair d_model]

            def add(x: Tensor, hook: HookPoint, move: Tensor = moved) -> Tensor:
                x = x.clone()
                x[:, pos] += move
                return x

            logits = moe.run_with_hooks(pairs.corrupt, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", add)])
            column = "expert" if isinstance(name, int) else "coalition"
            rows = swept.filter((pl.col("mode") == mode) & (pl.col("pos") == pos) & (pl.col(column) == name))
            if rows.is_empty():  # ran in neither version
                assert (g_clean[:, experts] == 0).all()
                assert (g_corrupt[:, experts] == 0).all()
                continue
            assert rows["value"].to_list() == near(METRIC(logits), logits), (mode, name)
            assert rows["clean_weight"].to_list() == near(g_clean[:, experts].sum(1), 1)
            assert rows["corrupt_weight"].to_list() == near(g_corrupt[:, experts].sum(1), 1)


@torch.no_grad()
def test_all_experts_at_once_are_the_whole_mlp_output(moe: Qwen3Moe, pairs: Pairs) -> None:
    """The three modes of "every" are what interventions do to the whole layer."""
    where = Where(layers=(2,), positions=(3,))
    every = patch_experts(moe, pairs, METRIC, layers=[2], experts=[], progress=False).frame.filter(pl.col("pos") == 3)
    _, cache = moe.run_with_cache(pairs.clean, names_filter=lambda name: True)
    _, own = moe.run_with_cache(pairs.corrupt, names_filter=lambda name: True)
    mlp_in = {"blocks.2.ln2.hook_normalized": cache["ln2.normalized", 2]}
    changes = {
        "both": [PatchActivations.from_cache({"blocks.2.hook_mlp_out": cache["mlp_out", 2]}, where=where)],
        "values": [PatchActivations.from_cache(mlp_in, where=where), FreezeRouting.from_cache(own, where=where)],
        "routing": [FreezeRouting.from_cache(cache, where=where)],
    }
    for mode, items in changes.items():
        logits = moe(pairs.corrupt, interventions=items)
        found = every.filter((pl.col("mode") == mode) & (pl.col("coalition") == "every"))["value"].to_list()
        assert found == near(METRIC(logits), logits), mode


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_search_finds_the_planted_expert_and_the_controls_agree(
    planted: tuple[Mechanism, str], direction: str
) -> None:
    m, _ = planted
    result = find_expert(
        m.model, Pairs(m.clean, m.corrupt), logit_difference(m.correct, m.wrong), m.query_pos,
        direction=direction, progress=False,
    )  # fmt: skip
    assert (result.settings["layer"], result.settings["expert"]) == (m.writer_layer, m.experts[0])
    assert not set(result.settings["discovery"]) & set(result.settings["validation"])
    assert result.frame["control"].to_list() == ["random_expert", "gate_matched", "equal_norm"]
    assert (result.frame["p_draws"].drop_nulls() <= 0.05).all()
    assert result.frame["p_draws"].null_count() == 1, "gate_matched is not drawn"
    assert (result.frame["p_pairs"] <= 0.05).all()
    assert (result.frame["low"] > 0.3).all(), "specific"
    assert result.frame["control_effect"].head(2).to_list() == pytest.approx([0, 0], abs=0.01)
    assert (result.frame["n_pairs"] == 6).all()


def test_an_idle_expert_is_not_specific() -> None:
    m = writing_mlp(n_pairs=12)
    task = Pairs(m.clean, m.corrupt), logit_difference(m.correct, m.wrong)
    frame = patch_experts(m.model, *task, layers=[2], modes=["both"], progress=False).frame
    others = frame.filter(
        (pl.col("pos") == m.query_pos) & (pl.col("clean_weight") > 0) & pl.col("expert").is_not_null()
    )
    idle = next(expert for expert in others["expert"] if expert not in m.experts)
    table = expert_controls(m.model, *task, 2, idle, m.query_pos).frame
    by_control = {row["control"]: row for row in table.iter_rows(named=True)}
    assert by_control["random_expert"]["effect"] == pytest.approx(0, abs=0.01)
    assert by_control["random_expert"]["difference"] < 0, "the expert it is compared with is the planted one"
    assert by_control["random_expert"]["p_draws"] > 0.5


def test_halves_depend_on_names_alone() -> None:
    names = [f"fact-{i}" for i in range(11)]
    discovery, validation = split_pairs(names)
    assert sorted(discovery + validation) == sorted(names)
    assert (len(discovery), len(validation)) == (5, 6)
    shuffled = split_pairs(names[::-1])
    assert set(shuffled[0]) == set(discovery)


def test_what_cannot_be_patched_is_named(llama: Llama, moe: Qwen3Moe, pairs: Pairs) -> None:
    with pytest.raises(ConfigError, match="expected a mixture of experts"):
        patch_experts(llama, pairs, METRIC)
    with pytest.raises(ShapeError, match="layers: expected layers with experts, got 1"):
        patch_experts(moe, pairs, METRIC, layers=[1])
    with pytest.raises(ShapeError, match="experts: expected 0 to 7, got 9"):
        patch_experts(moe, pairs, METRIC, experts=[9])
    with pytest.raises(ShapeError, match="modes: expected some of both, values, routing, got value"):
        patch_experts(moe, pairs, METRIC, modes=["value"])
    with pytest.raises(ShapeError, match="expected at least 4 to split"):
        find_expert(moe, pairs, METRIC, 3)
    with pytest.raises(ShapeError, match="pos: expected one of 0, 1"):
        expert_controls(moe, pairs, METRIC, 2, 0, 9)
    m = copying_head("qwen3_moe")
    with pytest.raises(ShapeError, match="min_active: expected an expert"):
        find_expert(
            m.model, Pairs(m.clean, m.corrupt), logit_difference(m.correct, m.wrong), 0, min_active=1.1, progress=False
        )


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("active", [True, False])
def test_p_is_calibrated_when_all_experts_are_alike(k: int, active: bool) -> None:
    """Exchangeable effects: p of 0.05 or less comes in about 5% of the tries, the expert itself being in the pool."""
    generator = torch.Generator().manual_seed(k)
    small = 0
    for _ in range(400):
        effects = torch.randn(k, 8, generator=generator)
        is_other = torch.ones(8, k).bool()
        is_other[:, 0] = not active
        own = effects[0] if active else torch.randn(8, generator=generator)
        draws = _draw_with(effects, is_other, own, 199, generator)
        assert draws.shape == (199, 8)
        small += p_among(own.double().numpy(), draws.double().numpy()) <= 0.05
    assert small / 400 <= 0.085


def test_p_counts_the_effect_itself_and_its_equals() -> None:
    draws = np.array([[0.1, 0.1], [0.2, 0.3], [0.3, 0.2]])
    assert p_among(np.array([1.0, 1.0]), draws) == 1 / 4, "never 0"
    assert p_among(np.array([0.2, 0.3]), draws) == 3 / 4
    assert p_among(np.array([0.0, 0.0]), draws) == 1


def test_random_directions_are_as_long_as_the_patch_in_every_pair(
    moe: Qwen3Moe, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[Tensor] = []

    def noted(runs: Any, layer: int, deltas: Tensor, places: Tensor) -> Tensor:
        passed.extend(deltas)
        return run_deltas(runs, layer, deltas, places)

    monkeypatch.setattr("workbench.experiments.expert_controls.run_deltas", noted)
    _, cache = moe.run_with_cache(pairs.clean)
    expert = int(cache["expert_ids", 2][0, 3, 0])
    expert_controls(moe, pairs, METRIC, 2, expert, 3, n_directions=5)
    own, random = passed[0].norm(dim=-1), torch.stack(passed[-5:]).norm(dim=-1)  # [pair], [direction pair]
    assert abs(float(own[0] - own[1])) > 1e-3, "lengths differ, so that their mean would be seen"
    torch.testing.assert_close(random, own.expand(5, -1), atol=1e-5, rtol=1e-4)


def test_controls_have_student_intervals(moe: Qwen3Moe) -> None:
    clean = torch.randint(5, 60, (5, 7), generator=torch.Generator().manual_seed(0))
    table = expert_controls(moe, Pairs(clean, clean.roll(1, 1)), METRIC, 2, 1, 3, n_draws=9, n_directions=3).frame
    centre = (table["low"] + table["high"]) / 2
    assert centre.to_list() == pytest.approx(table["difference"].to_list(), abs=1e-9), (
        "symmetric, as a bootstrap's is not"
    )


def test_only_p_sees_the_expert_among_its_controls(
    moe: Qwen3Moe, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool of p holds the expert; the mean it is compared with holds others alone."""
    plain = expert_controls(moe, pairs, METRIC, 2, 1, 3, n_draws=9, n_directions=3).frame
    monkeypatch.setattr(
        "workbench.experiments.expert_controls._draw_with", lambda slots, other, own, n, _: own.expand(n, -1)
    )
    table = expert_controls(moe, pairs, METRIC, 2, 1, 3, n_draws=9, n_directions=3).frame
    assert table["p_draws"][0] == 1
    assert table["control_effect"][0] == plain["control_effect"][0]
