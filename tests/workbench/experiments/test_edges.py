"""Edges: exact paths against hand-made ones, estimates against small steps, planted circuits found edge by edge."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from workbench.errors import ConfigError, ShapeError
from workbench.experiments.edge_nodes import Node, needed, written
from workbench.experiments.edges import _run_path, edge_attribution, path_patching
from workbench.experiments.metrics import logit_difference
from workbench.experiments.pairs import Pairs
from workbench.hooks import ActivationCache
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
            expected = METRIC(model(corrupt))
        finally:
            handle.remove()
    torch.testing.assert_close(found["value"].to_torch().float(), expected, atol=1e-5, rtol=1e-5)
    assert found["effect"].abs().min() > 1e-4


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
            moved = (_run_path(model, corrupt, METRIC, None, route, near, corrupt_cache).sum() - base) / step
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
    torch.testing.assert_close(sums["value"].to_torch(), wanted["value"].to_torch(), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        _, cache = moe.run_with_cache(tokens, names_filter=needed(moe, True))
        total = sum(written(moe, cache, Node("expert", 0, expert)) for expert in range(moe.cfg.n_experts))
        torch.testing.assert_close(total, cache["mlp_out", 0], atol=1e-5, rtol=1e-4)


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
    torch.testing.assert_close(sampled["exact"].to_torch(), measured["effect"].to_torch(), atol=1e-5, rtol=1e-5)
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
    crossed = Pairs(tokens, tokens, positions={"subject": [(2, 3), (2, 2)]})
    with pytest.raises(ShapeError, match="column by column"):
        path_patching(llama, crossed, METRIC, [["embed", "logits"]])
