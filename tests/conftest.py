"""What all tests share: small models of both architectures, and the released tokenizer when its files are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench.config import LlamaConfig, Qwen3MoeConfig, RopeConfig
from workbench.models import Llama, Qwen3Moe, build_model, init_weights

REPOSITORY = Path(__file__).resolve().parents[1]

_SMALL = {
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "d_head": 8,
    "d_mlp": 40,
    "d_vocab": 60,
    "n_ctx": 64,
    "norm_eps": 1e-6,
    "rope": RopeConfig(theta=10_000.0),
}
LLAMA = LlamaConfig(**_SMALL)
QWEN3_MOE = Qwen3MoeConfig(**_SMALL, n_experts=8, k=3, d_expert=12, sparse_layers=(True, False, True))


@pytest.fixture
def llama() -> Llama:
    """Three dense layers; weights large enough that every part matters."""
    return init_weights(build_model(LLAMA), seed=0, std=0.2)


@pytest.fixture
def moe() -> Qwen3Moe:
    """Sparse, dense, sparse; 8 experts, 3 per token."""
    model = init_weights(build_model(QWEN3_MOE), seed=1, std=0.2)
    assert isinstance(model, Qwen3Moe)
    return model


@pytest.fixture(params=["llama", "moe"])
def model(request: pytest.FixtureRequest) -> Llama:
    """Each architecture in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two sequences of seven tokens [batch pos]."""
    return torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def shared_tokenizer_dir() -> Path:
    """The folder with the released tokenizer and its goldens; tests that need it are skipped where it is absent."""
    folder = REPOSITORY.parent / "shared" / "tokenizer"
    if not folder.is_dir():
        pytest.skip("the released tokenizer's files are not beside the repository")
    return folder
