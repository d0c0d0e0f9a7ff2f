"""Every advertised hook point fires, has its documented shape, reads without a trace and acts when it is edited."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import HookError
from workbench.hooks import HookPoint
from workbench.models import Llama, Qwen3Moe

LAST = "ln_final.hook_normalized"


def dims(model: Llama, batch: int, pos: int) -> dict[str, int]:
    cfg = model.cfg
    known = {
        "batch": batch, "pos": pos, "query_pos": pos, "key_pos": pos, "1": 1, "head": cfg.n_heads,
        "kv_head": cfg.n_kv_heads, "d_head": cfg.d_head, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp,
    }  # fmt: skip
    if isinstance(model, Qwen3Moe):
        known |= {"expert": model.cfg.n_experts, "k": model.cfg.k, "d_expert": model.cfg.d_expert}
    return known


def test_every_advertised_hook_fires_once_with_its_shape_and_dtype(model: Llama, tokens: Tensor) -> None:
    fired: dict[str, tuple[tuple[int, ...], str]] = {}

    def note(x: Tensor, hook: HookPoint) -> None:
        assert hook.name not in fired, f"{hook.name} fired twice"
        fired[hook.name] = (tuple(x.shape), str(x.dtype).removeprefix("torch."))

    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: True, note)])
    sizes = dims(model, *tokens.shape)
    documented = {row.name: (tuple(sizes[axis] for axis in row.shape.split()), row.dtype) for row in model.hook_table()}
    assert fired == documented


def test_names_are_the_ones_of_the_field(moe: Qwen3Moe, llama: Llama) -> None:
    block = {name.removeprefix("blocks.0.") for name in moe.hook_dict if name.startswith("blocks.0.")}
    assert block == {
        "hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v",
        "attn.hook_q_normed", "attn.hook_k_normed", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores",
        "attn.hook_pattern", "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_resid_mid", "ln2.hook_scale",
        "ln2.hook_normalized", "mlp.hook_router_logits", "mlp.hook_router_probs", "mlp.hook_expert_ids",
        "mlp.hook_routing_weights", "mlp.hook_expert_load", "mlp.hook_expert_pre", "mlp.hook_expert_pre_linear",
        "mlp.hook_expert_post", "mlp.hook_expert_out", "hook_mlp_out", "hook_resid_post",
    }  # fmt: skip
    assert {"hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"} <= set(moe.hook_dict)
    assert {"blocks.2.mlp.hook_pre", "blocks.2.mlp.hook_pre_linear", "blocks.2.mlp.hook_post"} <= set(llama.hook_dict)


def distinct(model: Llama) -> dict[str, HookPoint]:
    """The hook points that differ in kind: the last layer repeats the first."""
    return {name: point for name, point in model.hook_dict.items() if not name.startswith("blocks.2.")}


def test_reading_any_hook_changes_no_bit(model: Llama, tokens: Tensor) -> None:
    for block in model.blocks:  # scores and pattern exist only in eager attention: compare like with like
        block.attn.attn_impl = "eager"
    clean = model(tokens)
    for name in distinct(model):
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: None)]), clean), name
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x)]), clean), name


def different(x: Tensor, hook: HookPoint) -> Tensor:
    if x.dtype == torch.int64:
        return (x + 1) % 8
    return torch.where(torch.isfinite(x), x * 0.3 + 0.1 * torch.arange(x.shape[-1]), x)


def test_editing_any_hook_changes_the_logits(model: Llama, tokens: Tensor) -> None:
    clean = model(tokens)
    for name, point in distinct(model).items():
        if point.read_only:
            with pytest.raises(HookError, match="read-only"):
                model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * 0)])
            continue
        edited = model.run_with_hooks(tokens, fwd_hooks=[(name, different)])
        assert (edited - clean).abs().max() > 1e-3, f"editing {name} does nothing"
    assert torch.equal(model(tokens), clean), "hooks stayed attached"


def test_editing_in_place_acts_like_returning(model: Llama, tokens: Tensor) -> None:
    for name, point in distinct(model).items():
        if point.read_only:
            continue

        def in_place(x: Tensor, hook: HookPoint) -> None:
            x.copy_(different(x, hook))

        with torch.no_grad():
            returned = model.run_with_hooks(tokens, fwd_hooks=[(name, different)])
            assert torch.allclose(model.run_with_hooks(tokens, fwd_hooks=[(name, in_place)]), returned, atol=1e-5), name


def test_backward_hooks_see_the_gradient_of_what_downstream_used(model: Llama, tokens: Tensor) -> None:
    """The gradient at each point equals the directional derivative found by moving the activation there."""
    model.double()
    direction = torch.Generator().manual_seed(3)
    for name, point in distinct(model).items():
        if point.dtype == "int64" or point.read_only:
            continue
        caught: dict[str, Tensor] = {}
        loss = model.run_with_hooks(
            tokens,
            fwd_hooks=[(name, lambda x, hook, c=caught: c.__setitem__("x", x.detach()))],
            bwd_hooks=[(name, lambda g, hook, c=caught: c.__setitem__("g", g))],
        )[:, -1, 7].sum()
        loss.backward()
        x = caught["x"]
        step = torch.randn(x.shape, generator=direction, dtype=torch.float64)
        step = torch.where(torch.isfinite(x), step, 0) * 1e-6

        def moved(sign: int, x: Tensor = x, step: Tensor = step, name: str = name) -> Tensor:
            with torch.no_grad():
                return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda _, hook: x + sign * step)])[:, -1, 7].sum()

        assert torch.allclose((moved(1) - moved(-1)) / 2, (caught["g"] * step).sum(), rtol=1e-5, atol=1e-12), name


def test_a_backward_hook_can_replace_the_gradient(llama: Llama, tokens: Tensor) -> None:
    logits = llama.run_with_hooks(tokens, bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: g * 0)])
    logits.sum().backward()
    assert llama.blocks[0].attn.q_proj.weight.grad.abs().max() == 0
    assert llama.blocks[1].attn.q_proj.weight.grad.abs().max() > 0


def test_a_backward_hook_where_no_gradient_flows_says_so(moe: Qwen3Moe, tokens: Tensor) -> None:
    with pytest.raises(HookError, match=r"blocks.0.mlp.hook_expert_ids: expected a tensor with a gradient"):
        moe.run_with_hooks(tokens, bwd_hooks=[("blocks.0.mlp.hook_expert_ids", lambda g, hook: None)])
    with torch.no_grad(), pytest.raises(HookError, match="Run with gradients enabled"):
        moe.run_with_hooks(tokens, bwd_hooks=[("hook_embed", lambda g, hook: None)])


def test_an_idle_point_passes_its_tensor_through_untouched() -> None:
    point, x = HookPoint("batch"), torch.ones(2)
    assert point(x) is x
    point.add_hook(lambda x, hook: x + 1)
    assert point(x).tolist() == [2, 2]
    point.remove_hooks()
    assert point(x) is x


def test_what_nobody_asked_for_is_not_computed(moe: Qwen3Moe, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention, per-head results and slot-ordered activations happen only on request."""
    from workbench.models.attention import Attention
    from workbench.models.moe import Tap

    calls: list[str] = []
    eager, result, tap = Attention._eager, Attention._result, Tap.__call__
    monkeypatch.setattr(Attention, "_eager", lambda self, *a: calls.append("eager") or eager(self, *a))
    monkeypatch.setattr(Attention, "_result", lambda self, *a: calls.append("result") or result(self, *a))
    monkeypatch.setattr(Tap, "__call__", lambda self, x: calls.append("tap") or tap(self, x))
    moe.run_with_cache(tokens)
    assert calls == []
    moe.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_pattern", "blocks.2.mlp.hook_expert_out"])
    assert calls == ["eager", "tap"]


