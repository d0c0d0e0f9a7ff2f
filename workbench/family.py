"""The LLM-jp-4 family by name: hub ids, configurations, parameter counts.

Sizes are those of the published training scripts (llm-jp/scripts); the sums equal the published parameter counts.
`rope_theta` 500,000 without scaling is established for the 8B and probable for the others: a real checkpoint brings its
own config.json, and that one is used.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from workbench.config import LlamaConfig, ModelConfig, Qwen3MoeConfig, RopeConfig
from workbench.errors import ConfigError

_SHARED = {
    "d_vocab": 196_608,
    "n_ctx": 65_536,
    "d_head": 128,
    "norm_eps": 1e-6,
    "rope": RopeConfig(theta=500_000.0),
    "bos_id": 1,
    "eos_ids": (2,),
    "pad_id": None,
}
_8B = LlamaConfig(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_mlp=14_336, **_SHARED)  # type: ignore[arg-type]
_33B = LlamaConfig(d_model=5120, n_layers=64, n_heads=40, n_kv_heads=8, d_mlp=27_648, **_SHARED)  # type: ignore[arg-type]
_32B_A3B = Qwen3MoeConfig(
    d_model=2560, n_layers=32, n_heads=40, n_kv_heads=4, d_mlp=7680, n_experts=128, k=8, d_expert=960,
    norm_topk_prob=True, sparse_layers=(True,) * 32, aux_loss_coef=0.01, **_SHARED,  # type: ignore[arg-type]
)  # fmt: skip


@dataclass(frozen=True)
class FamilyMember:
    """One released checkpoint: its name here, its id on the hub and its configuration."""

    name: str
    config: ModelConfig

    @property
    def hub_id(self) -> str:
        return f"llm-jp/{self.name}"


FAMILY: dict[str, FamilyMember] = {
    name: FamilyMember(name, config)
    for name, config in {
        "llm-jp-4-8b-base": _8B,
        "llm-jp-4-8b-instruct": _8B,
        "llm-jp-4-8b-thinking": _8B,
        "llm-jp-4-33b-base": _33B,
        "llm-jp-4-33b-thinking": _33B,
        "llm-jp-4-32b-a3b-base": _32B_A3B,
        "llm-jp-4-32b-a3b-thinking": _32B_A3B,
        "llm-jp-4.1-8b-thinking": _8B,
        "llm-jp-4.1-33b-thinking": _33B,
        "llm-jp-4.1-32b-a3b-thinking": _32B_A3B,
    }.items()
}
"""The released models by name."""


def family_member(name: str) -> FamilyMember:
    """Look a released checkpoint up by name, with or without `llm-jp/`. Raises ConfigError listing close names."""
    short = name.removeprefix("llm-jp/").lower()
    if short not in FAMILY:
        close = difflib.get_close_matches(short, FAMILY, n=3, cutoff=0.3) or list(FAMILY)
        raise ConfigError(
            f"model name: expected a member of the family, got {name!r}. Did you mean {', '.join(close)}?"
        )
    return FAMILY[short]


def params_table(name: str, config: ModelConfig) -> str:
    """The parameter table of a model card: total, activated, embedding (input only) and non-embedding counts."""
    embedding = config.n_embedding_params
    rows = {
        "total parameters": config.n_params,
        "activated parameters": config.n_activated_params,
        "embedding parameters": embedding,
        "non-embedding parameters": config.n_params - embedding,
    }
    width = max(map(len, rows))
    return "\n".join([name, *(f"  {label:<{width}}  {count:>16,}" for label, count in rows.items())])
