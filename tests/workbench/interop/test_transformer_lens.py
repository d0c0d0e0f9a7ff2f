"""TransformerLens' tools run on our models and give what plain hooks give."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from closeness import assert_near

from workbench.errors import ConfigError, HookError

pytest.importorskip("transformer_lens", reason="the transformer_lens extra is not installed")

from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights
from transformer_lens.tools import analysis

from workbench.experiments.attribution import attribution_patching
from workbench.experiments.edges import path_patching
from workbench.experiments.lens import direct_logit_attribution
from workbench.experiments.metrics import logit_difference
from workbench.experiments.pairs import Pairs
from workbench.experiments.patching import patch
from workbench.interop.transformer_lens import as_bridge


@pytest.fixture(params=["nano", "nano_dense"])
def bridged(request):
    """A model, its bridge, two prompts and a metric."""
    model = request.getfixturevalue(request.param)
    clean, corrupt = torch.arange(300, 304)[None], torch.arange(400, 404)[None]
    return model, as_bridge(model), clean, corrupt, lambda logits: logits[:, -1, 700] - logits[:, -1, 900]


def patched_by_hand(model, corrupt, activation, name, place, metric):
    def put(x, hook):
        x = x.clone()
        x[place] = activation[place]
        return x

    return metric(model.run_with_hooks(corrupt, fwd_hooks=[(name, put)]))[0]


def test_the_models_satisfy_the_structural_protocols(bridged):
    model, bridge, *_ = bridged
    assert isinstance(model, TransformerLensModel)
    assert isinstance(bridge, TransformerLensModelWithWeights)
    assert torch.equal(bridge.to_tokens("日本"), model.to_tokens("日本"))


@pytest.mark.slow
@torch.no_grad()
def test_every_act_patch_equals_patching_by_hand(model, tokens):
    """Three layers, six heads on two key-value heads; every sweep of `patching` but the path ones."""
    bridge, metric = as_bridge(model), logit_difference(7, 9)
    corrupt = tokens.flip(0)
    _, cache = bridge.run_with_cache(tokens)

    def scalar(logits):
        return metric(logits)[0]

    blocks = patching.get_act_patch_block_every(bridge, corrupt, cache, scalar)  # [type layer pos]
    mid = patching.get_act_patch_resid_mid(bridge, corrupt, cache, scalar)  # [layer pos]
    heads = patching.get_act_patch_attn_head_all_pos_every(bridge, corrupt, cache, scalar)  # [type layer head]
    by_pos = patching.get_act_patch_attn_head_out_by_pos(bridge, corrupt, cache, scalar)  # [layer pos head]
    everything = slice(None)
    for layer in range(3):
        cells = [(f"hook_{leaf}", (everything, 4), blocks[n, layer, 4])
                 for n, leaf in enumerate(("resid_pre", "attn_out", "mlp_out"))]  # fmt: skip
        cells += [
            (f"attn.hook_{leaf}", (everything, everything, 1), heads[n, layer, 1]) for n, leaf in enumerate("zqkv")
        ]
        cells += [
            ("hook_resid_mid", (everything, 6), mid[layer, 6]),
            ("attn.hook_pattern", (everything, 5), heads[4, layer, 5]),
            ("attn.hook_z", (everything, 6, 2), by_pos[layer, 6, 2]),
        ]
        for leaf, place, found in cells:
            name = f"blocks.{layer}.{leaf}"
            expected = patched_by_hand(model, corrupt, cache[name], name, place, metric)
            assert_near(found, expected, bridge(corrupt))


@torch.no_grad()
def test_patching_result_and_generic_patch_of_an_expert_point(nano):
    bridge, clean, corrupt = as_bridge(nano), torch.arange(300, 305)[None], torch.arange(400, 405)[None]
    _, cache = bridge.run_with_cache(clean, names_filter=lambda name: True)
    assert torch.equal(cache["router_logits", 2], cache["blocks.2.mlp.hook_router_logits"])

    def put_routing(x, index, clean_activation):
        x[:, index[1]] = clean_activation[:, index[1]]
        return x

    cells = pd.DataFrame([(1, 2), (4, 4)], columns=["layer", "pos"])
    result = patching.generic_activation_patch(
        bridge, corrupt, cache, lambda logits: logits[:, -1, 700], put_routing, "router_logits",
        index_df=cells, reduce="none", baseline=True,
    )  # fmt: skip
    for effect, (layer, pos) in zip(result.effect(), cells.itertuples(index=False), strict=True):
        name = f"blocks.{layer}.mlp.hook_router_logits"
        place = (slice(None), pos)
        expected = patched_by_hand(nano, corrupt, cache[name], name, place, lambda logits: logits[:, -1, 700])
        logits = nano(corrupt)
        assert_near(effect[0], expected - logits[0, -1, 700], logits)


@torch.no_grad()
def test_decompositions_sum_to_the_stream_and_attributions_to_the_logit(bridged):
    _, bridge, clean, *_ = bridged
    logits, cache = bridge.run_with_cache(clean)
    assert_near(cache.decompose_resid().sum(0), cache["resid_post", 5])
    heads = cache.stack_head_results(incl_remainder=True)
    assert_near(heads.sum(0), cache["resid_post", 5])
    torch.testing.assert_close(cache.accumulated_resid()[3], cache["resid_pre", 3])
    attributed = cache.logit_attrs(cache.decompose_resid(), tokens=700, incorrect_tokens=900)
    assert_near(attributed.sum(0), logits[..., 700] - logits[..., 900], logits)
    by_tool = analysis.direct_logit_attribution(bridge, clean, answer_tokens=torch.tensor([700]))
    torch.testing.assert_close(by_tool.attribution.sum(), logits[0, -1, 700], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_neuron_results_on_dense_and_a_clear_refusal_on_experts(nano, nano_dense):
    clean = torch.arange(300, 305)[None]
    dense = as_bridge(nano_dense)
    _, cache = dense.run_with_cache(clean)
    everything = cache.get_full_resid_decomposition(expand_neurons=True)
    torch.testing.assert_close(everything.sum(0), cache["resid_post", 5], atol=1e-4, rtol=1e-4)
    with pytest.raises(HookError, match=r"experiments\.lens"):
        _ = as_bridge(nano).blocks[0].mlp.W_out
    _, cache = as_bridge(nano).run_with_cache(clean)
    direction = torch.ones(nano.cfg.d_model)
    for ask in (
        cache.get_full_resid_decomposition, lambda: cache.stack_neuron_results(3), lambda: cache.get_neuron_results(0),
        lambda: cache.stack_neuron_results(3, apply_ln=True, project_output_onto=direction), lambda: cache["post", -1],
    ):  # fmt: skip
        with pytest.raises(HookError, match=r"expected a dense MLP, got a mixture of experts.*experiments\.lens"):
            ask()
    whole = cache.get_full_resid_decomposition(expand_neurons=False)
    torch.testing.assert_close(whole.sum(0), cache["resid_post", 5], atol=1e-4, rtol=1e-4)
    with pytest.raises(KeyError, match="hook_nonsense"):
        _ = cache["nonsense", 0]


@torch.no_grad()
def test_logit_lens_ends_in_the_models_own_prediction(bridged):
    model, bridge, clean, *_ = bridged
    target = model(clean)[0, -1].argmax()
    ranks = analysis.logit_lens(bridge, clean, targets=target[None]).rank_trajectory()
    assert int(ranks.flatten()[-1]) == 0


def test_node_attribution_equals_gradient_times_difference(bridged):
    model, bridge, clean, corrupt, metric = bridged
    found = dict(analysis.attribution_patch(bridge, clean, corrupt, lambda x: metric(x)[0]).top_nodes(10_000))
    _, clean_cache = model.run_with_cache(clean)
    _, cache = model.run_with_cache(corrupt)
    gradients = {}
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(6)]
    with model.hooks(bwd_hooks=[(names, lambda g, hook: gradients.__setitem__(hook.name, g))]):
        metric(model(corrupt))[0].backward()
    for node, value in found.items():
        if node.kind == "attn_head_out":
            difference = clean_cache[node.hook_name] - cache[node.hook_name]
            expected = (difference * gradients[node.hook_name])[0, node.position, node.head].sum()
            assert value == pytest.approx(float(expected), abs=1e-4)


def test_our_own_experiments_give_the_numbers_of_these_tools(bridged):
    """Patching, direct logit attribution, node attribution, a path into queries: two implementations, one answer."""
    model, bridge, clean, corrupt, _ = bridged
    metric = logit_difference(700, 900)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        _, corrupt_cache = bridge.run_with_cache(corrupt)
        stack, labels = cache.decompose_resid(return_labels=True)
        attributed = cache.logit_attrs(stack, tokens=700, incorrect_tokens=900)[:, 0, -1].tolist()
        paths = patching.get_act_patch_direct_path(
            bridge, corrupt, cache, corrupt_cache, lambda x: metric(x)[0], 3, 1, "q", verbose=False
        )
        by_layer_and_pos = patching.get_act_patch_resid_pre(bridge, corrupt, cache, lambda x: metric(x)[0])
        by_head = patching.get_act_patch_attn_head_v_all_pos(bridge, corrupt, cache, lambda x: metric(x)[0])
    pairs = Pairs(clean, corrupt)
    own = patch(model, pairs, metric, "resid_pre", progress=False).frame.sort("layer", "pos")["value"].to_list()
    assert own == pytest.approx(by_layer_and_pos.flatten().tolist(), abs=1e-4)
    own = patch(model, pairs, metric, "v", all_positions=True, progress=False).frame.sort("layer", "head")["value"]
    assert own.to_list() == pytest.approx(by_head.flatten().tolist(), abs=1e-4)

    ours = direct_logit_attribution(model, clean, 700, 900, parts="component").frame
    names = {"embed": "embed", **{f"{i}_{part}_out": f"{part} {i}" for i in range(6) for part in ("attn", "mlp")}}
    by_name = {
        row["component"] + ("" if row["layer"] is None else f" {row['layer']}"): row["value"]
        for row in ours.rows(named=True)
    }
    assert attributed == pytest.approx([by_name[names[label]] for label in labels], abs=1e-4)

    edges = [(f"head {3}.{1}", f"q {layer}.{head}") for layer in (4, 5) for head in range(4)]
    values = path_patching(model, pairs, metric, edges).frame["value"].to_list()
    assert values == pytest.approx(paths[4:].flatten().tolist(), abs=1e-4)

    nodes = dict(analysis.attribution_patch(bridge, clean, corrupt, lambda x: metric(x)[0]).top_nodes(10_000))
    theirs = {
        (node.layer, node.position, node.head): value for node, value in nodes.items() if node.kind == "attn_head_out"
    }
    heads = attribution_patching(model, pairs, metric, kinds=["head"], exact_sample=0).frame
    assert len(heads) == len(theirs)
    for row in heads.rows(named=True):
        assert row["value"] == pytest.approx(theirs[row["layer"], row["pos"], row["head"]], abs=1e-3)


@pytest.mark.slow
def test_their_own_bridge_on_the_same_checkpoint_gives_the_same_patches(nano):
    theirs = TransformerBridge.boot_transformers(nano.source, device="cpu", dtype=torch.float32)
    clean, corrupt = torch.arange(300, 305)[None], torch.arange(400, 405)[None]
    with torch.no_grad():
        for sweep in (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_head_out_all_pos):
            one, other = (
                sweep(model, corrupt, model.run_with_cache(clean)[1], lambda x: x[0, -1, 700] - x[0, -1, 900])
                for model in (theirs, as_bridge(nano))
            )
            torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_by_name(nano):
    bridge = as_bridge(nano)
    with pytest.raises(HookError, match="hook_attn_scores"):
        bridge.run_with_cache(torch.arange(300, 305)[None], names_filter="blocks.0.attn.hook_attn_score")
    with pytest.raises(ConfigError, match="single token"):
        bridge.to_single_token("日本の首都")
    with pytest.raises(ConfigError, match="return_type"):
        bridge(torch.arange(300, 305)[None], return_type="logit")
    with pytest.raises(HookError, match="set_use_split_qkv_input"):
        bridge.run_with_hooks(
            torch.arange(300, 305)[None], fwd_hooks=[("blocks.1.attn.hook_q_input", lambda x, hook: x)]
        )
