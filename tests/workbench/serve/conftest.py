"""Small random models with the bundled tokenizer, and engines and schedulers over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.config import LlamaConfig, Qwen3MoeConfig, RopeConfig
from workbench.io.tokens import Tokenizer
from workbench.models import Llama, build_model, init_weights
from workbench.serve import Engine, Limits, Scheduler

NANO = Path(__file__).resolve().parents[3] / "data" / "nano"
SHAPE = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 8,
    "d_mlp": 48,
    "n_ctx": 320,
    "norm_eps": 1e-6,
    "rope": RopeConfig(theta=10_000.0),
}
LIMITS = Limits(rows=4, running=6, queue=64, prefill_chunk=16, cache_positions=2048)
FREE = 1 << 30


def tiny(kind: str) -> Llama:
    tokenizer = Tokenizer.from_file(NANO / "tokenizer.json")
    shape = {**SHAPE, "d_vocab": tokenizer.d_vocab}
    cfg = LlamaConfig(**shape) if kind == "llama" else Qwen3MoeConfig(
        **shape, n_experts=8, k=2, d_expert=16, sparse_layers=(True, True)
    )  # fmt: skip
    model = init_weights(build_model(cfg), seed=0, std=0.2)
    model.tokenizer, model.source = tokenizer, f"tiny-{kind}"
    model.chat_template = (NANO / "nano-moe-thinking" / "chat_template.jinja").read_text(encoding="utf-8")
    return model


@pytest.fixture(scope="session")
def tiny_moe() -> Llama:
    return tiny("moe")


@pytest.fixture(scope="session")
def tiny_llama() -> Llama:
    return tiny("llama")


@pytest.fixture(params=["llama", "moe"])
def served(request: pytest.FixtureRequest) -> Llama:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def scheduler(served: Llama) -> Iterator[Scheduler]:
    running = Scheduler(Engine(served, LIMITS, FREE))
    running.start()
    yield running
    running.stop(0)