def test_a_hook_registered_through_torch_counts_as_listening(moe: Qwen3Moe, tokens: Tensor) -> None:
    seen: list[torch.Size] = []
    handle = moe.hook_dict["blocks.0.mlp.hook_expert_out"].register_forward_hook(
        lambda module, args, out: seen.append(out.shape)
    )
    moe(tokens)
    handle.remove()
    assert seen == [torch.Size([2, 7, 3, 32])]


def test_cache_holds_what_was_asked_for(moe: Qwen3Moe, tokens: Tensor) -> None:
    logits, cache = moe.run_with_cache(tokens)
    assert torch.equal(logits, moe(tokens))
    assert set(cache) == {name for name, point in moe.hook_dict.items() if not point.cost}
    assert cache["resid_post", 1] is cache["blocks.1.hook_resid_post"]
    assert cache["router_logits", 0].shape == (2, 7, 8)
    assert cache.stack("router_logits").shape == (2, 2, 7, 8)  # layer 1 is dense
    assert not cache["resid_post", 1].requires_grad
    _, some = moe.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    assert set(some) == {f"blocks.{layer}.attn.hook_pattern" for layer in range(3)}
    assert torch.allclose(some["pattern", 0].sum(-1), torch.ones(2, 6, 7))
    with pytest.raises(HookError, match=r"Did you mean blocks\.0\.attn\.hook_pattern"):
        some["blocks.0.attn.hook_patern"]


