"""nnsight reads, edits, forces, differentiates and generates through our hook points, one prompt apart from another."""

from __future__ import annotations

import gc

import pytest
import torch
from closeness import assert_near

from workbench import load_model
from workbench.errors import HookError, ShapeError
from workbench.hooks import HookPoint

pytest.importorskip("nnsight", reason="the nnsight extra is not installed")

from workbench.interop.nnsight import _GROUPS, wrap


def test_every_hook_point_is_an_envoy_and_reads_what_our_cache_reads(nano, prompt):
    wrapped = wrap(nano)
    _, cache = nano.run_with_cache(prompt, names_filter=lambda name: True)
    paths = {envoy.path.removeprefix("model.") for envoy in wrapped.modules() if isinstance(envoy._module, HookPoint)}
    assert paths == set(nano.hook_dict)
    found = {}
    with torch.no_grad(), wrapped.trace(prompt) as tracer:
        kept = tracer.cache(modules=[wrapped.get(name) for name in nano.hook_dict]).save()
    for name in nano.hook_dict:
        found[name] = kept[f"model.{name}"].output
    assert found.keys() == cache.keys()
    for name, activation in cache.items():
        torch.testing.assert_close(found[name].detach(), activation, atol=2e-5, rtol=1e-4)


def test_lazy_points_are_computed_only_when_asked_for(nano, prompt):
    wrapped = wrap(nano)
    computed = []
    original = type(nano.blocks[0].attn)._eager
    type(nano.blocks[0].attn)._eager = lambda self, *a: computed.append(self.layer) or original(self, *a)
    try:
        with torch.no_grad(), wrapped.trace(prompt):
            wrapped.blocks[1].hook_resid_post.output.save()
        assert computed == []
        with torch.no_grad(), wrapped.trace(prompt):
            pattern = wrapped.blocks[2].attn.hook_pattern.output.save()
        assert computed == [2]
        assert pattern.shape == (2, nano.cfg.n_heads, 7, 7)
    finally:
        type(nano.blocks[0].attn)._eager = original


def test_every_lazy_point_has_a_group_that_decides_about_it(nano, nano_dense):
    grouped = {leaf for group in _GROUPS for leaf in group}
    for model in (nano, nano_dense):
        lazy = {name.rpartition(".")[2] for name, point in model.hook_dict.items() if point.cost}
        assert lazy <= grouped
        assert not any(model.hook_dict[f"blocks.0.attn.{anchor}"].cost for anchor in ("hook_rot_k", "hook_z"))


def test_editing_router_logits_reroutes_as_our_own_hook_does(nano, prompt):
    def favour(x, hook):
        x = x.clone()
        x[..., 3] = 1e3
        return x

    wrapped = wrap(nano)
    with torch.no_grad():
        expected = nano.run_with_hooks(prompt, fwd_hooks=[("blocks.1.mlp.hook_router_logits", favour)])
        with wrapped.trace(prompt):
            logits = wrapped.blocks[1].mlp.hook_router_logits.output.clone()
            logits[..., 3] = 1e3
            wrapped.blocks[1].mlp.hook_router_logits.output = logits
            ids = wrapped.blocks[1].mlp.hook_expert_ids.output.save()
            out = wrapped.output.save()
    assert bool((ids[..., 0] == 3).all())
    assert_near(out, expected)


def test_forcing_expert_ids_and_replacing_one_experts_output(nano, prompt):
    wrapped = wrap(nano)
    with torch.no_grad(), wrapped.trace(prompt):
        ids = torch.zeros_like(wrapped.blocks[0].mlp.hook_expert_ids.output) + torch.arange(nano.cfg.k)
        wrapped.blocks[0].mlp.hook_expert_ids.output = ids
        zeroed = torch.zeros_like(wrapped.blocks[0].mlp.hook_expert_out.output)
        wrapped.blocks[0].mlp.hook_expert_out.output = zeroed
        mlp_out = wrapped.blocks[0].hook_mlp_out.output.save()
    assert bool((mlp_out == 0).all())


def test_gradients_reach_router_logits(nano, prompt):
    wrapped = wrap(nano)
    seen = []
    hooks = {"bwd_hooks": [("blocks.2.mlp.hook_router_logits", lambda g, hook: seen.append(g))]}
    with nano.hooks(**hooks):
        nano(prompt)[:, -1, 50].sum().backward()
    with wrapped.trace(prompt):
        logits = wrapped.blocks[2].mlp.hook_router_logits.output
        score = wrapped.output[:, -1, 50].sum()
        with score.backward():
            gradient = logits.grad.save()
    assert gradient.abs().sum() > 0
    assert_near(gradient, seen[0])


def test_an_edit_in_one_invoke_leaves_the_other_bit_equal(nano):
    """With `reference`, whose rows do not share a product: the others may round by how many rows an expert gets."""
    model = load_model(nano.source, dtype="float32", moe_impl="reference", progress=False)
    wrapped = wrap(model)
    first, second = torch.arange(300, 307)[None], torch.arange(400, 407)[None]

    def run(edit: bool):
        with torch.no_grad(), wrapped.trace() as tracer:
            with tracer.invoke(first):
                router = wrapped.blocks[0].mlp.hook_router_logits.output.save()
                experts = wrapped.blocks[3].mlp.hook_expert_out.output.save()
                kept = wrapped.output.save()
            with tracer.invoke(second):
                logits = wrapped.blocks[0].mlp.hook_router_logits.output.clone()
                if edit:
                    logits[..., 2] = 1e3
                    wrapped.blocks[0].mlp.hook_router_logits.output = logits
                ids = wrapped.blocks[0].mlp.hook_expert_ids.output.save()
                changed = wrapped.output.save()
        return router, experts, kept, ids, changed

    plain, edited = run(edit=False), run(edit=True)
    for one, other in zip(plain[:3], edited[:3], strict=True):
        assert torch.equal(one, other)
    assert plain[0].shape == (1, 7, nano.cfg.n_experts)
    assert bool((edited[3][..., 0] == 2).all())
    assert not torch.allclose(plain[4], edited[4], atol=0.1)


