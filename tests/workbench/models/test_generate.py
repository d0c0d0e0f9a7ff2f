from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.hooks import HookPoint
from workbench.models import Llama, Qwen3Moe


def greedy_without_cache(model: Llama, row: Tensor, n: int) -> list[int]:
    ids = row.tolist()
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(row) :]


def test_greedy_equals_running_the_whole_sequence_each_time(model: Llama, tokens: Tensor) -> None:
    out = model.generate(tokens, max_new_tokens=12, stop_ids=())
    assert torch.equal(out.tokens[:, :7], tokens)
    assert out.continuations() == [greedy_without_cache(model, row, 12) for row in tokens]


def test_left_padded_rows_equal_themselves_alone(model: Llama, tokens: Tensor) -> None:
    prompts = [tokens[0], tokens[1, :4]]
    batch = torch.stack([prompts[0], torch.cat([torch.full((3,), 4), prompts[1]])])
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    out = model.generate(batch, mask, max_new_tokens=9, stop_ids=())
    assert out.continuations() == [greedy_without_cache(model, row, 9) for row in prompts]


def test_a_stop_id_ends_its_row_and_only_that(llama: Llama, tokens: Tensor) -> None:
    free = llama.generate(tokens, max_new_tokens=10, stop_ids=()).continuations()
    stop = free[0][2]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    out = llama.generate(tokens, max_new_tokens=10, stop_ids=(stop,), pad_id=4)
    assert out.continuations() == expected
    assert (out.tokens[~out.attention_mask.bool()] == 4).all()
    llama.stop_ids = (stop,)
    assert llama.generate(tokens, max_new_tokens=10).continuations() == expected


def test_sampling_repeats_under_a_seed_and_follows_the_distribution(llama: Llama, tokens: Tensor) -> None:
    draws = [llama.generate(tokens, max_new_tokens=8, temperature=1.0, seed=s, stop_ids=()).tokens for s in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    many = tokens[:1].expand(4000, -1)
    first = llama.generate(many, max_new_tokens=1, temperature=1.5, seed=0, stop_ids=()).tokens[:, -1]
    expected = (llama(tokens[:1])[0, -1] / 1.5).softmax(-1)
    seen = torch.bincount(first, minlength=60) / 4000
    assert (seen - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_hooks_act_at_every_step(llama: Llama, tokens: Tensor) -> None:
    widths: list[int] = []

    def silence(x: Tensor, hook: HookPoint) -> Tensor:
        widths.append(x.shape[1])
        return x * 0

    with llama.hooks([("blocks.1.hook_mlp_out", silence)]):
        edited = llama.generate(tokens, max_new_tokens=4, stop_ids=())
        assert edited.continuations() == [greedy_without_cache(llama, row, 4) for row in tokens]
    assert widths[:4] == [7, 1, 1, 1]


def test_rows_that_have_stopped_count_as_padding(moe: Qwen3Moe, tokens: Tensor) -> None:
    free = moe.generate(tokens, max_new_tokens=6, stop_ids=()).continuations()
    loads: list[Tensor] = []
    with moe.hooks([("blocks.0.mlp.hook_expert_load", lambda x, hook: loads.append(x))]):
        out = moe.generate(tokens, max_new_tokens=6, stop_ids=(free[0][0],))
    assert len(out.continuations()[0]) == 1
    assert out.continuations()[1] == free[1]
    assert (loads[-1] > 0).sum() == 3, "one running token takes three experts"


@pytest.mark.parametrize("tokens", [torch.tensor([1, 2]), torch.ones(1, 0).long()])
def test_prompts_that_are_none_are_named(llama: Llama, tokens: Tensor) -> None:
    with pytest.raises(ShapeError, match="tokens: expected integers"):
        llama.generate(tokens)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or a positive number, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or a positive number, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, a whole number, got 0"),
        ({"max_new_tokens": 58}, "max_new_tokens: expected at most 57 after a prompt of 7"),
        (
            {"max_new_tokens": 5, "attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]])},
            "attention_mask: expected padding on the left",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_named(llama: Llama, tokens: Tensor, kwargs: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        llama.generate(tokens, **{"max_new_tokens": 5, **kwargs})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": "hot"}, "temperature: expected 0 or a positive number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected at least 1, a whole number"),
        ({"seed": "a"}, "seed: expected a whole number"),
        ({"seed": 2**70}, "seed: expected a whole number"),
        ({"stop_ids": 2}, "stop_ids: expected a list of token ids"),
        ({"stop_ids": [2.7]}, "stop_ids: expected ids from 0"),
        ({"stop_ids": ["<|end|>"]}, "stop_ids: expected ids from 0"),
        ({"pad_id": -1}, "pad_id: expected ids from 0"),
        ({"pad_id": 99_999}, "pad_id: expected ids from 0"),
    ],
)
def test_arguments_of_another_kind_are_refused(
    model: Llama, tokens: torch.Tensor, arguments: dict, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        model.generate(tokens, **{"max_new_tokens": 2, **arguments})


def test_a_temperature_next_to_nothing_is_greedy(model: Llama, tokens: torch.Tensor) -> None:
    cold = model.generate(tokens, max_new_tokens=5, temperature=1e-40, seed=0)
    assert torch.equal(cold.tokens, model.generate(tokens, max_new_tokens=5).tokens)
