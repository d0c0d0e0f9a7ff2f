from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import QWEN3_MOE
from torch import Tensor

from workbench.errors import ConfigError, HookError
from workbench.hooks import HookPoint
from workbench.models import Qwen3Moe, build_model, init_weights
from workbench.models.moe import Moe, expert_load
from workbench_kernels import Intervene

ROUTER = "blocks.0.mlp."


def routing(model: Qwen3Moe, tokens: Tensor, **kwargs: object) -> dict[str, Tensor]:
    names = ["router_logits", "router_probs", "expert_ids", "routing_weights", "expert_load"]
    _, cache = model.run_with_cache(tokens, names_filter=[f"{ROUTER}hook_{name}" for name in names], **kwargs)
    return {name: cache[f"{ROUTER}hook_{name}"] for name in names}


def test_the_steps_of_routing_agree(moe: Qwen3Moe, tokens: Tensor) -> None:
    r = routing(moe, tokens)
    assert torch.allclose(r["router_probs"], r["router_logits"].softmax(-1))
    kept = r["router_probs"].gather(-1, r["expert_ids"])
    assert (kept.diff(dim=-1) <= 0).all(), "ids are by descending weight"
    assert torch.allclose(r["routing_weights"], kept / kept.sum(-1, keepdim=True))
    counts = torch.bincount(r["expert_ids"].flatten(), minlength=8)
    assert torch.allclose(r["expert_load"], counts / counts.sum())


def test_without_renormalisation_weights_are_the_probabilities(tokens: Tensor) -> None:
    import dataclasses

    cfg = dataclasses.replace(QWEN3_MOE, norm_topk_prob=False)
    model = init_weights(build_model(cfg), seed=1, std=0.2)
    assert isinstance(model, Qwen3Moe)
    r = routing(model, tokens)
    assert torch.equal(r["routing_weights"], r["router_probs"].gather(-1, r["expert_ids"]))


