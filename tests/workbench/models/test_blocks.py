"""The parts of a block: experts filled up to equal numbers of rows, caches of different lengths, and penalties."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import ShapeError
from workbench.models import Llama
from workbench.models.cache import CacheRows
from workbench.models.sampling import Sampler, Sampling
from workbench_kernels.experts import routed_experts


def layer(seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    x, gate_up, down = (torch.randn(*shape, generator=draw) for shape in ((6, 16), (5, 24, 16), (5, 16, 12)))
    ids = torch.stack([torch.randperm(5, generator=draw)[:2] for _ in range(6)])
    return x, ids, torch.rand(6, 2, generator=draw), gate_up, down


@pytest.mark.parametrize("impl", ["sorted", "reference"])
@pytest.mark.parametrize("n_rows", [1, 2, 6])
def test_filled_experts_give_what_others_give(impl: str, n_rows: int) -> None:
    arguments = layer(0)
    want = routed_experts(*arguments, impl="reference")
    found = routed_experts(*arguments, impl=impl, rows_per_expert=n_rows)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_taps_see_slots_whatever_was_filled() -> None:
    arguments = layer(1)
    seen: dict[str, torch.Tensor] = {}

    def tap(slots: torch.Tensor) -> torch.Tensor:
        seen["slots"] = slots
        return slots * 2

    found = routed_experts(*arguments, taps={"expert_out": tap, "expert_pre": lambda x: x}, rows_per_expert=6)
    want = routed_experts(*arguments, taps={"expert_out": lambda x: x * 2})
    assert seen["slots"].shape == (6, 2, 16)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_a_token_of_a_filled_layer_keeps_its_bits_whatever_the_others_choose() -> None:
    x, ids, weights, gate_up, down = layer(2)
    want = routed_experts(x, ids, weights, gate_up, down, rows_per_expert=6)[0]
    for seed in range(5):
        other = layer(seed + 10)
        ids_now = torch.cat([ids[:1], other[1][1:]])
        x_now, weights_now = torch.cat([x[:1], other[0][1:]]), torch.cat([weights[:1], other[2][1:]])
        found = routed_experts(x_now, ids_now, weights_now, gate_up, down, rows_per_expert=6)
        assert torch.equal(found[0], want)


def test_rows_of_caches_take_one_position_each(model: Llama) -> None:
    with pytest.raises(ShapeError, match="one position of 2 rows"):
        CacheRows([None, None]).admit(2, 3, None)
    full = model.new_cache(1, 2)
    full.n_seen = 2
    with torch.no_grad(), pytest.raises(ShapeError, match="at most 2 positions"):
        model(torch.tensor([[5], [6]]), cache=CacheRows([full, None]))


def test_penalties_count_what_was_written_and_not_the_prompt() -> None:
    sampler = Sampler(Sampling(frequency_penalty=1.0, presence_penalty=0.5, logit_bias=((4, 9.0),)), 1)
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    sampler.see(torch.tensor([[0, 0, 1]]), everywhere, 5, written=False)
    assert sampler.choose(torch.tensor([[9.9, 1.0, 0.0, 0.0, 0.0]])) == 0
    sampler.see(torch.tensor([[0, 0, 1]]), everywhere, 5)
    # 9.9 - 2 - 0.5 = 7.4 is less than 0 + 9, and 9 than 10.6 - 1 - 0.5
    assert sampler.choose(torch.tensor([[9.9, 1.0, 0.0, 0.0, 0.0]])) == 4
    assert sampler.choose(torch.tensor([[9.9, 10.6, 0.0, 0.0, 0.0]])) == 1
    with pytest.raises(ShapeError, match="frequency_penalty"):
        Sampling(frequency_penalty=float("nan"))
