"""The linear map, whose short form for a step of a small batch must be the same map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.models.layers import Linear


def linear(d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> Linear:
    made = Linear(d_in, d_out)
    nn.init.normal_(made.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    return made.to(dtype)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_a_step_of_a_small_batch_is_the_same_map(batch: int) -> None:
    made, x = linear(128, 512), drawn(batch, 1, 128)
    out = made(x).detach()
    assert out.is_contiguous()
    assert out.shape == (batch, 1, 512)
    assert float((out.double() - x.double() @ made.weight.detach().double().T).abs().max()) < 1e-5
    assert torch.equal(out, F.linear(x, made.weight)) or batch in (2, 3, 4)


@pytest.mark.parametrize(
    ("shape", "d_out", "dtype"),
    [
        ((3, 2, 128), 512, torch.float32),
        ((3, 1, 128), 64, torch.float32),
        ((3, 1, 128), 512, torch.bfloat16),
        ((128,), 512, torch.float32),
        ((3, 128), 512, torch.float32),
        ((3, 1, 2, 128), 512, torch.float32),
    ],
)
def test_anything_else_is_torchs_own(shape: tuple[int, ...], d_out: int, dtype: torch.dtype) -> None:
    made, x = linear(shape[-1], d_out, dtype), drawn(*shape).to(dtype)
    assert torch.equal(made(x), F.linear(x, made.weight))


def test_gradients_pass_through_the_short_form() -> None:
    made, x = linear(128, 512), drawn(3, 1, 128)
    short = x.clone().requires_grad_()
    plain = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(made(short).square().sum(), short)
    (expected,) = torch.autograd.grad(F.linear(plain, made.weight).square().sum(), plain)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
