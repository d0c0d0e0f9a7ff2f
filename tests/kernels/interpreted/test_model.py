"""The model on the Triton path: the same names, the same numbers, hooks that read and edit, generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import LLAMA, QWEN3_MOE
from torch import Tensor

from workbench.errors import ConfigError, HookError
from workbench.experiments.identity import describe_model
from workbench.hooks import HookPoint
from workbench.models import Qwen3Moe, build_model, generate, init_weights
from workbench_kernels.moe import stages
from workbench_kernels.moe.plan import PATHS

MLP = "blocks.0.mlp.hook_"
POINTS = (
    "router_logits", "router_probs", "expert_ids", "routing_weights", "expert_load",
    "expert_pre", "expert_pre_linear", "expert_post", "expert_out",
)  # fmt: skip
TOKENS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(2))  # skinny
FEW = TOKENS[:1, :3]  # decode


def model(impl: str, dtype: torch.dtype = torch.float32, **options: str) -> Qwen3Moe:
    cfg = dataclasses.replace(QWEN3_MOE, n_layers=1, sparse_layers=(True,))
    return init_weights(build_model(cfg, dtype=dtype, moe_impl=impl, **options), seed=1, std=0.2)


def test_the_hook_table_is_the_same() -> None:
    assert model("triton").hook_table() == model("sorted").hook_table()
    assert model("triton").moe_impl == "triton"


@pytest.mark.parametrize("tokens", [FEW, TOKENS])
def test_every_point_has_the_values_of_the_sorted_model(tokens: Tensor) -> None:
    names = [MLP + name for name in POINTS]
    logits, got = model("triton").run_with_cache(tokens, names_filter=names)
    expected_logits, expected = model("sorted").run_with_cache(tokens, names_filter=names)
    assert torch.allclose(logits, expected_logits, atol=1e-4)
    for name in names:
        assert got[name].shape == expected[name].shape, name
        assert got[name].dtype == expected[name].dtype, name
        assert torch.allclose(got[name].double(), expected[name].double(), atol=1e-5), name


@pytest.mark.parametrize(("dtype", "router_dtype"), [(torch.bfloat16, "float32"), (torch.float16, "model")])
def test_other_dtypes_fire_as_documented(dtype: torch.dtype, router_dtype: str) -> None:
    ours, theirs = (model(impl, dtype, router_dtype=router_dtype) for impl in ("triton", "sorted"))
    seen: dict[str, str] = {}
    ours.run_with_hooks(
        TOKENS, fwd_hooks=[(lambda n: "mlp.hook" in n, lambda x, hook: seen.update({hook.name: str(x.dtype)[6:]}))]
    )
    table = {row.name: row.dtype for row in ours.hook_table()}
    assert seen == {MLP + name: table[MLP + name] for name in POINTS}
    a, b = ours(TOKENS).float(), theirs(TOKENS).float()
    assert (a - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("tokens", [FEW, TOKENS])
def test_reading_everything_changes_no_bit(tokens: Tensor) -> None:
    triton = model("triton", torch.bfloat16)
    clean = triton(tokens)
    assert torch.equal(
        triton.run_with_hooks(tokens, fwd_hooks=[(MLP + n, lambda x, hook: None) for n in POINTS]), clean
    )
    same = [(MLP + name, lambda x, hook: x) for name in POINTS]
    assert torch.equal(triton.run_with_hooks(tokens, fwd_hooks=same), clean)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [FEW, TOKENS])
def test_reading_any_point_alone_changes_no_bit(tokens: Tensor) -> None:
    triton = model("triton", torch.bfloat16)
    clean = triton(tokens)
    for name in POINTS:
        assert torch.equal(triton.run_with_hooks(tokens, fwd_hooks=[(MLP + name, lambda x, hook: x)]), clean), name


def edited(x: Tensor, hook: HookPoint) -> Tensor:
    if x.dtype == torch.int64:
        return (x + 1) % 8
    return x * 0.3 + 0.1 * torch.arange(x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("tokens", [FEW, pytest.param(TOKENS, marks=pytest.mark.slow)])
def test_editing_does_what_it_does_in_the_sorted_model(tokens: Tensor) -> None:
    triton, plain = model("triton"), model("sorted")
    clean = plain(tokens)
    for name in POINTS:
        if name == "expert_load":
            with pytest.raises(HookError, match="read-only"):
                triton.run_with_hooks(tokens, fwd_hooks=[(MLP + name, lambda x, hook: x * 0)])
            continue
        got = triton.run_with_hooks(tokens, fwd_hooks=[(MLP + name, edited)])
        assert torch.allclose(got, plain.run_with_hooks(tokens, fwd_hooks=[(MLP + name, edited)]), atol=1e-4), name
        assert (got - clean).abs().max() > 1e-3, f"editing {name} does nothing"


def test_forcing_experts_that_do_not_exist_is_refused() -> None:
    with pytest.raises(HookError, match="expected ids from 0 to 7, got 9 to 9"):
        model("triton").run_with_hooks(FEW, fwd_hooks=[(MLP + "expert_ids", lambda ids, hook: ids * 0 + 9)])


def test_gradients_are_refused_by_name() -> None:
    triton = model("triton")
    with pytest.raises(HookError, match=r"got 'triton'\. Use moe_impl='grouped_mm' or 'sorted'"):
        triton(FEW).sum().backward()
    with pytest.raises(HookError, match=r"backward hook at blocks\.0\.mlp\.hook_expert_out: .*'sorted'"):
        triton.run_with_hooks(FEW, bwd_hooks=[(MLP + "expert_out", lambda grad, hook: None)])
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(HookError, match=r"expected a tensor without a gradient.*'sorted'"):
        triton.run_with_hooks(FEW, fwd_hooks=[(MLP + "expert_out", lambda x, hook: x * scale)])
    last = triton.run_with_hooks(FEW, bwd_hooks=[("ln_final.hook_normalized", lambda grad, hook: None)])
    assert last.requires_grad, "a gradient that needs no expert still flows"
    torch.autograd.grad(last.sum(), triton.unembed.weight)


def test_the_load_is_the_one_that_the_kernels_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding nothing is counted a second time."""
    monkeypatch.delattr("workbench.models.moe.count_slots")
    for tokens in (FEW, TOKENS):
        _, cache = model("triton").run_with_cache(tokens, names_filter=[MLP + "expert_load", MLP + "expert_ids"])
        counts = torch.bincount(cache[MLP + "expert_ids"].flatten(), minlength=8)
        assert torch.allclose(cache[MLP + "expert_load"], counts / counts.sum())


