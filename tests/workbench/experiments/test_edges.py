"""Edges: exact paths against hand-made ones, estimates against small steps, planted circuits found edge by edge."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from by_row import BY_ROW
from closeness import assert_near

from workbench.activations import ActivationCache
from workbench.errors import ConfigError, ShapeError
from workbench.experiments.attribution_sites import aligned
from workbench.experiments.edge_nodes import Node, needed, written
from workbench.experiments.edges import edge_attribution, path_patching
from workbench.experiments.metrics import logit_difference
from workbench.experiments.pairs import Pairs
from workbench.experiments.paths import Ends
from workbench.interventions import AddVector, BiasRouter, KnockOut, ScaleActivation, SetActivation, Where
from workbench.planted.mechanisms import copying_head, deciding_route, writing_mlp

METRIC = logit_difference(7, 9)
MODULE = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


def mean_effects(frame):
    return frame.group_by("sender", "receiver").agg(pl.col("value").mean()).sort("value")


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_a_path_into_attention_equals_one_made_with_plain_torch_hooks(model, tokens, kind):
    """Grouped queries: three heads share a key-value head here."""
    corrupt, block = tokens.flip(0), model.blocks[2]
    found = path_patching(model, Pairs(tokens, corrupt), METRIC, [["head 0.4", f"{kind} 2.1"]]).frame
    with torch.no_grad():
        caches = [model.run_with_cache(batch)[1] for batch in (tokens, corrupt)]
        z = caches[0]["z", 0] - caches[1]["z", 0]
        keep = torch.zeros(6, 1)
        keep[4] = 1
        delta = model.blocks[0].attn.o_proj((z * keep).flatten(2))
        module = getattr(block.attn, MODULE[kind])
        other = module(block.ln1(caches[1]["resid_pre", 2] + delta))

        def swap(_module, _input, output):
            output = output.clone()
            output[..., 8:16] = other[..., 8:16]
            return output

        handle = module.register_forward_hook(swap)
        try:
            logits = model(corrupt)
        finally:
            handle.remove()
    assert_near(found["value"].to_torch().float(), METRIC(logits), logits)
    assert found["effect"].abs().min() > 1e-4


@pytest.mark.parametrize("limits", [{}, {"positions": (-1, 2)}])
def test_paths_keep_the_interventions_that_are_attached(moe, tokens, limits):
    """A sender that does not change changes nothing, whatever acts where the receiver reads."""
    where, generator = Where(layers=(2,), **limits), torch.Generator().manual_seed(0)
    big = {n: 3 * torch.randn(n, generator=generator) for n in (8, moe.cfg.d_model)}
    items = [
        BiasRouter(bias=big[8], where=where), KnockOut(experts=(0, 3), mode="reroute", where=where),
        AddVector(vector=big[8], point="q", where=where), ScaleActivation(factor=2.0, point="k", where=where),
        AddVector(vector=big[moe.cfg.d_model], point="ln2.normalized", where=where),
        ScaleActivation(factor=2.0, point="ln1.scale", where=where),
    ]  # fmt: skip
    readers = ["q 2.4", "k 2.1", "v 2.0", "router 2", "experts 2", "mlp 2"]
    routes = [["head 0.4", reader] for reader in readers] + [["embed", "router 2", "logits"]]
    for change in items:
        with moe.intervene(change):
            effects = path_patching(moe, Pairs(tokens, tokens), METRIC, routes).frame["effect"].to_torch()
            moved = path_patching(moe, Pairs(tokens, tokens.flip(0)), METRIC, routes).frame["effect"].abs()
            assert_near(effects, torch.zeros_like(effects), moe(tokens))
        assert moved.max() > 1e-3


@pytest.mark.parametrize("kind", ["q", "v"])
def test_a_path_under_an_intervention_equals_one_made_with_plain_torch_hooks(moe, tokens, kind):
    """Interventions at the receiver and at the norm before it act after the projection's own hooks."""
    change = [
        AddVector(vector=torch.linspace(-3, 3, 8), point=kind),
        ScaleActivation(factor=0.5, point="ln1.normalized"),
    ]
    corrupt, block = tokens.flip(0), moe.blocks[2]
    with moe.intervene(change), torch.no_grad():
        found = path_patching(moe, Pairs(tokens, corrupt), METRIC, [["embed", f"{kind} 2.1"]]).frame["value"].to_torch()
        streams = [moe.run_with_cache(batch)[1] for batch in (tokens, corrupt)]
        x = streams[1]["resid_pre", 2] + streams[0]["hook_embed"] - streams[1]["hook_embed"]
        other = getattr(block.attn, MODULE[kind])(block.ln1(x))

        def swap(_module, _input, output):
            output = output.clone()
            output[..., 8:16] = other[..., 8:16]
            return output

        handle = getattr(block.attn, MODULE[kind]).register_forward_hook(swap)
        try:
            logits = moe(corrupt)
        finally:
            handle.remove()
    assert_near(found.float(), METRIC(logits), logits)


