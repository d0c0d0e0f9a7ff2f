"""transformers' Qwen3-MoE on our experts: logits against its own implementations, each named, on the same experts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.hf_moe import forced, model
from workbench_kernels import IMPLEMENTATIONS
from workbench_kernels.hf import register_with_transformers

pytest.importorskip("transformers", minversion="5.0")


@pytest.mark.parametrize("theirs", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_those_of_transformers(theirs: str, dtype: torch.dtype) -> None:
    names = register_with_transformers()
    built, record = model(dtype, k=4), {}
    expected = forced(built, theirs, record).float()
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # eager and grouped_mm differ by as much from each other
    for name in names:
        if name != "workbench_triton":
            got = forced(built, name, record).float()
            assert float((got - expected).norm() / expected.norm()) < bound, name


def test_grouped_mm_is_transformers_grouped_mm_bit_for_bit() -> None:
    register_with_transformers()
    for dtype in (torch.float32, torch.bfloat16):
        built, record = model(dtype, k=4), {}
        expected = forced(built, "grouped_mm", record)
        assert torch.equal(forced(built, "workbench_grouped_mm", record), expected)


def test_every_implementation_has_a_name_and_triton_says_where_it_runs() -> None:
    names = register_with_transformers()
    assert names == tuple(f"workbench_{impl}" for impl in (*IMPLEMENTATIONS, "triton"))
    with pytest.raises(ValueError, match="expected one that runs here"):
        forced(model(torch.float32), "workbench_triton", {})


def test_other_experts_are_refused() -> None:
    register_with_transformers()
    built = model(torch.float32)
    for layer in built.model.layers:
        layer.mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(
        ValueError, match="Qwen3MoeExperts: expected SwiGLU experts as in Qwen3-MoE, got another act_fn"
    ):
        forced(built, "workbench_sorted", {})


@pytest.mark.parametrize(
    ("name", "other"),
    [("_apply_gate", lambda gate_up: gate_up), ("is_concatenated", False), ("act_fn", None), ("has_bias", True)],
)
def test_experts_that_differ_in_one_trait_are_refused(name: str, other: object) -> None:
    """DeepSeek-V4 clamps gate and up in a method of its own, beside silu and all traits as here."""
    register_with_transformers()
    experts = model(torch.float32).model.layers[0].mlp.experts
    experts.config._experts_implementation = "workbench_sorted"
    given = torch.ones(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    assert experts(*given).isfinite().all()
    delattr(experts, name) if other is None else setattr(experts, name, other)
    with pytest.raises(ValueError, match=f"Qwen3MoeExperts: expected SwiGLU experts .* got another {name}"):
        experts(*given)


def test_importing_the_kernels_imports_no_transformers() -> None:
    code = "import sys, workbench_kernels, workbench_kernels.hf; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
