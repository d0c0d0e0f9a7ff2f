"""First-order estimates: they are derivatives and find what was planted; the exact effects beside them are exact."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
import torch
from closeness import assert_near, near

from workbench.activations import ActivationCache
from workbench.errors import ConfigError, ShapeError
from workbench.experiments.attribution import SITE_COLUMNS, _both_runs, agreement, attribution_patching
from workbench.experiments.attribution_sites import KINDS, Site, aligned, patched_metrics
from workbench.experiments.metrics import logit_difference
from workbench.experiments.pairs import Pairs
from workbench.interventions import Interventions, ScaleExperts, Where
from workbench.planted.mechanisms import copying_head, deciding_route, writing_mlp


def mean_effects(result, column="value"):
    return result.frame.drop_nulls(column).group_by(SITE_COLUMNS).agg(pl.col(column).mean()).sort(column)


def planted_result(planted, kinds, **options):
    metric = logit_difference(planted.correct, planted.wrong)
    return attribution_patching(planted.model, Pairs(planted.clean, planted.corrupt), metric, kinds=kinds, **options)


def test_estimates_are_the_derivative_along_the_difference(model, tokens):
    """A patch that goes only a thousandth of the way moves the metric by a thousandth of the estimate."""
    model, step = model.double(), 1e-3
    kinds = [kind for kind in KINDS if kind != "expert" and (model.cfg.is_moe or kind != "router")]
    metric = logit_difference(7, 9)
    result = attribution_patching(model, Pairs(tokens, tokens.flip(0)), metric, kinds=kinds, exact_sample=0)
    pair = _both_runs(model, aligned(Pairs(tokens, tokens.flip(0))), metric, kinds)
    between = {
        name: pair.corrupt[name] + step * (value - pair.corrupt[name])
        if value.is_floating_point()
        else pair.corrupt[name]
        for name, value in pair.clean.items()
    }
    if model.cfg.is_moe:  # inside experts slots of two runs do not correspond
        result = replace(result, frame=result.frame.filter((pl.col("kind") != "neuron") | pl.col("expert").is_null()))
    near = replace(pair, clean=ActivationCache(between))
    sites = mean_effects(result).sort(pl.col("value").abs(), descending=True).gather_every(7)
    assert set(sites["kind"]) >= {"attn", "mlp", "head"}
    for row in sites.select(*SITE_COLUMNS, "value").rows(named=True):
        value = row.pop("value")
        moved = (patched_metrics(model, near, [Site(**row)])[0] - pair.value).mean() / step
        assert float(moved) == pytest.approx(value, rel=2e-2, abs=1e-5)


def test_expert_estimate_is_exact_where_nothing_follows_but_the_unembedding(moe, tokens):
    """With the metric on the last stream itself every contribution of the last layer is linear."""
    last = moe.cfg.n_layers - 1
    moe.ln_final.hook_scale.add_hook(lambda scale, hook: torch.ones_like(scale))
    for kind in ("expert", "neuron"):
        result = attribution_patching(
            moe, Pairs(tokens, tokens.flip(0)), logit_difference(7, 9), kinds=[kind], exact_sample=0
        )
        assert set(result.frame["layer"]) >= {0, last}
        pair = _both_runs(moe, aligned(Pairs(tokens, tokens.flip(0))), logit_difference(7, 9), [kind])
        for row in mean_effects(result).filter(pl.col("layer") == last).gather_every(11).rows(named=True):
            value = row.pop("value")
            exact = (patched_metrics(moe, pair, [Site(**row)])[0] - pair.value).mean()
            assert float(exact) == pytest.approx(value, rel=1e-3, abs=2e-5)


def test_the_planted_expert_is_found_and_its_neighbours_are_not():
    planted = writing_mlp("qwen3_moe")
    result = planted_result(planted, ["expert"], exact_sample=12)
    sites = mean_effects(result)
    best, rest = sites.row(-1, named=True), sites[:-1]
    assert (best["layer"], best["pos"], best["expert"]) == (planted.writer_layer, planted.query_pos, planted.experts[0])
    assert rest["value"].abs().max() < 0.01 * best["value"]
    assert result.settings["agreement"]["expert"]["pearson"] > 0.99


def test_a_deciding_route_shows_as_one_expert_gone_and_another_come():
    planted = deciding_route()
    best = mean_effects(planted_result(planted, ["expert"], exact_sample=0))[-2:]
    assert set(best["expert"]) == set(planted.experts)
    assert set(best["layer"]) == {planted.writer_layer}
    assert best["value"].min() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_the_planted_head_is_found_and_the_exact_column_clears_the_idle_one(architecture):
    """The idle head changes sign too: to first order that moves the final norm, in truth it moves nothing."""
    planted = copying_head(architecture)
    result = planted_result(planted, ["head"], exact_sample=8)
    sites, exact = mean_effects(result), mean_effects(result, "exact")
    for found in (sites, exact):
        best = found.row(-1, named=True)
        assert (best["layer"], best["pos"], best["head"]) == (planted.head_layer, planted.query_pos, planted.head)
    assert sites[:-1]["value"].abs().max() < 0.35 * sites["value"][-1]
    assert planted.idle_head in exact["head"]
    assert exact[:-1]["exact"].abs().max() < 0.02 * exact["exact"][-1]


def test_the_planted_neuron_is_found_in_both_architectures():
    dense = writing_mlp("llama")
    best = mean_effects(planted_result(dense, ["neuron"], exact_sample=0)).row(-1, named=True)
    assert (best["layer"], best["expert"], best["neuron"]) == (dense.writer_layer, None, dense.neuron)
    sparse = writing_mlp("qwen3_moe")
    best = mean_effects(planted_result(sparse, ["neuron"], exact_sample=0)).row(-1, named=True)
    assert (best["layer"], best["expert"], best["neuron"]) == (sparse.writer_layer, sparse.experts[0], 0)


def test_exact_column_equals_patching_by_hand(nano):
    clean = nano.to_tokens(["日本の首都は", "韓国の首都は"])
    corrupt, metric = clean.flip(0), logit_difference(700, 900)
    result = attribution_patching(nano, Pairs(clean, corrupt), metric, kinds=["head", "router"], exact_sample=6)
    with torch.no_grad():
        _, cache = nano.run_with_cache(clean)
        logits = nano(corrupt)
        base = metric(logits)
        for row in result.frame.drop_nulls("exact").filter(pl.col("pair") == "1").rows(named=True):
            leaf = "attn.hook_z" if row["kind"] == "head" else "mlp.hook_router_logits"
            name = f"blocks.{row['layer']}.{leaf}"
            unit = row["head"] if row["kind"] == "head" else row["expert"]

            def put(x, hook, name=name, pos=row["pos"], unit=unit):
                x = x.clone()
                x[:, pos, unit] = cache[name][:, pos, unit]
                return x

            patched = metric(nano.run_with_hooks(corrupt, fwd_hooks=[(name, put)]))
            assert row["exact"] == near(float((patched - base)[1]), logits)
    assert result.frame.drop_nulls("exact").group_by("kind").len()["len"].to_list() == [12, 12]
    assert all(-1 <= found["pearson"] <= 1 for found in result.settings["agreement"].values())


@torch.no_grad()
def test_many_sites_in_a_pass_equal_one_at_a_time(moe, tokens):
    metric = logit_difference(7, 9)
    with moe.intervene(Interventions([ScaleExperts(experts=(0, 1), factor=3.0, where=Where(langs=("ja",)))],
                                     langs=["ja", "en"])):  # fmt: skip
        one, many = (
            attribution_patching(
                moe, Pairs(tokens, tokens.flip(1)), metric, kinds=list(KINDS), exact_sample=20, rows=rows,
                progress=False,
            ).frame
            for rows in (2, 1000)
        )  # fmt: skip
        logits = moe(tokens)
    assert one.drop("exact").equals(many.drop("exact"))
    exact = [frame.drop_nulls("exact") for frame in (one, many)]
    assert exact[0].drop("exact").equals(exact[1].drop("exact"))
    assert len(exact[0]) == 2 * 20 * len(KINDS)
    assert_near(exact[0]["exact"].to_torch(), exact[1]["exact"].to_torch(), logits)
    assert exact[0]["exact"].abs().max() > 1e-2


def test_estimates_agree_with_exact_patching_on_a_trained_model(nano):
    clean = nano.to_tokens(["日本の首都は", "韓国の首都は"])
    with torch.no_grad():
        answers = nano(clean)[:, -1].argmax(-1)
    metric = logit_difference(answers, answers.flip(0))
    result = attribution_patching(nano, Pairs(clean, clean.flip(0)), metric, kinds=["node", "expert"], exact_sample=16)
    assert result.settings["agreement"]["expert"]["pearson"] > 0.8
    assert result.settings["agreement"]["node"]["pearson"] > 0.8


def test_weights_get_no_gradient_and_frozen_ones_do_not_matter(moe, tokens):
    metric = logit_difference(7, 9)
    first = attribution_patching(moe, Pairs(tokens, tokens.flip(0)), metric, exact_sample=0).frame
    assert all(parameter.grad is None for parameter in moe.parameters())
    moe.requires_grad_(False)
    assert attribution_patching(moe, Pairs(tokens, tokens.flip(0)), metric, exact_sample=0).frame.equals(first)


def test_wrong_requests_are_refused(llama, tokens):
    with pytest.raises(ConfigError, match="kinds: expected some of"):
        attribution_patching(llama, Pairs(tokens, tokens), logit_difference(7, 9), kinds=["edge"])
    with pytest.raises(ConfigError, match="with experts"):
        attribution_patching(llama, Pairs(tokens, tokens), logit_difference(7, 9), kinds=["expert"])
    twice = Pairs(tokens, tokens, positions={"subject": [(2, 3), (2, 2)], "end": [(4, 3), (5, 5)]})
    with pytest.raises(ShapeError, match="expected one clean position for a corrupt one, got several"):
        attribution_patching(llama, twice, logit_difference(7, 9), kinds=["head"])


def test_between_crossed_positions_only_what_corresponds_is_carried(moe, tokens):
    """An alignment that names some columns, of equal number in both, gives those sites their values and others 0."""
    corrupt, metric, kinds = tokens.flip(0), logit_difference(7, 9), ["node", "head", "expert", "router"]
    names, keys = {"a": [1, 4], "b": [5, 2]}, ["pair", *SITE_COLUMNS]
    some = Pairs(tokens, corrupt, positions=names, corrupt_mask=torch.ones_like(tokens))
    found = attribution_patching(moe, some, metric, kinds=kinds, exact_sample=6).frame
    whole = attribution_patching(moe, Pairs(tokens, corrupt), metric, kinds=kinds, exact_sample=0).frame
    both = found.join(whole, on=keys, suffix="_whole", nulls_equal=True)
    mapped = pl.concat_str("pair", "pos", separator=" ").is_in(["0 1", "0 5", "1 4", "1 2"])
    inside = both.filter(mapped)
    assert_near(inside["value"].to_torch(), inside["value_whole"].to_torch())
    assert (inside["value"].abs() > 1e-4).any()
    assert (both.filter(~mapped)["value"] == 0).all()
    assert both.filter(~mapped).drop_nulls("exact")["exact"].abs().max() in (None, near(0, moe(corrupt)))
    crossed = Pairs(tokens, corrupt, positions={"a": [(1, 3), (4, 4)]})
    moved = attribution_patching(moe, crossed, metric, kinds=["head"], exact_sample=200).frame
    with torch.no_grad():
        z = moe.run_with_cache(tokens)[1]["z", 0]

        def put(x, hook):
            x = x.clone()
            x[0, 3, 2] = z[0, 1, 2]
            return x

        logits = moe.run_with_hooks(corrupt, fwd_hooks=[("blocks.0.attn.hook_z", put)])
        change = float((metric(logits) - metric(moe(corrupt)))[0])
    row = moved.filter((pl.col("pair") == "0") & (pl.col("layer") == 0) & (pl.col("pos") == 3) & (pl.col("head") == 2))
    assert row["exact"].to_list() == [near(change, logits)]


def test_agreement_sees_the_sign():
    """An estimate that is right in size and wrong in sign disagrees."""
    rows = [{"kind": "head", "layer": n, "pos": 0, "head": 0, "expert": None, "neuron": None} for n in range(4)]
    values = pl.Series([-2.0, -1.0, 1.0, 3.0])
    frame = pl.DataFrame(rows).with_columns(value=values, exact=-values)
    assert agreement(frame)["head"]["pearson"] == pytest.approx(-1)
    assert agreement(frame)["head"]["spearman"] == pytest.approx(-1)
