"""transformers' Qwen3-MoE on the Triton kernels: logits against its own implementations, on the same experts."""

from __future__ import annotations

import pytest
import torch

from tests.hf_moe import forced, model
from workbench_kernels.hf import register_with_transformers

pytest.importorskip("transformers", minversion="5.0")


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_those_of_transformers(theirs: str, dtype: torch.dtype) -> None:
    register_with_transformers()
    built, record = model(dtype, k=4), {}
    expected = forced(built, theirs, record).float()
    got = forced(built, "workbench_triton", record).float()
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # eager and grouped_mm differ by as much from each other
    assert float((got - expected).norm() / expected.norm()) < bound