@pytest.mark.parametrize("name", ["none", *BY_ROW])
def test_many_paths_in_a_pass_equal_one_at_a_time(moe, tokens, name):
    """Paths of several lengths and layers, under interventions that tell rows or tokens apart."""
    paths = [
        ["head 0.4", "q 2.1", "logits"], ["head 0.4", "q 2.4"], ["embed", "logits"], ["expert 0.2", "k 1.1"],
        ["embed", "v 0.0", "experts 2", "logits"], ["head 1.1", "router 2"], ["embed", "experts 2"],
        ["embed", "experts 0", "v 2.0"], ["embed", "mlp 2", "logits"], ["embed", "mlp 1"],
    ]  # fmt: skip
    pairs = Pairs(tokens, tokens.flip(1))
    with moe.intervene(BY_ROW[name](moe, tokens) if name in BY_ROW else []):
        one, many = (path_patching(moe, pairs, METRIC, paths, rows=n, progress=False).frame for n in (2, 1000))
        with torch.no_grad():
            logits = moe(tokens)
    assert one.select("pair", "path").equals(many.select("pair", "path"))
    assert_near(one["value"].to_torch(), many["value"].to_torch(), logits)
    assert (one["effect"].abs() > 1e-3).sum() > 10


AT_READERS = {
    "v": [ScaleActivation(point="v", factor=3.0)],
    "q": [AddVector(point="q", vector=torch.linspace(-2, 2, 8)), ScaleActivation(point="q", factor=0.5)],
    "router": [
        ScaleActivation(point="blocks.2.mlp.hook_router_logits", factor=2.0),
        KnockOut(experts=(3,), mode="reroute"),
    ],
    "norm": [ScaleActivation(point="ln1.normalized", factor=2.0), ScaleActivation(point="ln2.scale", factor=0.5)],
    "some": [ScaleActivation(point="k", factor=3.0, where=Where(positions=(2, -1)))],
    "final": [ScaleActivation(point="ln_final.hook_normalized", factor=2.0)],
}


@pytest.mark.parametrize("name", list(AT_READERS))
def test_estimates_go_through_the_interventions_at_the_receiver(moe, tokens, name):
    """A sender that moves a little of the way: its exact path over the estimate is one."""
    model, corrupt, step = moe.double(), tokens.flip(0), 1e-5
    with model.intervene(AT_READERS[name]):
        frame = edge_attribution(
            model, Pairs(tokens, corrupt), METRIC, to=("q", "k", "v", "router", "experts", "logits"), progress=False
        ).frame
        with torch.no_grad():
            clean, own = (model.run_with_cache(t, names_filter=needed(model, False))[1] for t in (tokens, corrupt))
            near = ActivationCache({n: own[n] + step * (x - own[n]) for n, x in clean.items()})
            base = METRIC(model(corrupt)).sum()
            edges = frame.group_by("sender", "receiver").agg(pl.col("value").sum()).sort("value").gather_every(6)
            routes = [[Node.parse(sender), Node.parse(receiver)] for sender, receiver, _ in edges.rows()]
            moved = (Ends(model, METRIC, corrupt, None, near, own).measure(routes).sum(1) - base) / step
    assert edges["value"].abs().max() > 1e-2
    assert moved.tolist() == pytest.approx(edges["value"].to_list(), rel=1e-2, abs=1e-6)


