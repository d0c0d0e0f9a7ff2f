from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.experiments.metrics import (
    TokenMetric,
    kl,
    log_probability,
    logit_difference,
    metric_name,
    probability,
    recovered,
    score_rows,
)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))


def test_each_row_is_read_at_its_own_tokens(logits: Tensor) -> None:
    difference = logit_difference([1, 2, 3], [4, 5, 6])(logits)
    assert difference.tolist() == pytest.approx([float(logits[i, -1, 1 + i] - logits[i, -1, 4 + i]) for i in range(3)])
    assert torch.equal(logit_difference(1, 2, pos=0)(logits), logits[:, 0, 1] - logits[:, 0, 2])
    assert torch.allclose(probability([1, 2, 3])(logits), logits[:, -1].softmax(-1)[range(3), [1, 2, 3]])
    assert torch.allclose(log_probability(2)(logits).exp(), probability(2)(logits))


def test_kl_is_zero_to_itself_and_positive_to_others(logits: Tensor) -> None:
    assert torch.allclose(kl(logits)(logits), torch.zeros(3), atol=1e-6)
    shifted = logits + 3.0
    assert torch.allclose(kl(logits)(shifted), torch.zeros(3), atol=1e-5), "a constant changes no probability"
    other = logits.flip(-1)
    expected = (logits[:, -1].softmax(-1) * (logits[:, -1].log_softmax(-1) - other[:, -1].log_softmax(-1))).sum(-1)
    assert torch.allclose(kl(logits)(other), expected)
    assert torch.equal(kl(logits[:, -1])(other), kl(logits)(other))


def test_recovered_is_zero_at_the_base_and_one_at_the_target() -> None:
    value = torch.tensor([1.0, 3.0, 2.0, 5.0])
    found = recovered(value, torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([3.0, 3.0, 3.0, 5.0]))
    assert found[:3].tolist() == [0.0, 1.0, 0.5]
    assert found[3].isnan(), "nothing to recover"


def test_metrics_that_do_not_fit_are_named(logits: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"one per row \[3\], got \(2,\)"):
        logit_difference([1, 2], 3)(logits)
    with pytest.raises(ShapeError, match="integers from 0 to 6, got 7"):
        probability(7)(logits)
    with pytest.raises(ShapeError, match=r"kl: expected logits \(3, 7\)"):
        kl(logits)(logits[:2])
    with pytest.raises(ShapeError, match=r"metric: expected one number per row \[3\], got \(\)"):
        score_rows(lambda x: x.mean(), logits)
    assert metric_name(kl(logits)) == "kl"


@pytest.mark.parametrize("metric", [log_probability(2), probability(2), logit_difference(2, 3)])
def test_half_precision_logits_are_scored_in_float32(logits: Tensor, metric: TokenMetric) -> None:
    half = logits.bfloat16()
    assert metric(half).dtype == torch.float32
    assert torch.equal(metric(half), metric(half.float()))