def test_activations_can_be_moved_as_they_come(llama: Llama, tokens: Tensor) -> None:
    _, cache = llama.run_with_cache(tokens, names_filter="hook_embed", device="cpu")
    assert cache["hook_embed"].device.type == "cpu"


def test_a_cache_counts_layers_from_the_first(llama: Llama, tokens: Tensor) -> None:
    _, cache = llama.run_with_cache(tokens)
    with pytest.raises(HookError, match=r"got -1. Use model.cfg.n_layers - 1"):
        cache["resid_post", -1]


def test_unknown_names_and_wrong_replacements_are_refused(llama: Llama, tokens: Tensor) -> None:
    with pytest.raises(HookError, match=r"got 'blocks.0.hook_resid_pres'. Did you mean blocks.0.hook_resid_pre"):
        llama.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pres", lambda x, hook: None)])
    with pytest.raises(HookError, match="predicate that accepts some"):
        llama.run_with_cache(tokens, names_filter=lambda name: False)
    for wrong in (
        lambda x, hook: x[:1],
        lambda x, hook: x.half(),
        lambda x, hook: 0.0,
        lambda x, hook: x.to("meta"),
        lambda x, hook: x.to_sparse(),
    ):
        with pytest.raises(HookError, match="Return the same shape and dtype"):
            llama.run_with_hooks(tokens, fwd_hooks=[("hook_embed", wrong)])
    with pytest.raises(HookError, match=r"a tensor \(2, 7, 32\) torch.float32 on cpu, got \(2, 7, 32\) .* on meta\."):
        llama.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: x.to("meta"))])
    assert not llama.hook_dict["hook_embed"].listened, "a hook that raised stayed attached"


@pytest.mark.parametrize(
    ("layers", "reached", "missed"),
    [
        ({"stop_at_layer": 1}, ["hook_embed", "blocks.0.hook_resid_post"], ["blocks.1.hook_resid_pre", LAST]),
        ({"start_at_layer": 0}, ["blocks.0.hook_resid_pre", LAST], ["hook_embed"]),
        ({"start_at_layer": 1}, ["blocks.1.hook_resid_pre", LAST], ["hook_embed", "blocks.0.hook_resid_post"]),
        ({"stop_at_layer": 3}, ["hook_embed", "blocks.2.hook_resid_post"], [LAST]),
    ],
)
def test_a_point_named_outside_the_pass_is_refused(
    model: Llama, tokens: Tensor, layers: dict, reached: list[str], missed: list[str]
) -> None:
    given = model(tokens, stop_at_layer=layers["start_at_layer"]) if "start_at_layer" in layers else tokens
    _, cache = model.run_with_cache(given, names_filter=reached, **layers)
    assert list(cache) == reached
    for name in missed:
        message = f"hook at {name}: expected a point between start_at_layer and stop_at_layer"
        for direction in ("fwd_hooks", "bwd_hooks"):
            with pytest.raises(HookError, match=message):
                model.run_with_hooks(given, **{direction: [([reached[0], name], lambda x, hook: None)]}, **layers)
        with pytest.raises(HookError, match=message):
            model.run_with_cache(given, names_filter=name, **layers)
    _, some = model.run_with_cache(given, names_filter=lambda name: name in {*reached, *missed}, **layers)
    assert list(some) == reached  # a predicate speaks of any pass


