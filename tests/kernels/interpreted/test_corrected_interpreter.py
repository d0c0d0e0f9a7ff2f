"""The interpreter computes what the hardware computes: bfloat16 products, arithmetic, casts, loop bounds."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from workbench_kernels import interpreter

interpreter.correct()


@triton.jit
def product_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    cell = i[:, None] * N + i[None, :]
    acc = tl.zeros((N, N), tl.float32)
    tl.store(out + cell, tl.dot(tl.load(a + cell), tl.load(b + cell), acc, input_precision="ieee"))


@triton.jit
def cast_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def arithmetic_kernel(a, b, total, larger, N: tl.constexpr):
    i = tl.arange(0, N)
    left, right = tl.load(a + i), tl.load(b + i)
    tl.store(total + i, left * right + left)
    tl.store(larger + i, (left > right).to(tl.int8))


@triton.jit
def count_kernel(bound, out):
    total = 0
    for i in range(tl.load(bound)):
        total += i
    tl.store(out, total)


def rows(n: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype: torch.dtype) -> None:
    a, b, out = rows(256, 0, dtype), rows(256, 1, dtype), torch.zeros(16, 16)
    product_kernel[(1,)](a, b, out, N=16)
    assert torch.allclose(out, a.view(16, 16).float() @ b.view(16, 16).float(), atol=1e-5)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64, torch.int8, torch.bfloat16])
def test_casts_to_bfloat16_round_to_nearest_even(source: torch.dtype) -> None:
    x = (rows(4096, 2, torch.float32) * 20).to(source)
    out = torch.zeros(4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, N=4096)
    assert torch.equal(out, x.float().to(torch.bfloat16))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int8])
def test_casts_from_bfloat16(target: torch.dtype) -> None:
    x = (rows(4096, 3, torch.float32) * 20).to(torch.bfloat16)
    out = torch.zeros(4096, dtype=target)
    cast_kernel[(1,)](x, out, N=4096)
    assert torch.equal(out, x.to(target))


def test_nan_and_infinity_survive_a_cast() -> None:
    x, out = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38]), torch.zeros(4, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, N=4)
    assert torch.equal(out[1:], x[1:].to(torch.bfloat16))
    assert out[0].isnan()


def test_arithmetic() -> None:
    a, b = rows(512, 4, torch.bfloat16), rows(512, 5, torch.bfloat16)
    total, larger = torch.zeros(512, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.int8)
    arithmetic_kernel[(1,)](a, b, total, larger, N=512)
    assert torch.equal(total, a * b + a)
    assert torch.equal(larger.bool(), a > b)


def test_loops_up_to_a_loaded_number() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    count_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.item() == 10
