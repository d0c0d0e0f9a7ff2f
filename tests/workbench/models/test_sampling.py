from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.models.sampling import Sampler, Sampling, probabilities, row_seeds


def logits(batch: int = 3, d_vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(batch, d_vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 12, "top_p": 0.8},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 1e-9},
        {"temperature": 0.3, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.7, "top_p": 0.5},
    ],
)
def test_what_is_sampled_from_equals_transformers(values: dict) -> None:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    sampling = Sampling(**{"temperature": 1.0, **values})
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    theirs = warpers(torch.zeros(3, 1, dtype=torch.long), logits().double()).softmax(-1)
    torch.testing.assert_close(probabilities(logits(), sampling), theirs, rtol=1e-9, atol=1e-12)


def test_the_repetition_penalty_equals_transformers_and_leaves_padding_out() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    written = torch.tensor([[3, 7, 7, 9], [1, 2, 3, 4], [5, 5, 5, 5]])
    sampler = Sampler(Sampling(repetition_penalty=4.0), 3)
    valid = torch.ones_like(written, dtype=torch.bool)
    sampler.see(written, valid, 50)
    theirs = RepetitionPenaltyLogitsProcessor(4.0)(written, logits())
    assert torch.equal(sampler.choose(logits()), theirs.argmax(-1))
    padded = Sampler(Sampling(repetition_penalty=4.0), 3)
    top = logits().argmax(-1)
    padded.see(top[:, None], torch.zeros(3, 1, dtype=torch.bool), 50)
    assert torch.equal(padded.choose(logits()), top), "padding is no repetition"
    padded.see(top[:, None], torch.ones(3, 1, dtype=torch.bool), 50)
    assert not torch.equal(padded.choose(logits()), top)


def test_sampling_follows_the_distribution() -> None:
    sampling = Sampling(temperature=1.3, top_k=8, top_p=0.9, seed=3)
    one = logits(1)
    chosen = Sampler(sampling, 20_000).choose(one.expand(20_000, -1))
    seen = torch.bincount(chosen, minlength=50) / 20_000
    expected = probabilities(one, sampling)[0]
    assert (seen - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5
    assert not seen[expected == 0].any(), "nothing that was left out is drawn"


def test_a_row_draws_the_same_whatever_shares_its_batch() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=7), 3)
    together = torch.stack([sampler.choose(logits(seed=step)) for step in range(20)])
    for row, seed in enumerate(row_seeds(7, 3)):
        alone = Sampler(Sampling(temperature=1.0, seed=[seed]), 1)
        drawn = [int(alone.choose(logits(seed=step)[row : row + 1])) for step in range(20)]
        assert drawn == together[:, row].tolist()
    assert len({seed for start in range(50) for seed in row_seeds(start, 20)}) == 1000, "neighbours share no row"


def test_the_largest_draw_takes_a_token_that_can_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_k=2), 1)
    monkeypatch.setattr("random.Random.random", lambda self: 1 - 2**-53)
    row = torch.tensor([[5.0, 4.0, 0.0, -1.0]])
    assert int(sampler.choose(row)) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": True}, "temperature: expected 0 or a positive number"),
        ({"top_p": 0}, "top_p: expected a number above 0, at most 1, got 0"),
        ({"top_p": 1.1}, "top_p: expected"),
        ({"top_k": -1}, "top_k: expected a whole number from 0, got -1"),
        ({"top_k": 2.0}, "top_k: expected"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a positive number"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty: expected a positive number from 0.01 to 100"),
        ({"logit_bias": ((50, 1e39),)}, "logit_bias: expected ids with numbers within ±100"),
        ({"temperature": 10**400}, "temperature: expected 0 or a positive number"),
        ({"frequency_penalty": 101}, "frequency_penalty: expected a number within ±100"),
        ({"repetition_penalty": "much"}, "repetition_penalty: expected a positive number"),
    ],
)
def test_values_out_of_range_are_named(values: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Sampling(**values)


def test_one_seed_for_each_row_is_counted() -> None:
    with pytest.raises(ShapeError, match="seed: expected a whole number or one for each of 3 rows"):
        Sampler(Sampling(seed=[1, 2]), 3)