def test_a_cache_of_a_part_says_that_the_pass_ended_before(model: Llama, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens, stop_at_layer=1)
    for read in (lambda: cache["resid_pre", 2], lambda: cache["blocks.2.hook_resid_pre"]):
        with pytest.raises(HookError, match=r"only if the pass reached it \(start_at_layer, stop_at_layer\)"):
            read()


def test_a_filter_may_stand_second_and_a_mask_may_not(model: Llama, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens, "hook_embed")
    assert list(cache) == ["hook_embed"]
    with pytest.raises(HookError, match="hook names: expected a name, a list of names or a predicate, got tensor"):
        model.run_with_cache(tokens, torch.ones_like(tokens))


@pytest.mark.parametrize("pairs", [["hook_embed"], [("hook_embed",)], [("hook_embed", 3)], [3]])
def test_hooks_that_are_no_pairs_are_refused(llama: Llama, tokens: Tensor, pairs: list) -> None:
    with pytest.raises(HookError, match="hooks: expected pairs of a name and a function"):
        llama.run_with_hooks(tokens, fwd_hooks=pairs)
    with pytest.raises(HookError, match="hook names: expected a name, a list of names or a predicate, got 3"):
        llama.run_with_cache(tokens, names_filter=3)


def test_directions_that_do_not_exist_are_refused() -> None:
    point = HookPoint("batch")
    with pytest.raises(HookError, match="dir: expected fwd or bwd, got 'forward'"):
        point.add_hook(lambda x, hook: None, dir="forward")
    with pytest.raises(HookError, match="dir: expected fwd, bwd or both, got 'all'"):
        point.remove_hooks("all")


def test_a_hook_may_remove_itself(llama: Llama, tokens: Tensor) -> None:
    point, order = llama.hook_dict["hook_embed"], []

    def once(x: Tensor, hook: HookPoint) -> None:
        order.append("once")
        hook.fwd_hooks.remove(once)

    point.add_hook(once)
    point.add_hook(lambda x, hook: order.append("always"))
    llama(tokens)
    llama(tokens)
    llama.reset_hooks()
    assert order == ["once", "always", "always"]


def test_backward_hooks_registered_through_torch_fire(llama: Llama, tokens: Tensor) -> None:
    seen: list[torch.Size] = []
    handle = llama.hook_dict["blocks.1.hook_resid_pre"].register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0].shape)
    )
    llama(tokens).sum().backward()
    handle.remove()
    assert seen == [torch.Size([2, 7, 32])]


def test_what_both_norms_have_is_told_apart(llama: Llama, tokens: Tensor) -> None:
    _, cache = llama.run_with_cache(tokens)
    with pytest.raises(HookError, match=r"normalized: expected one activation of layer 1, got blocks\.1\.ln1"):
        cache["normalized", 1]
    with pytest.raises(HookError, match="normalized: expected one"):
        cache.stack("normalized")
    assert cache["ln2.normalized", 1] is cache["blocks.1.ln2.hook_normalized"]
    assert torch.equal(cache.stack("ln1.scale")[2], cache["blocks.2.ln1.hook_scale"])


def test_the_table_tells_the_dtypes_of_a_double_model(moe: Qwen3Moe, tokens: Tensor) -> None:
    moe.double()
    _, cache = moe.run_with_cache(tokens)
    rows = {row.name: row.dtype for row in moe.hook_table()}
    assert all(str(x.dtype) == f"torch.{rows[name]}" for name, x in cache.items())