def test_the_stock_library_on_transformers_leaks_there(nano):
    """Why the test above matters: the same trace on transformers' model changes the untouched prompt."""
    nnsight, transformers = pytest.importorskip("nnsight"), pytest.importorskip("transformers")
    hf_model = transformers.Qwen3MoeForCausalLM.from_pretrained(nano.source, dtype=torch.float32).eval()
    stock = nnsight.LanguageModel(hf_model, tokenizer=transformers.AutoTokenizer.from_pretrained(nano.source))
    first, second = torch.arange(300, 307)[None], torch.arange(400, 407)[None]

    def run(edit: bool):
        with torch.no_grad(), stock.trace() as tracer:
            with tracer.invoke({"input_ids": first}):
                kept = stock.output.logits.save()
            with tracer.invoke({"input_ids": second}):
                logits = stock.model.layers[0].mlp.gate.source.F_linear_0.output.clone()
                if edit:
                    logits[..., 2] = 1e3
                stock.model.layers[0].mlp.gate.source.F_linear_0.output = logits
        return kept

    assert (run(edit=True) - run(edit=False)).abs().max() > 0.1


def test_invokes_of_different_lengths_are_padded_and_give_their_own_logits(nano):
    wrapped = wrap(nano)
    with torch.no_grad():
        with wrapped.trace() as tracer:
            with tracer.invoke("日本の首都は"):
                japanese = wrapped.output.save()
            with tracer.invoke([[1, 300, 301], [1, 400, 401]]):
                ids = wrapped.output.save()
        text = torch.tensor([nano.tokenizer.to_tokens("日本の首都は", bos=True)])
        torch.testing.assert_close(japanese[:, -text.shape[1] :], nano(text), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ids[1:, -3:], nano(torch.tensor([[1, 400, 401]])), atol=1e-4, rtol=1e-4)


def test_generation_is_traced_step_by_step_lazy_points_included(nano, prompt):
    wrapped = wrap(nano)
    expected = nano.generate(prompt, max_new_tokens=4, stop_ids=[])
    with wrapped.generate(prompt, max_new_tokens=4, stop_ids=[]) as tracer:
        shapes, chosen = [].save(), [].save()
        for step in tracer.iter[:4]:
            if step == 2:
                shapes.append(wrapped.blocks[1].mlp.hook_expert_out.output.shape)
            chosen.append(wrapped.unembed.output[:, -1].argmax(-1))
        result = tracer.result.save()
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(torch.stack(list(chosen), 1), expected.tokens[:, 7:])
    assert list(shapes) == [(2, 1, nano.cfg.k, nano.cfg.d_model)]


def test_the_batch_wide_load_is_refused_across_invokes(nano, prompt):
    wrapped = wrap(nano)

    def read_load():
        with torch.no_grad(), wrapped.trace() as tracer:
            with tracer.invoke(prompt):
                wrapped.blocks[0].mlp.hook_expert_load.output.save()
            with tracer.invoke(prompt):
                wrapped.output.save()

    with pytest.raises(HookError, match="one invoke"):
        read_load()


@pytest.mark.parametrize("bad", [3, torch.zeros(1, 2, 3)])
def test_a_prompt_that_is_none_is_refused(nano, prompt, bad):
    wrapped = wrap(nano)

    def trace_both():
        with torch.no_grad(), wrapped.trace() as tracer:
            with tracer.invoke(bad):
                wrapped.output.save()
            with tracer.invoke(prompt):
                wrapped.output.save()

    with pytest.raises(ShapeError, match="prompt: expected"):
        trace_both()


def test_outside_a_trace_the_model_is_as_before(nano, prompt):
    with torch.no_grad():
        before = nano(prompt)
        wrapped = wrap(nano)
        assert not any(point.listened for point in nano.hook_dict.values())
        assert torch.equal(nano(prompt), before)
        with wrapped.trace(prompt):
            after = wrapped.output.save()
    assert torch.equal(after, before)


def test_wrapping_again_adds_no_watchers(nano_dense):
    first = wrap(nano_dense)
    counts = {name: len(point.watchers) for name, point in nano_dense.hook_dict.items()}
    assert set(counts.values()) == {1}
    assert wrap(nano_dense) is first
    del first
    gc.collect()
    again = wrap(nano_dense)
    assert {name: len(point.watchers) for name, point in nano_dense.hook_dict.items()} == counts
    with torch.no_grad(), again.trace(torch.tensor([[1, 300, 301]])):
        seen = again.blocks[1].hook_resid_post.output.save()
    _, cache = nano_dense.run_with_cache(torch.tensor([[1, 300, 301]]))
    torch.testing.assert_close(seen.detach(), cache["resid_post", 1].detach())
