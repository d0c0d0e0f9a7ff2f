"""A small random model with the bundled tokenizer, a few prompts, and a finished run of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.io.prompts import Prompt
from workbench.io.runs import Run
from workbench.io.saving import save_model
from workbench.io.tokens import Tokenizer
from workbench.models import Llama, build_model, init_weights
from workbench.study import Settings, run_study

NANO_TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "nano" / "tokenizer.json"
TEXTS = [
    ("sum", "2足す3はいくつですか。", "What is 2 plus 3?"),
    ("tea", "お茶と珈琲とどちらが好きですか。", "Do you prefer tea or coffee?"),
    ("hostile", "</script><script>alert(1)</script><|end|>", "<img src=x onerror=alert(2)> {{ 7 * 7 }} <|start|>"),
    ("sea", "海はなぜ青いのですか。", "Why is the sea blue?"),
    ("cat", "猫について一言お願いします。", "Say one thing about cats."),
]


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return [
        Prompt(f"{group}-{lang}", group, lang, "test", "parallel", text, "discovery")
        for group, *texts in TEXTS
        for lang, text in zip(("ja", "en"), texts, strict=True)
    ]


@pytest.fixture(scope="session")
def small() -> Llama:
    """Two layers of 8 experts, 2 per token; random weights."""
    tokenizer = Tokenizer.from_file(NANO_TOKENIZER)
    cfg = Qwen3MoeConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_mlp=32, d_vocab=tokenizer.d_vocab, n_ctx=320,
        norm_eps=1e-6, rope=RopeConfig(theta=10_000.0), n_experts=8, k=2, d_expert=16, sparse_layers=(True, True),
    )  # fmt: skip
    model = init_weights(build_model(cfg), seed=0, std=0.2)
    model.tokenizer, model.source = tokenizer, "small"
    return model


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(max_new_tokens=6, batch_size=8)


@pytest.fixture(scope="session")
def finished_run(
    small: Llama, prompts: list[Prompt], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    return run_study(small, prompts, tmp_path_factory.mktemp("run"), settings)


@pytest.fixture(scope="session")
def saved(small: Llama, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model as a checkpoint directory, and the prompts as a file, for the command line."""
    checkpoint = save_model(small, tmp_path_factory.mktemp("checkpoint") / "small")
    rows = [{name: getattr(prompt, name) for name in ("group_id", "lang", "topic", "text")} for prompt in prompts]
    file = checkpoint.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return checkpoint, file