def test_a_receiver_that_is_set_from_outside_hears_nobody(moe, tokens):
    with moe.intervene(SetActivation(point="q", value=0.5)):
        frame = edge_attribution(moe, Pairs(tokens, tokens.flip(0)), METRIC, to=("q", "k"), exact_sample=200).frame
    set_ones = frame.filter(pl.col("receiver").str.starts_with("q"))
    assert (set_ones["value"] == 0).all()
    assert set_ones["exact"].drop_nulls().abs().max() < 1e-5
    assert frame["value"].abs().max() > 1e-3


@pytest.mark.parametrize("receivers", [("q", "k", "v", "mlp", "logits"), ("k", "router", "experts", "logits")])
def test_estimates_are_the_derivative_of_exact_paths(model, tokens, receivers):
    if not model.cfg.is_moe and "router" in receivers:
        receivers = ("k", "logits")
    model, corrupt, step = model.double(), tokens.flip(0), 1e-5
    frame = edge_attribution(model, Pairs(tokens, corrupt), METRIC, to=receivers).frame
    with torch.no_grad():
        clean_cache, corrupt_cache = (
            model.run_with_cache(batch, names_filter=needed(model, False))[1] for batch in (tokens, corrupt)
        )
        near = ActivationCache({n: corrupt_cache[n] + step * (x - corrupt_cache[n]) for n, x in clean_cache.items()})
        base = METRIC(model(corrupt)).sum()
        edges = frame.group_by("sender", "receiver").agg(pl.col("value").sum()).sort("value").gather_every(9)
        assert len(edges) > 5
        for sender, receiver, value in edges.rows():
            route = [Node.parse(sender), Node.parse(receiver)]
            moved = (Ends(model, METRIC, corrupt, None, near, corrupt_cache).measure([route]).sum() - base) / step
            assert float(moved) == pytest.approx(value, rel=1e-2, abs=1e-7)


def test_edges_into_one_receiver_sum_to_its_whole_reading(model, tokens):
    """All senders together are the residual stream, so their edges sum to its first-order effect there."""
    corrupt = tokens.flip(0)
    frame = edge_attribution(model, Pairs(tokens, corrupt), METRIC, to=("logits",)).frame
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        clean_stream = model.run_with_cache(tokens, names_filter=last)[1][last]
    seen = {}
    with model.hooks(
        bwd_hooks=[(last, lambda g, hook: seen.update(gradient=g))],
        fwd_hooks=[(last, lambda x, hook: seen.update(x=x.detach()))],
    ):
        METRIC(model(corrupt)).sum().backward()
    expected = ((clean_stream - seen["x"]) * seen["gradient"]).sum((1, 2))
    sums = frame.group_by("pair", maintain_order=True).agg(pl.col("value").sum())["value"].to_torch()
    torch.testing.assert_close(sums.float(), expected, atol=1e-4, rtol=1e-4)


def test_router_and_experts_sum_to_the_mixture_and_experts_to_its_output(moe, tokens):
    corrupt = tokens.flip(0)
    parts = edge_attribution(moe, Pairs(tokens, corrupt), METRIC, to=("router", "experts")).frame
    whole = edge_attribution(moe, Pairs(tokens, corrupt), METRIC, to=("mlp",)).frame.filter(
        pl.col("receiver") != "mlp 1"
    )
    keys, layer = ["pair", "sender", "layer"], pl.col("receiver").str.split(" ").list.last()
    sums = parts.with_columns(layer=layer).group_by(keys).agg(pl.col("value").sum()).sort(keys)
    wanted = whole.with_columns(layer=layer).sort(keys)
    assert_near(sums["value"].to_torch(), wanted["value"].to_torch(), parts["value"].to_torch())
    with torch.no_grad():
        _, cache = moe.run_with_cache(tokens, names_filter=needed(moe, True))
        total = sum(written(moe, cache, Node("expert", 0, expert)) for expert in range(moe.cfg.n_experts))
        assert_near(total, cache["mlp_out", 0])


