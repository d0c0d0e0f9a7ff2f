"""A directory holds one experiment: whatever decides the result is told apart, whatever does not is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from by_row import BY_ROW
from closeness import assert_near, near
from torch import Tensor

from workbench.errors import InterventionError, RunError, ShapeError
from workbench.experiments.ablation import ablate_experts
from workbench.experiments.attribution import attribution_patching
from workbench.experiments.expert_patching import Contributions, expert_runs, patch_experts
from workbench.experiments.identity import describe_interventions, digest
from workbench.experiments.metrics import kl, log_probability, logit_difference, probability
from workbench.experiments.pairs import Pairs
from workbench.experiments.patching import patch
from workbench.experiments.tracing import causal_tracing
from workbench.interventions import (
    AddVector,
    Interventions,
    KnockOut,
    PatchActivations,
    PerRow,
    ScaleActivation,
    ScaleExperts,
    Where,
)
from workbench.models import Qwen3Moe

METRIC = logit_difference(40, 50)


def at(tokens: Tensor, **changes: Any) -> Pairs:
    return Pairs(tokens, tokens.flip(1), **{"positions": {"s": [2, 2]}, **changes})


SWEEPS: dict[str, Callable[..., Any]] = {
    "patch": lambda model, pairs, metric, out: patch(model, pairs, metric, layers=[1], out=out, progress=False),
    "patch_experts": lambda model, pairs, metric, out: patch_experts(
        model, pairs, metric, layers=[2], modes=["both"], experts=[1], out=out, progress=False
    ),
}


@pytest.mark.parametrize("sweep", list(SWEEPS))
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: (at(t, positions={"s": [5, 5]}), METRIC), "settings.pairs.columns"),
        (lambda t: (at(t, names=["a", "b"]), METRIC), "settings.pairs.names"),
        (lambda t: (at(t), logit_difference(40, 51)), "settings.metric_arguments.wrong"),
        (lambda t: (at(t), logit_difference(40, 50, pos=4)), "settings.metric_arguments.pos"),
        (lambda t: (at(t), probability(40)), "settings.metric "),
    ],
)
def test_another_sweep_is_refused(
    moe: Qwen3Moe, tokens: Tensor, tmp_path: Path, sweep: str, change: Callable[[Tensor], Any], named: str
) -> None:
    run = SWEEPS[sweep]
    first = run(moe, at(tokens), METRIC, tmp_path)
    assert run(moe, at(tokens), METRIC, tmp_path).frame.equals(first.frame), "the same one is opened"
    with pytest.raises(RunError, match=named.replace(".", r"\.")):
        run(moe, *change(tokens), tmp_path)


@pytest.mark.parametrize("sweep", list(SWEEPS))
def test_a_result_says_what_was_attached(moe: Qwen3Moe, tokens: Tensor, tmp_path: Path, sweep: str) -> None:
    run, gone = SWEEPS[sweep], KnockOut(experts=(3,), mode="reroute", where=Where(layers=(2,)))
    assert run(moe, at(tokens), METRIC, tmp_path).settings["interventions"] == []
    with moe.intervene(gone):
        with pytest.raises(RunError, match=r"expected settings\.interventions"):
            run(moe, at(tokens), METRIC, tmp_path)
        said = run(moe, at(tokens), METRIC, tmp_path / "other").settings["interventions"]
    assert said == [{"items": [{"kind": "knock_out", "experts": [3], "mode": "reroute", "where": {"layers": [2]}}]}]


def test_small_scores_are_told_apart(moe: Qwen3Moe, tokens: Tensor, tmp_path: Path) -> None:
    """A caller's own metric is known by its values alone; these agree in the first three decimals."""
    make = [lambda x: 1e-5 * x[:, -1, 40], lambda x: 2e-5 * x[:, -1, 40]]
    patch(moe, at(tokens), make[0], layers=[1], out=tmp_path, progress=False)
    with pytest.raises(RunError, match=r"settings\.clean"):
        patch(moe, at(tokens), make[1], layers=[1], out=tmp_path, progress=False)


