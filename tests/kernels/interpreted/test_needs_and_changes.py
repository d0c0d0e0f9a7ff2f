"""Whatever is asked for and whatever is changed, in any combination, on every path: the oracle's numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_problems import Problem, check, problem, relative

from workbench_kernels import Intervene, Need, fused_moe
from workbench_kernels.moe.plan import NEEDS, PATHS, ROUTED

FIELDS = (
    "router_bias", "keep_mask", "expert_scale", "expert_add", "forced_ids", "forced_weights", "replace_experts",
)  # fmt: skip


def change(p: Problem, fields: list[str], per_token: bool, seed: int) -> Intervene:
    """An intervention that sets `fields`, with random values that keep at least k experts."""
    g = torch.Generator().manual_seed(seed)
    t, e, k, d = p.sizes
    rows = (t, e) if per_token else (e,)
    spared = torch.rand(rows, generator=g).argsort(-1) < k  # these stay whatever the mask says
    values = {
        "router_bias": torch.randn(rows, generator=g),
        "keep_mask": spared | (torch.rand(rows, generator=g) < 0.4),
        "expert_scale": torch.randn(e, generator=g) * (torch.rand(e, generator=g) < 0.6),
        "expert_add": torch.randn(e, d, generator=g),
        "forced_ids": torch.rand(t, e, generator=g).argsort(-1)[:, :k],
        "forced_weights": torch.rand(t, k, generator=g),
        "replace_experts": torch.rand(e, generator=g) < 0.5,
        "replace_rows": torch.randn(t, k, d, generator=g).to(p.x.dtype),
    }
    chosen = [*fields, "replace_rows"] if "replace_experts" in fields else fields
    return Intervene(**{name: values[name] for name in chosen})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", FIELDS)
def test_each_intervention(path: str, field: str) -> None:
    p = problem(6, 37, 19, 6, 2)
    y, _ = check(p, path, need=("expert_out", "router_probs", "margin"), change=change(p, [field], False, seed=1))
    clean, _ = fused_moe(*p.args, impl="sorted")
    assert relative(y, clean) > 1e-2, "the intervention did nothing"


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_combinations(path: str, data: st.DataObject) -> None:
    combination(path, data)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_combinations(path: str, data: st.DataObject) -> None:
    combination(path, data)


def combination(path: str, data: st.DataObject) -> None:
    t, bits = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([16, 8, 4]))
    d, f = (64, 64) if bits == 4 else (24, 12)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    p = problem(t, d, f, 6, data.draw(st.integers(1, 3)), dtype, bits, seed=data.draw(st.integers(0, 9)))
    fields = data.draw(st.lists(st.sampled_from(FIELDS), unique=True))
    intervene = change(p, fields, data.draw(st.booleans()), seed=data.draw(st.integers(0, 9)))
    names = data.draw(st.lists(st.sampled_from(NEEDS), unique=True))
    experts = data.draw(st.none() | st.lists(st.integers(0, 5), max_size=4))
    tokens = data.draw(st.none() | st.lists(st.integers(0, max(t - 1, 0)), max_size=2 * bool(t)))
    numerics, normalised = data.draw(st.sampled_from(["trained", "hf"])), data.draw(st.booleans())
    check(p, path, Need(tuple(names), experts, tokens), intervene, numerics, normalised)


@pytest.mark.parametrize("path", PATHS)
def test_a_selection_is_zero_elsewhere_and_changes_no_bit(path: str) -> None:
    p = problem(5, 24, 12, 6, 2, torch.bfloat16)
    plain, routing = check(p, path)
    experts, tokens = torch.arange(6) == int(routing.expert_ids[1, 0]), torch.tensor([True, True, False, True, False])
    y, some = check(p, path, Need(ROUTED, experts, tokens))
    _, everything = check(p, path, ROUTED)
    assert torch.equal(y, plain)
    shown = experts[some.expert_ids] & tokens[:, None]
    assert shown.any()
    for name in ROUTED:
        got, whole = getattr(some, name), getattr(everything, name)
        assert torch.equal(got[shown], whole[shown])
        assert (got[~shown] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_new_values_in_the_same_buffers_act(path: str) -> None:
    """A buffer that was written to between two calls is read again: nothing of its values was compiled in."""
    p = problem(4, 24, 12, 6, 2)
    intervene = change(p, list(FIELDS), False, seed=3)
    first, _ = check(p, path, change=intervene)
    other = change(p, list(FIELDS), False, seed=4)
    for name in intervene.active:
        getattr(intervene, name).copy_(getattr(other, name))
    second, _ = check(p, path, change=intervene)
    assert relative(second, first) > 1e-2


@pytest.mark.parametrize("path", PATHS)
def test_replacing_an_expert_with_its_own_rows_changes_no_bit(path: str) -> None:
    p = problem(5, 24, 12, 6, 2, torch.bfloat16)
    y, routing = check(p, path, ("expert_out",))
    again, _ = fused_moe(
        *p.args, impl="triton", path=path,
        intervene=Intervene(replace_experts=torch.arange(6) < 3, replace_rows=routing.expert_out),
    )  # fmt: skip
    assert torch.equal(again, y)


@pytest.mark.parametrize("path", PATHS)
def test_ablating_an_expert_that_overflows_leaves_nothing_of_it(path: str) -> None:
    p = problem(5, 24, 12, 6, 2)
    p.down[2] = torch.nan
    y, routing = fused_moe(*p.args, impl="triton", path=path, need=("expert_out",))
    hit = (routing.expert_ids == 2).any(-1)
    assert hit.any()
    assert torch.equal(y.isnan().any(-1), hit)
    scale = (torch.arange(6) != 2).float()
    ablated, after = fused_moe(*p.args, impl="triton", path=path, intervene=Intervene(expert_scale=scale))
    assert ablated.isfinite().all()
    assert torch.equal(after.expert_ids, routing.expert_ids), "a scale of 0 re-routes nothing"


def test_captured_logits_stay_clean_while_probabilities_show_the_bias() -> None:
    p = problem(5, 24, 12, 6, 2)
    bias = torch.tensor([50.0, 0, 0, 0, 0, 0])
    _, clean = fused_moe(*p.args, impl="triton", need=("router_probs",))
    _, biased = fused_moe(*p.args, impl="triton", need=("router_probs",), intervene=Intervene(router_bias=bias))
    assert torch.equal(clean.router_logits, biased.router_logits)
    assert (biased.expert_ids[:, 0] == 0).all()
    assert (biased.router_probs[:, 0] > 0.99).all()
    assert (clean.router_probs[:, 0] < 0.99).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_masked_expert_is_never_chosen_even_where_others_underflow(path: str) -> None:
    p = problem(6, 24, 12, 6, 2)
    p.x.mul_(300)  # all but one probability underflow to 0
    keep = torch.tensor([False, True, False, True, False, True])
    _, routing = fused_moe(*p.args, impl="triton", path=path, intervene=Intervene(keep_mask=keep))
    assert (routing.router_logits.max(-1).values - routing.router_logits.median(-1).values > 104).any()
    assert set(routing.expert_ids.unique().tolist()) <= {1, 3, 5}
    assert (routing.expert_ids[:, 0] != routing.expert_ids[:, 1]).all()