def test_masking_a_logit_reroutes_to_the_next_best(moe: Qwen3Moe, tokens: Tensor) -> None:
    clean = routing(moe, tokens)
    gone = int(clean["expert_ids"][0, 0, 0])

    def mask(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[..., gone] = -torch.inf
        return x

    with moe.hooks([(f"{ROUTER}hook_router_logits", mask)]):
        r = routing(moe, tokens)
    assert not (r["expert_ids"] == gone).any()
    assert torch.allclose(r["routing_weights"].sum(-1), torch.ones(2, 7))
    fourth = clean["router_logits"][0, 0].argsort(descending=True)[1:4]
    assert r["expert_ids"][0, 0].tolist() == fourth.tolist()


def test_editing_weights_changes_the_mix_and_not_the_experts(moe: Qwen3Moe, tokens: Tensor) -> None:
    outs = f"{ROUTER}hook_expert_out"
    _, clean = moe.run_with_cache(tokens, names_filter=[outs, "blocks.0.hook_mlp_out"])
    with moe.hooks(
        [(f"{ROUTER}hook_routing_weights", lambda w, hook: torch.zeros_like(w).index_fill(-1, torch.tensor(0), 1.0))]
    ):
        _, mixed = moe.run_with_cache(tokens, names_filter=[outs, "blocks.0.hook_mlp_out"])
    assert torch.equal(mixed[outs], clean[outs])
    assert torch.allclose(mixed["blocks.0.hook_mlp_out"], clean[outs][:, :, 0], atol=1e-6)


def test_forcing_experts_takes_their_own_probabilities(moe: Qwen3Moe, tokens: Tensor) -> None:
    with moe.hooks([(f"{ROUTER}hook_expert_ids", lambda ids, hook: torch.tensor([5, 1, 2]).expand_as(ids).clone())]):
        r = routing(moe, tokens)
    assert (r["expert_ids"] == torch.tensor([5, 1, 2])).all()
    kept = r["router_probs"][..., [5, 1, 2]]
    assert torch.allclose(r["routing_weights"], kept / kept.sum(-1, keepdim=True))
    with pytest.raises(HookError, match="expected ids from 0 to 7, got 9 to 9"):
        moe.run_with_hooks(tokens, fwd_hooks=[(f"{ROUTER}hook_expert_ids", lambda ids, hook: ids.fill_(9))])
    with pytest.raises(HookError, match="expected ids from 0 to 7, got 8 to 8"):
        moe.run_with_hooks(tokens, fwd_hooks=[(f"{ROUTER}hook_expert_ids", lambda ids, hook: ids * 0 + 8)])


def test_prompts_never_leak_into_one_another(moe: Qwen3Moe, tokens: Tensor) -> None:
    clean = moe(tokens)

    def second_only(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[1, :, 3] += 50
        return x

    edited = moe.run_with_hooks(tokens, fwd_hooks=[(f"{ROUTER}hook_router_logits", second_only)])
    assert torch.allclose(edited[0], clean[0], atol=1e-6)
    assert (edited[1] - clean[1]).abs().max() > 0.01


def test_exact_ties_go_to_the_lowest_id_among_many_experts() -> None:
    moe = Moe(dataclasses.replace(QWEN3_MOE, n_experts=128, k=8), "sorted", "float32")
    probs = (
        torch.rand(1, 500, 128, generator=torch.Generator().manual_seed(0)).mul(6).floor()
    )  # six values: mostly ties
    ids = moe._top_k(probs, Intervene())
    expected = sorted(range(128), key=lambda expert: (-float(probs[0, 0, expert]), expert))[:8]
    assert ids[0, 0].tolist() == expected
    order = probs.gather(-1, ids)
    assert bool((order.diff(dim=-1) <= 0).all())
    tied = order.diff(dim=-1) == 0
    assert bool((ids.diff(dim=-1)[tied] > 0).all())


def test_exact_ties_go_to_the_lowest_id(moe: Qwen3Moe, tokens: Tensor) -> None:
    with moe.hooks([(f"{ROUTER}hook_router_logits", lambda x, hook: torch.zeros_like(x))]):
        r = routing(moe, tokens)
    assert (r["expert_ids"] == torch.tensor([0, 1, 2])).all()


def test_the_router_is_float32_in_a_bfloat16_model(tokens: Tensor) -> None:
    trained = init_weights(build_model(QWEN3_MOE, dtype=torch.bfloat16), 1, 0.2)
    as_hf = init_weights(build_model(QWEN3_MOE, dtype=torch.bfloat16, router_dtype="model"), 1, 0.2)
    for model, dtype in ((trained, torch.float32), (as_hf, torch.bfloat16)):
        assert isinstance(model, Qwen3Moe)
        r = routing(model, tokens)
        assert (r["router_logits"].dtype, r["routing_weights"].dtype) == (dtype, dtype)
        assert r["router_probs"].dtype == torch.float32
        rows = {row.name: row.dtype for row in model.hook_table()}
        assert rows[f"{ROUTER}hook_router_logits"] == str(dtype).removeprefix("torch.")


def test_load_counts_tokens_and_not_padding(moe: Qwen3Moe, tokens: Tensor) -> None:
    alone = routing(moe, tokens)["expert_load"]
    padded = torch.cat([torch.full((2, 4), 9), tokens], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 7] * 2)
    assert torch.equal(routing(moe, padded, attention_mask=mask)["expert_load"], alone)
    assert expert_load(torch.empty(0, 3).long(), None, 4).tolist() == [0, 0, 0, 0]


def test_counting_the_load_waits_for_no_device() -> None:
    """The meta device has no values: whatever would wait for them raises there."""
    ids, valid = torch.zeros(2, 3, 2, dtype=torch.int64, device="meta"), torch.ones(2, 3, dtype=bool, device="meta")
    for counted in (None, valid):
        load = expert_load(ids, counted, 4)
        assert (load.shape, load.dtype) == ((4,), torch.float32)


def test_implementations_give_the_same_model(moe: Qwen3Moe, tokens: Tensor) -> None:
    for impl in ("reference", "grouped_mm"):
        other = build_model(QWEN3_MOE, moe_impl=impl)
        other.load_state_dict(moe.state_dict())
        assert other.moe_impl == impl
        assert torch.allclose(other(tokens), moe(tokens), atol=1e-5)


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe_impl: expected one of auto, sorted, .*, triton, got 'cuda'"):
        build_model(QWEN3_MOE, moe_impl="cuda")
    with pytest.raises(ConfigError, match="router_dtype: expected one of float32, model, got 'bf16'"):
        build_model(QWEN3_MOE, router_dtype="bf16")
    with pytest.raises(ConfigError, match="attn_impl: expected one of sdpa, eager, got 'flash'"):
        build_model(QWEN3_MOE, attn_impl="flash")
