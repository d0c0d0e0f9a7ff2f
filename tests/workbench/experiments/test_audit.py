"""The audit against planted truth, and its edits against the same edits done by hand."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
import torch

from workbench.errors import ConfigError
from workbench.experiments.audit import (
    AUDIT_SCHEMA,
    MOST_SCALED,
    AuditPlan,
    _selectivity,
    audit_experts,
    draw_controls,
    pair_effects,
    removal_effects,
)
from workbench.experiments.knockout import Edit, routing_of, run_edits
from workbench.models import Llama, Qwen3Moe
from workbench.planted.design import Design
from workbench.planted.documents import language_documents, sequences
from workbench.planted.experts import plant

DESIGN = Design(n_experts=32, k=4, n_layers=2, strength=0.25)
LAST = DESIGN.n_layers - 1
EVERY = list(itertools.product(range(DESIGN.n_layers), range(DESIGN.n_experts)))


def expert(role: str) -> int:
    return DESIGN.roles[role][0]


@pytest.fixture(scope="module")
def planted() -> Qwen3Moe:
    return plant(DESIGN)


@pytest.fixture(scope="module")
def documents() -> pl.DataFrame:
    return language_documents(8, 40, seed=11, fertility=1.25)  # lengths differ, so batches are padded


@pytest.fixture(scope="module")
def audit(planted: Qwen3Moe, documents: pl.DataFrame) -> pl.DataFrame:
    flagged = [(LAST, expert(role)) for role in ("writer", "ja_context", "idle")]
    supers = [(layer, expert("super")) for layer in range(2)]
    return audit_experts(planted, documents, flagged, AuditPlan(), exclude=supers)


def row(audit: pl.DataFrame, role: str, kind: str) -> dict[str, float]:
    return audit.filter(expert=expert(role), kind=kind).row(0, named=True)


def test_the_causal_writer_matters_and_for_japanese(audit: pl.DataFrame) -> None:
    dropped = row(audit, "writer", "drop")
    assert dropped["p_kl"] <= 0.05
    assert dropped["p_kl_adjusted"] == pytest.approx(dropped["least_p"]), "the least that twenty controls can show"
    assert dropped["kl"] > 3 * dropped["control_kl_max"]
    for kind in ("drop", "reroute"):
        writer = row(audit, "writer", kind)
        assert writer["kl"] > writer["control_kl"]  # rerouting also lets others in, and some of them are loud
        assert writer["d_nll_ja_low"] > 0
        assert writer["selectivity_low"] > 0.5
    forced = row(audit, "writer", "force")
    assert forced["d_nll_en_low"] > 0.1  # it suppresses English where it is forced
    assert forced["selectivity_high"] < 0
    assert forced["p_selective"] <= 0.05


def test_an_expert_that_is_only_flagged_does_not_matter(audit: pl.DataFrame) -> None:
    """ja_context is routed by language as strongly as the writer, and writes nothing of note."""
    for kind in ("drop", "reroute", "force"):
        assert row(audit, "ja_context", kind)["p_kl"] > 0.1
        assert row(audit, "ja_context", kind)["p_kl_adjusted"] > 0.1


def test_the_idle_expert_is_causally_last(planted: Qwen3Moe, documents: pl.DataFrame, audit: pl.DataFrame) -> None:
    assert row(audit, "idle", "drop")["kl"] == 0
    assert row(audit, "idle", "drop")["load"] > 2 * DESIGN.k / DESIGN.n_experts
    effects = removal_effects(planted, documents, EVERY, kind="drop")
    used = routing_of(planted, documents).any(0)
    in_use = effects.filter(pl.Series([used[layer, e] for layer, e in EVERY]))
    for (layer,), part in in_use.group_by("layer"):
        ranked = part.sort("kl")
        lowest = ranked.filter(~pl.col("expert").is_in([expert("idle"), expert("super"), expert("bos")]))["kl"][0]
        assert ranked.filter(expert=expert("idle"))["kl"][0] < lowest, layer


def test_the_redundant_pair_is_found_by_pair_removal_alone(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    twins = DESIGN.roles["twin"]
    pairs = [twins, *itertools.combinations(range(0, 30, 5), 2)]
    found = pair_effects(planted, documents, LAST, pairs)
    assert found.select("expert_a", "expert_b").row(0) == twins
    assert found["excess_low"][0] > 5 * found["excess"][1]
    assert found["kl_both"][0] > 100 * max(found["kl_a"][0], found["kl_b"][0])


def test_intervals_of_selectivity_hold_it() -> None:
    """Effects that are certain and skewed, as losses are; and effects that are noise, where nothing is ruled out."""
    rng, n_groups = np.random.default_rng(0), 20
    held = []
    for _ in range(200):
        content = 0.7 * rng.normal(size=n_groups)  # hard groups are hard in both languages
        ja, en = (mean * np.exp(content + 0.5 * rng.normal(size=n_groups)) for mean in (0.1, 0.05))
        found = _selectivity(ja, en)
        held.append(found["selectivity_low"] <= 1 / 3 <= found["selectivity_high"])
    assert 0.91 <= np.mean(held) <= 0.98
    opposed = _selectivity(rng.normal(-0.01, 0.1, n_groups), rng.normal(0.5, 0.1, n_groups))
    assert (opposed["selectivity"], opposed["selectivity_low"]) == (-1, -1)
    assert -0.95 < opposed["selectivity_high"] < -0.6  # Japanese may lose a little too
    noise = [_selectivity(*rng.normal(0.01, 0.1, (2, n_groups))) for _ in range(50)]
    assert np.mean([found["selectivity_high"] - found["selectivity_low"] == 2 for found in noise]) > 0.7


def test_every_number_has_its_count_and_columns(audit: pl.DataFrame) -> None:
    assert audit.schema == pl.Schema(AUDIT_SCHEMA)
    assert audit["n_controls"].unique().to_list() == [20]
    assert audit["n_groups"].unique().to_list() == [8]
    assert audit["n_docs"].unique().to_list() == [16]
    assert audit["p_kl"].min() == pytest.approx(1 / 21)
    assert audit["n_tests"].unique().to_list() == [3]
    assert (audit["p_kl_adjusted"] >= audit["p_kl"]).all()
    removals = audit.filter(pl.col("kind") != "force")
    assert (removals["control_load"] <= removals["load"]).all()


def test_controls_are_other_experts_each_once_and_on_at_most_as_many_slots(
    planted: Qwen3Moe, documents: pl.DataFrame
) -> None:
    chosen = routing_of(planted, documents)[:, LAST]
    loads, rng = chosen.sum(0), np.random.default_rng(0)
    banned = {(LAST, 3), (LAST, 4), (0, 7)}
    for target in range(DESIGN.n_experts):
        controls = draw_controls("drop", LAST, target, chosen, banned, 20, rng)
        experts = [edit.experts[0] for edit, _ in controls]
        assert len(set(experts)) == len(experts) == 20
        assert not {3, 4, target} & set(experts)
        free = set(range(DESIGN.n_experts)) - {3, 4, target}
        near = {other for other in free if loads[other] >= loads[target] / MOST_SCALED}
        assert set(experts) <= near or near < set(experts)
        for edit, n_slots in controls:
            (other,), (rows,) = edit.experts, edit.at
            assert len(set(rows.tolist())) == n_slots == min(loads[other], loads[target])
            assert chosen[rows, other].all()
    forced = draw_controls("force", LAST, 0, chosen, banned, 99, rng)
    assert sorted(edit.experts[0] for edit, _ in forced) == sorted(set(range(1, DESIGN.n_experts)) - {3, 4})


@pytest.mark.parametrize("kind", ["reroute", "force"])
@pytest.mark.parametrize("busy", [False, True])
def test_experts_like_any_other_are_found_in_one_of_twenty(
    planted: Qwen3Moe, documents: pl.DataFrame, kind: str, busy: bool
) -> None:
    """Through the drawing of controls: every expert has an effect per slot of its own, all drawn alike."""
    chosen, rng, errors, n_trials = routing_of(planted, documents)[:, LAST], np.random.default_rng(1), 0, 400
    loads = chosen.sum(0)
    pool = np.argsort(-loads)[:10] if busy else np.flatnonzero(loads)
    for _ in range(n_trials):
        effect, flagged = np.exp(rng.normal(size=DESIGN.n_experts)), int(rng.choice(pool))
        controls = draw_controls(kind, LAST, flagged, chosen, {(LAST, flagged)}, 20, rng)
        errors += all(effect[edit.experts[0]] < effect[flagged] for edit, _ in controls)
    assert errors <= 30  # 19 expected of 400; more than 30 has probability 0.006


def test_edits_do_what_the_same_hooks_do_by_hand(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    tokens = documents.filter(pl.col("doc_id") == documents["doc_id"][0])
    ids = torch.tensor(sequences(tokens))
    content = torch.tensor(~tokens["segment"].is_in(["bos", "control"]).to_numpy())
    target = expert("writer")

    def log_probs(point: str, hook) -> torch.Tensor:
        with torch.inference_mode():
            logits = planted.run_with_hooks(ids, fwd_hooks=[(f"blocks.0.mlp.{point}", hook)] if hook else [])
        return logits.log_softmax(-1)[0]

    def minus_infinity(logits, hook):
        logits = logits.clone()
        logits[..., target] = -torch.inf
        return logits

    def always(logits, hook):
        logits = logits.clone()
        logits[..., target] = logits.amax(-1) + 0.01
        return logits

    chosen: dict[str, torch.Tensor] = {}

    def zero(weights, hook):
        return weights.masked_fill(chosen["ids"] == target, 0)

    with planted.hooks([("blocks.0.mlp.hook_expert_ids", lambda x, hook: chosen.__setitem__("ids", x))]):
        before = log_probs("hook_routing_weights", None)
    by_hand = {
        "reroute": log_probs("hook_router_logits", minus_infinity),
        "force": log_probs("hook_router_logits", always),
        "drop": log_probs("hook_routing_weights", zero),
    }
    edits = [Edit(kind, 0, (target,)) for kind in by_hand]
    outcome = run_edits(planted, tokens, edits)
    for place, after in enumerate(by_hand.values()):
        kl = (before.exp() * (before - after)).sum(-1)[content].mean()
        targets = ids[0, 1:, None][content[1:]]
        nll = (before - after)[:-1][content[1:]].gather(-1, targets).mean()
        assert outcome.kl[place, 0] == pytest.approx(kl.item(), abs=1e-5)
        assert outcome.d_nll[place, 0] == pytest.approx(nll.item(), abs=1e-5)
        assert kl > 1e-4


def test_padding_and_batching_change_nothing(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    rows = np.flatnonzero(routing_of(planted, documents)[:, 0, 3])[::2]
    edits = [Edit("reroute", 0, (expert("writer"),)), Edit("drop", 0, (3,), (rows,))]
    one, many = (run_edits(planted, documents, edits, batch_size=size) for size in (1, 7))
    np.testing.assert_allclose(one.kl, many.kl, atol=1e-6)
    np.testing.assert_allclose(one.d_nll, many.d_nll, atol=1e-5)
    assert one.docs.equals(many.docs)
    assert (one.kl[1] > 0).any()


def test_no_edit_no_effect(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    nowhere = Edit("reroute", 0, (3,), (np.array([], dtype=int),))
    outcome = run_edits(planted, documents, [nowhere])
    assert outcome.kl.max() == 0
    assert np.abs(outcome.d_nll).max() == 0


def test_one_language_gives_no_selectivity(planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    english = documents.filter(pl.col("lang") == "en")
    audit = audit_experts(planted, english, [(0, 3)], AuditPlan(kinds=("drop",)))
    assert audit["selectivity"].is_nan().all()
    assert audit["p_selective"].null_count() == audit["p_selective_adjusted"].null_count() == len(audit)
    assert audit["d_nll_ja"].is_nan().all()
    assert audit["kl"].is_finite().all()


def test_what_cannot_be_audited_is_named(llama: Llama, planted: Qwen3Moe, documents: pl.DataFrame) -> None:
    with pytest.raises(ConfigError, match="layer: expected one with experts, 0, 1, got 5"):
        run_edits(planted, documents, [Edit("drop", 5, (0,))])
    with pytest.raises(ConfigError, match="experts: expected ids from 0 to 31, got"):
        run_edits(planted, documents, [Edit("drop", 0, (32,))])
    with pytest.raises(ConfigError, match="kind: expected one of drop, reroute, force, got 'burn'"):
        Edit("burn", 0, (0,))
    with pytest.raises(ConfigError, match="n_controls: expected at least 20, got 5"):
        AuditPlan(n_controls=5)
    with pytest.raises(ConfigError, match="expected a mixture of experts"):
        run_edits(llama, documents, [Edit("drop", 0, (0,))])
    with pytest.raises(ConfigError, match="expected unflagged experts in layer 0, got none"):
        audit_experts(planted, documents, [(0, e) for e in range(32)])