def test_whose_mask_it_is_counts(tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    both, one = at(tokens, attention_mask=mask), at(tokens, corrupt_mask=mask)
    assert both.describe()["tokens"] == one.describe()["tokens"]
    assert both.describe()["masks"] != one.describe()["masks"]
    assert at(tokens, attention_mask=torch.ones_like(tokens)).describe()["masks"] == [None, None]


def test_ablation_tells_masks_names_and_weights_apart(moe: Qwen3Moe, tokens: Tensor, tmp_path: Path) -> None:
    def run(mask: Tensor | None = None, **options: Any) -> Any:
        return ablate_experts(moe, tokens, mask, layers=[2], experts=[1], modes=["drop"], out=tmp_path,
                              progress=False, **options)  # fmt: skip

    first, mask = run(), torch.ones_like(tokens)
    assert run(mask).frame.equals(first.frame), "a mask that keeps everything is none"
    mask[1, :3] = 0
    with pytest.raises(RunError, match=r"settings\.mask"):
        run(mask)
    with pytest.raises(RunError, match=r"settings\.names"):
        run(names=["a", "b"])
    with moe.intervene(KnockOut(experts=(3,), mode="drop")), pytest.raises(RunError, match=r"settings\.interventions"):
        run()


def test_tracing_tells_metrics_masks_and_weights_apart(moe: Qwen3Moe, tokens: Tensor, tmp_path: Path) -> None:
    def run(metric: Any = METRIC, mask: Tensor | None = None) -> Any:
        return causal_tracing(moe, tokens, [(4, 5), (4, 5)], metric, components=["resid_post"], n_samples=1,
                              attention_mask=mask, out=tmp_path, progress=False)  # fmt: skip

    first = run()
    assert set(first.settings["runs"]) == {"dtype", "device", "attn_impl", "moe_impl", "moe_path", "router_dtype"}
    with pytest.raises(RunError, match=r"settings\.metric_arguments\.correct"):
        run(logit_difference(41, 50))
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    with pytest.raises(RunError, match=r"settings\.mask"):
        run(mask=mask)
    kept = moe.embed.weight[3].clone()
    with torch.no_grad():
        moe.embed.weight[3] *= 1.01
    with pytest.raises(RunError, match=r"settings\.model\.weights"):
        run()
    with torch.no_grad():
        moe.embed.weight[3] = kept
    assert run().frame.equals(first.frame)


def test_experiments_without_a_directory_say_it_too(moe: Qwen3Moe, tokens: Tensor) -> None:
    with moe.intervene(KnockOut(experts=(3,), mode="reroute")):
        settings = attribution_patching(moe, Pairs(tokens, tokens.flip(1)), METRIC, kinds=["node"]).settings
    assert settings["interventions"][0]["items"][0]["kind"] == "knock_out"
    assert settings["metric_arguments"] == {"correct": 40, "wrong": 50, "pos": -1}
    assert settings["model"]["weights"]


def test_what_is_attached_is_described_by_value(moe: Qwen3Moe, tokens: Tensor) -> None:
    def said(items: Any, **known: Any) -> list[dict[str, Any]]:
        with moe.intervene(Interventions(items, **known)):
            return describe_interventions(moe)

    d = moe.cfg.d_model
    large = {"blocks.1.hook_mlp_out": torch.randn(2, 5000 // d, d, generator=torch.Generator().manual_seed(0))}
    longer = {name: torch.cat([value, value], dim=1) for name, value in large.items()}
    one, same, other = (
        said([PatchActivations.from_cache(cache)])
        for cache in (longer, {n: v.clone() for n, v in longer.items()}, {n: -v for n, v in longer.items()})
    )
    assert one == same
    assert one != other
    assert len(str(one)) < 1000, "by its digest"
    add = AddVector(point="resid_post", vector=torch.ones(d), scale=2.0)
    assert said([add], langs=["ja", "en"]) != said([add], langs=["en", "ja"])
    assert describe_interventions(moe) == []


def test_digests_tell_shape_dtype_and_absence_apart() -> None:
    values = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).int(), None]
    assert len({digest(value) for value in values}) == 4
    assert digest(torch.zeros(2, 3).bfloat16()) == digest(torch.zeros(3, 2).bfloat16().T.contiguous())


@pytest.mark.parametrize("name", list(BY_ROW))
@torch.no_grad()
def test_what_tells_rows_or_tokens_apart_acts_in_every_patch_as_in_its_run(
    moe: Qwen3Moe, tokens: Tensor, name: str
) -> None:
    """Many patches in one pass, from a later layer and column, against one hook at a time on the whole prompts."""
    clean, corrupt = tokens, tokens.flip(1)
    resid, slots = "blocks.1.hook_resid_pre", "blocks.2.mlp.hook_"
    leaves = ("expert_ids", "routing_weights", "expert_out")
    names = [resid, "blocks.2.hook_mlp_out", *(slots + leaf for leaf in leaves)]
    with moe.intervene(BY_ROW[name](moe, tokens)):
        stream = patch(moe, Pairs(clean, corrupt), METRIC, layers=[1], progress=False).frame
        experts = patch_experts(moe, Pairs(clean, corrupt), METRIC, layers=[2], modes=["both"], progress=False).frame
        there, here = (moe.run_with_cache(version, names_filter=names)[1] for version in (clean, corrupt))

        def contribution(cache: dict[str, Tensor], pos: int, expert: int | None) -> Tensor:
            ids, weights, out = (cache[slots + leaf][:, pos] for leaf in leaves)
            held = torch.ones_like(ids) if expert is None else ids == expert
            return ((weights * held)[..., None] * out).sum(-2)

        def by_hand(point: str, pos: int, change: Tensor) -> Any:
            def edit(x: Tensor, hook: object) -> Tensor:
                x = x.clone()
                x[:, pos] += change
                return x

            logits = moe.run_with_hooks(corrupt, fwd_hooks=[(point, edit)])
            return near(METRIC(logits), logits)

        for pos in (0, 2, 6):
            expected = by_hand(resid, pos, there[resid][:, pos] - here[resid][:, pos])
            assert stream.filter(pl.col("pos") == pos)["value"].to_list() == expected
            for row in experts.filter(pl.col("pos") == pos).partition_by("expert"):
                expert = row["expert"][0]
                change = contribution(there, pos, expert) - contribution(here, pos, expert)
                expected = by_hand("blocks.2.hook_mlp_out", pos, change)
                assert row["value"].to_list() == expected, expert


@torch.no_grad()
def test_modes_of_an_expert_patch_add_up_under_what_tells_tokens_apart(moe: Qwen3Moe, tokens: Tensor) -> None:
    """Values and routing recompute experts at one token: between runs that are the same, nothing is left."""
    limits = [Where(positions=(2,)), Where(positions=(-1,)), Where(phase="prefill"), Where(langs=("ja",))]
    for where in limits:
        change = ScaleExperts(experts=(0, 1, 2, 3), factor=3.0, where=where)
        with moe.intervene(Interventions([change], langs=["ja", "en"])):
            runs = expert_runs(moe, Pairs(tokens, tokens.flip(1)), METRIC)
            layer = Contributions(runs)[2]
            for pos in (2, 6):
                column = torch.full((2,), pos)
                own = layer._on("target", column, layer.target.at(column))
                assert_near(own.out, layer.target.at(column).out)


def test_experts_whose_sum_is_changed_afterwards_are_refused(moe: Qwen3Moe, tokens: Tensor) -> None:
    for point in ("mlp_out", "resid_post"):
        with (
            moe.intervene(ScaleActivation(factor=0.5, point=point, where=Where(layers=(2,)))),
            pytest.raises(
                InterventionError, match=f"to reach the stream, got a scale_activation at blocks.2.hook_{point}"
            ),
        ):
            patch_experts(moe, at(tokens), METRIC, layers=[2], progress=False)
        with moe.intervene(AddVector(vector=torch.ones(32), point=point)):
            patch_experts(moe, at(tokens), METRIC, layers=[2], progress=False)


@torch.no_grad()
def test_tracing_under_one_row_s_intervention_is_that_row_s(moe: Qwen3Moe, tokens: Tensor) -> None:
    def trace(given: Any) -> pl.DataFrame:
        with moe.intervene(given):
            return causal_tracing(
                moe, tokens, [(2, 4), (3, 5)], METRIC, components=["mlp_out"], n_samples=3, progress=False
            ).frame.sort("layer", "pos", "pair")

    change = KnockOut(experts=(1, 4), mode="drop")
    everywhere, nowhere = trace([change]), trace([])
    assert not everywhere["value"].equals(nowhere["value"])
    given = replace(change, where=Where(langs=("ja",)))
    for mixed in (trace(Interventions([given], langs=["ja", "en"])), trace(PerRow([[change], None]))):
        for pair, expected in (("0", everywhere), ("1", nowhere)):
            found, wanted = (frame.filter(pl.col("pair") == pair)["value"] for frame in (mixed, expected))
            assert found.to_list() == near(wanted.to_list(), moe(tokens))


@torch.no_grad()
def test_experts_are_patched_under_what_acts_everywhere_padded_or_not(moe: Qwen3Moe, tokens: Tensor) -> None:
    """Padded differently in the two versions: each pair gives what it gives alone and unpadded, in every mode."""
    clean, corrupt = tokens.clone(), tokens.flip(1)
    mask, corrupt_mask = torch.ones_like(tokens), torch.ones_like(tokens)
    mask[1, :2], corrupt_mask[1, :3] = 0, 0
    places = {"s": [(4, 4), (3, 2)]}
    gone = KnockOut(experts=(1, 4), mode="reroute")
    options: dict[str, Any] = {"layers": [2], "experts": [0, 2, 5], "progress": False}
    with moe.intervene(gone):
        padded = patch_experts(moe, Pairs(clean, corrupt, mask, places, corrupt_mask=corrupt_mask), METRIC, **options)
        short = Pairs(clean[:1], corrupt[:1], positions={"s": [(4, 4)]})
        whole = patch_experts(moe, short, METRIC, **options)
    mine = padded.frame.filter(padded.frame["pair"] == "0")
    assert mine["value"].to_list() == near(whole.frame["value"].to_list(), moe(clean))
    assert mine["clean_weight"].to_list() == near(whole.frame["clean_weight"].to_list(), 1)
    with moe.intervene(gone):
        _, cache = moe.run_with_cache(
            clean[1:, 2:], names_filter=lambda n: n.startswith("blocks.2.mlp.hook_") and "load" not in n
        )
    held = cache["expert_ids", 2][0, 3] == 2
    weight = float((cache["routing_weights", 2][0, 3] * held).sum())
    found = padded.frame.filter((padded.frame["pair"] == "1") & (padded.frame["expert"] == 2))["clean_weight"]
    assert found.to_list() == near([weight] * 3, 1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, t: patch(m, at(t), METRIC, layers=[1, 1]), "layers: expected each one once, got 1 twice"),
        (lambda m, t: patch(m, at(t), METRIC, rows=0), "rows: expected at least 1, got 0"),
        (lambda m, t: patch_experts(m, at(t), METRIC, experts=[1, 1]), "experts: expected each one once, got 1 twice"),
        (
            lambda m, t: patch_experts(m, at(t), METRIC, coalitions={"every": [1]}),
            "coalitions: expected other names than 'every'",
        ),
        (lambda m, t: at(t, names=["a"]), "names: expected one for each of 2 pairs, got 1"),
        (lambda m, t: at(t, positions={"s": [1, 1], 2: [2, 2]}), "expected labels that are all text or all numbers"),
        (lambda m, t: ablate_experts(m, t, experts=[99], modes=["mean"]), "experts: expected 0 to 7, got 99"),
        (lambda m, t: ablate_experts(m, t, names=["a"]), "names: expected one for each of 2 documents, got 1"),
        (lambda m, t: patch(m, at(t), logit_difference(1, 2, pos=99)), "pos: expected a column from .*, got 99"),
        (lambda m, t: patch_experts(m, at(t), kl(m(t), pos=99)), "pos: expected a column from .*, got 99"),
        (
            lambda m, t: causal_tracing(m, t, [(4, 5), (4, 5)], log_probability(1, pos=99)),
            "pos: expected a column from .*, got 99",
        ),
        (lambda m, t: log_probability(1, pos=-99)(m(t)), "pos: expected a column from .*, got -99"),
    ],
)
@torch.no_grad()
def test_what_would_be_misread_is_refused(
    moe: Qwen3Moe, tokens: Tensor, run: Callable[[Qwen3Moe, Tensor], object], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        run(moe, tokens)