def test_planted_edges_carry_the_effect_and_no_others_do():
    planted = writing_mlp("qwen3_moe")
    metric = logit_difference(planted.correct, planted.wrong)
    frame = edge_attribution(
        planted.model, Pairs(planted.clean, planted.corrupt), metric,
        from_=("embed", "head", "expert"), to=("q", "k", "v", "router", "experts", "logits"), exact_sample=16,
    ).frame  # fmt: skip
    head, expert = f"head {planted.head_layer}.{planted.head}", f"expert {planted.writer_layer}.{planted.experts[0]}"
    circuit = {
        ("embed", f"v {planted.head_layer}.{planted.kv_head}"),
        (head, f"experts {planted.writer_layer}"),
        (expert, "logits"),
    }
    best = mean_effects(frame)
    assert set(best[-3:].select("sender", "receiver").rows()) == circuit
    exact = frame.drop_nulls("exact").group_by("sender", "receiver").agg(pl.col("exact").mean()).sort("exact")
    assert set(exact[-3:].select("sender", "receiver").rows()) == circuit
    # to first order some others move norms, which a change of sign does not in truth: the exact column clears them
    assert exact[:-3]["exact"].abs().max() < 0.02 * exact["exact"][-3]


def test_a_deciding_route_goes_through_the_router_and_not_through_the_experts_input():
    planted = deciding_route()
    metric, head = logit_difference(planted.correct, planted.wrong), f"head {planted.head_layer}.{planted.head}"
    ends = [
        f"router {planted.writer_layer}",
        f"experts {planted.writer_layer}",
        f"mlp {planted.writer_layer}",
        "logits",
    ]
    frame = path_patching(
        planted.model, Pairs(planted.clean, planted.corrupt), metric, [[head, end] for end in ends]
    ).frame
    recovered = frame.group_by("path", maintain_order=True).agg(pl.col("recovered").mean())["recovered"].to_list()
    assert recovered == pytest.approx([1, 0, 1, 0], abs=0.02)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_longer_paths_pass_the_change_on(architecture):
    planted = copying_head(architecture)
    metric = logit_difference(planted.correct, planted.wrong)
    value = f"v {planted.head_layer}.{planted.kv_head}"
    key = f"k {planted.head_layer}.{planted.kv_head}"
    other = f"v {planted.head_layer}.{1 - planted.kv_head}"
    paths = [["embed", value, "logits"], ["embed", value], ["embed", key, "logits"], ["embed", other, "logits"]]
    frame = path_patching(planted.model, Pairs(planted.clean, planted.corrupt), metric, paths).frame
    recovered = frame.group_by("path", maintain_order=True).agg(pl.col("recovered").mean())["recovered"].to_list()
    assert recovered == pytest.approx([1, 1, 0, 0], abs=0.05)


def test_sampled_exact_effects_are_those_of_path_patching(nano):
    clean = nano.to_tokens(["日本の首都は", "韓国の首都は"])
    corrupt = clean.flip(0)
    result = edge_attribution(nano, Pairs(clean, corrupt), logit_difference(700, 900), exact_sample=8)
    sampled = result.frame.drop_nulls("exact").filter(pl.col("pair") == "0")
    paths = sampled.select("sender", "receiver").rows()
    measured = path_patching(nano, Pairs(clean, corrupt), logit_difference(700, 900), paths).frame.filter(
        pl.col("pair") == "0"
    )
    with torch.no_grad():
        assert_near(sampled["exact"].to_torch(), measured["effect"].to_torch(), nano(corrupt))
    assert result.settings["agreement"]["n_edges"] == 8
    assert result.settings["agreement"]["pearson"] > 0.5


@pytest.mark.parametrize("text", ["head 1", "logits 2", "embed 0", "mlp", "neuron 1.2", "head 1.x", "", "k 1."])
def test_a_text_that_is_no_node_is_refused(text):
    with pytest.raises(ConfigError, match="node: expected"):
        Node.parse(text)


