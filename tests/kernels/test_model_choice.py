"""What "auto" becomes in a model, where a device's decision cannot be had here: by a device in name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import workbench.models
from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.errors import ConfigError
from workbench.models import build_model, init_weights
from workbench_kernels import choose_implementation

CUDA = torch.device("cuda")


def config(d_model: int, d_expert: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        d_model=d_model, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_vocab=32, n_ctx=32, norm_eps=1e-6,
        rope=RopeConfig(theta=1e4), n_experts=4, k=2, d_expert=d_expert, d_mlp=8, sparse_layers=(True,),
    )  # fmt: skip


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide as for a GPU, build on this machine."""
    decide: Callable[..., str] = choose_implementation

    def decided(impl: str, device: torch.device, dtype: torch.dtype, **how: object) -> str:
        return decide(impl, CUDA, dtype, **how)

    monkeypatch.setattr(workbench.models, "choose_implementation", decided)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("widths", "dtype", "expected"),
    [
        ((16, 8), torch.bfloat16, "grouped_mm"),
        ((16, 12), torch.bfloat16, "sorted"),  # rows of 24 bytes, which torch's grouped_mm cannot multiply
        ((18, 8), torch.bfloat16, "sorted"),
        ((16, 8), torch.float32, "sorted"),
    ],
)
def test_auto_on_a_gpu_is_what_can_run_these_widths_and_the_model_says_which(
    widths: tuple[int, int], dtype: torch.dtype, expected: str
) -> None:
    model = init_weights(build_model(config(*widths), dtype), seed=0)
    assert model.moe_impl == expected
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()  # it runs, by what the model says


@pytest.mark.usefixtures("on_cuda")
def test_an_explicit_choice_stays_and_says_why_it_cannot_run() -> None:
    model = init_weights(build_model(config(16, 12), torch.bfloat16, moe_impl="grouped_mm"), seed=0)
    assert model.moe_impl == "grouped_mm"
    with pytest.raises(
        ValueError, match=r"expected rows of a multiple of 16 bytes for 'grouped_mm'.*moe_impl='sorted'"
    ):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ConfigError, match="expected one of auto"):
        build_model(config(16, 12), moe_impl="fast")