@pytest.mark.slow
@torch.no_grad()
def test_under_a_pinned_path_a_token_has_the_same_bits_alone_and_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16: numpy's float32 product, which the interpreter takes, adds in an order that depends on the row."""
    ran: set[str] = set()
    experts = stages.experts
    monkeypatch.setattr(stages, "experts", lambda layer, *rest: (ran.add(layer.path), experts(layer, *rest))[1])
    triton = model("triton", torch.bfloat16)
    layer, x = triton.blocks[0].mlp, torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5)).bfloat16()

    def alone_and_in_company() -> tuple[Tensor, Tensor]:
        ran.clear()
        rows = [layer(x[b : b + 1, pos : pos + 1], None)[0, 0] for b in range(2) for pos in range(7)]
        return torch.stack(rows).view_as(x), layer(x, None)

    for path in PATHS:
        triton.moe_path = path
        alone, together = alone_and_in_company()
        assert ran == {path}
        assert torch.equal(alone, together), path
    triton.moe_path = "auto"
    alone_and_in_company()
    assert ran == {"decode", "skinny"}


def test_the_path_is_checked_and_told() -> None:
    triton, plain = model("triton"), model("sorted")
    assert (triton.moe_path, plain.moe_path) == ("auto", "auto")
    triton.moe_path = "skinny"
    assert describe_model(triton)["runs"]["moe_path"] == triton.moe_path == "skinny"
    for wrong in ("fast", None):
        with pytest.raises(ConfigError, match=r"moe_path: expected one of auto, decode, skinny, tile, got .*Name one"):
            triton.moe_path = wrong
    assert triton.moe_path == triton.blocks[0].mlp.path == "skinny"
    with pytest.raises(ConfigError, match=r"moe_path: expected auto with moe_impl 'sorted', got 'tile'\. Paths are"):
        plain.moe_path = "tile"
    dense = build_model(LLAMA, device="meta")
    assert dense.moe_path is None
    with pytest.raises(ConfigError, match=r"moe_path: expected a mixture of experts, got 'llama'"):
        dense.moe_path = "tile"


def test_generation() -> None:
    got, expected = (generate(model(impl), FEW, max_new_tokens=4, temperature=0.0) for impl in ("triton", "sorted"))
    assert torch.equal(got.tokens, expected.tokens)