def test_wrong_paths_are_refused(llama, tokens):
    def run(path):
        return path_patching(llama, Pairs(tokens, tokens), METRIC, [path])

    with pytest.raises(ConfigError, match="act after"):
        run(["head 2.1", "q 1.0"])
    with pytest.raises(ConfigError, match="this model has"):
        run(["head 0.0", "k 1.2"])  # two key-value heads
    with pytest.raises(ConfigError, match="this model has"):
        run(["head 0.0", "router 1"])
    with pytest.raises(ConfigError, match="at least one receiver"):
        run(["head 0.0"])
    with pytest.raises(ConfigError, match="to: expected"):
        edge_attribution(llama, Pairs(tokens, tokens), METRIC, to=("neuron",))
    twice = Pairs(tokens, tokens, positions={"subject": [(2, 3), (2, 2)], "end": [(4, 3), (5, 5)]})
    with pytest.raises(ShapeError, match="expected one clean position for a corrupt one, got several"):
        path_patching(llama, twice, METRIC, [["embed", "logits"]])


CROSSED = {"subject": [(2, 4), (3, 2)], "end": [(6, 5), (5, 6)]}


@torch.no_grad()
def test_paths_carry_what_an_alignment_maps_and_nothing_else(moe, tokens):
    """Between versions of which one is padded: a head's output moves to the column it corresponds to."""
    corrupt, mask = tokens.flip(0).clone(), torch.ones_like(tokens)
    mask[0, :2] = 0
    pairs = Pairs(tokens, corrupt, torch.ones_like(mask), {"subject": [(2, 2), (3, 2)], "end": [(6, 4), (5, 6)]},
                  corrupt_mask=mask)  # fmt: skip
    columns = [([2, 6], [4, 6]), ([3, 5], [2, 6])]  # of either pair: clean, and corrupt behind its padding
    clean = moe.run_with_cache(tokens)[1]["hook_embed"]
    own = moe.run_with_cache(corrupt, attention_mask=mask)[1]["hook_embed"]

    def add(x, hook):
        x = x.clone()
        for pair, (there, here) in enumerate(columns):
            x[pair, here] += clean[pair, there] - own[pair, here]
        return x

    logits = moe.run_with_hooks(corrupt, attention_mask=mask, fwd_hooks=[("blocks.2.hook_resid_post", add)])
    found = path_patching(moe, pairs, METRIC, [["embed", "logits"]]).frame
    assert_near(found["value"].to_torch(), METRIC(logits), logits)
    assert_near(torch.tensor(found["recovered"].to_list()), recovered_by_hand(moe, pairs, METRIC(logits)))


def recovered_by_hand(model, pairs, values):
    clean, corrupt = (
        METRIC(model(version, mask)) for version, mask in zip((pairs.clean, pairs.corrupt), pairs.masks, strict=True)
    )
    return (values - corrupt) / (clean - corrupt)


def test_edges_between_crossed_positions_are_the_derivative_of_their_paths(moe, tokens):
    model, corrupt, step = moe.double(), tokens.flip(0), 1e-5
    pairs = Pairs(tokens, corrupt, positions=CROSSED)
    frame = edge_attribution(model, pairs, METRIC, to=("k", "router", "logits")).frame
    whole = edge_attribution(model, Pairs(tokens, corrupt), METRIC, to=("k", "router", "logits")).frame
    assert not frame["value"].equals(whole["value"])
    versions = aligned(pairs)
    with torch.no_grad():
        caches = [model.run_with_cache(batch, names_filter=needed(model, False))[1] for batch in (tokens, corrupt)]
        carried = versions.carried(*caches)
        for name, x in carried.items():
            for pair, moves in enumerate([[(2, 4), (6, 5)], [(3, 2), (5, 6)]]):
                expected = caches[1][name][pair].clone()
                for there, here in moves:
                    expected[here] = caches[0][name][pair, there]
                assert torch.equal(x[pair], expected), name
        moved = ActivationCache({n: caches[1][n] + step * (x - caches[1][n]) for n, x in carried.items()})
        base = METRIC(model(corrupt)).sum()
        edges = frame.group_by("sender", "receiver").agg(pl.col("value").sum()).sort("value").gather_every(11)
        for sender, receiver, value in edges.rows():
            route = [Node.parse(sender), Node.parse(receiver)]
            change = (Ends(model, METRIC, corrupt, None, moved, caches[1]).measure([route]).sum() - base) / step
            assert float(change) == pytest.approx(value, rel=1e-2, abs=1e-7)