def test_hooks_run_in_order_and_nest(llama: Llama, tokens: Tensor) -> None:
    order: list[str] = []
    with llama.hooks([("hook_embed", lambda x, hook: order.append("outer"))]):
        llama.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: order.append("inner"))])
        llama(tokens)
    llama(tokens)
    assert order == ["outer", "inner", "outer"]


def test_layer_of_a_hook(llama: Llama) -> None:
    assert llama.hook_dict["blocks.2.attn.hook_q"].layer() == 2
    with pytest.raises(HookError, match="inside a block"):
        llama.hook_dict["hook_embed"].layer()


# --- edits in place -----------------------------------------------------------------------------------------------


def zero_in_place(x: torch.Tensor, hook: HookPoint) -> None:
    x.zero_()


@pytest.mark.parametrize("layer", [0, 2])
def test_a_later_edit_in_place_does_not_reach_what_was_cached(model: Llama, tokens: torch.Tensor, layer: int) -> None:
    seen = f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        with model.hooks([(f"blocks.{layer}.hook_resid_pre", zero_in_place)]):
            _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache[seen], clean[seen])
    assert cache["resid_pre", layer].count_nonzero() == 0


def test_an_edit_in_place_does_not_reach_the_callers_residual_stream(model: Llama, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        resid = model(tokens, stop_at_layer=1)
        before = resid.clone()
        model.run_with_hooks(resid, start_at_layer=1, fwd_hooks=[("blocks.1.hook_resid_pre", zero_in_place)])
    assert torch.equal(resid, before)


def test_a_read_only_point_refuses_an_edit_in_place(moe: Llama, tokens: torch.Tensor) -> None:
    with torch.no_grad(), pytest.raises(HookError, match=r"expected no change \(this point is read-only\)"):
        moe.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_expert_load", zero_in_place)])


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fwd_hooks": None}, r"fwd_hooks: expected a list of \(name, function\), got None"),
        ({"fwd_hooks": zero_in_place}, "fwd_hooks: expected a list"),
        ({"bwd_hooks": "blocks.0.hook_resid_pre"}, "bwd_hooks: expected a list"),
        ({"fwd_hooks": [(3, zero_in_place)]}, "hook names: expected a name"),
    ],
)
def test_hooks_of_another_kind_are_refused(model: Llama, tokens: torch.Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(HookError, match=message):
        model.run_with_hooks(tokens, **arguments)


def test_cache_arguments_of_another_kind_are_refused(model: Llama, tokens: torch.Tensor) -> None:
    with pytest.raises(HookError, match="hook name: expected a known one, got 3"):
        model.run_with_cache(tokens, names_filter=[3])
    with pytest.raises(HookError, match="device: expected one this machine has, got 'nowhere'"):
        model.run_with_cache(tokens, device="nowhere")
    _, cache = model.run_with_cache(tokens)
    for key in (3, ("resid_pre", 0, 1), (0, "resid_pre")):
        with pytest.raises(HookError, match="cache: expected a name or a pair"):
            cache[key]


def test_a_function_without_a_place_for_the_hook_is_refused_before_anything_runs(model: Llama, tokens: Tensor) -> None:
    def forgets(tensor: Tensor) -> Tensor:
        return tensor

    with pytest.raises(HookError, match=r"expected one to be called as fn\(tensor, hook=point\), got .*forgets"):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", forgets)])
    with pytest.raises(HookError, match="hook function: expected one"):
        model.hook_dict["hook_embed"].add_hook(lambda tensor: None)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda tensor, **named: None), ("hook_embed", min_of)])


def min_of(*given: object, hook: object) -> None:
    assert len(given) == 1


def test_a_pair_that_is_not_in_the_cache_says_how_it_gets_there(model: Llama, tokens: Tensor) -> None:
    _, cache = model.run_with_cache(tokens)
    with pytest.raises(HookError, match=r"pattern of layer 0 in the cache.*kept only if names_filter names it"):
        cache["pattern", 0]
