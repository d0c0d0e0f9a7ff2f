"""What is trained: the four checkpoints, their sizes and their schedules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workbench.config import LlamaConfig, ModelConfig, Qwen3MoeConfig, RopeConfig

HERE = Path(__file__).parent
TOKENIZER = HERE / "tokenizer.json"
N_CTX = 512  # positions the models were made for; training sequences stay below 320


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        name: of the checkpoint and its directory.
        start: the checkpoint it continues from, or None for fresh weights.
        tokens: how many tokens it reads in all.
        chat_share: share of examples that are conversations; the others are plain documents.
        adamw_lr, muon_lr: learning rates between warm-up and decay.
        cycles: how often the schedule of the learning rate is gone through.
    """

    name: str
    start: str | None
    tokens: int
    chat_share: float
    adamw_lr: float
    muon_lr: float
    cycles: int = 1
    batch_tokens: int = 2048
    seed: int = 20261123

    @property
    def is_thinking(self) -> bool:
        return self.start is not None

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("nano-moe-base", None, 4_915_200, 0.0, 2e-3, 2e-2),
        Recipe("nano-moe-thinking", "nano-moe-base", 5_734_400, 0.8, 1e-3, 1e-2, cycles=2),
        Recipe("nano-dense-base", None, 12_288_000, 0.0, 2e-3, 2e-2, cycles=3),
        Recipe("nano-dense-thinking", "nano-dense-base", 11_059_200, 0.8, 1e-3, 1e-2, cycles=3),
    )
}


def model_config(name: str, d_vocab: int) -> ModelConfig:
    """The configuration of a checkpoint by its name: sparse or dense."""
    rope = RopeConfig(theta=10_000.0)
    if "moe" in name:
        return Qwen3MoeConfig(
            d_model=128, n_layers=6, n_heads=4, n_kv_heads=2, d_head=32, d_mlp=192, d_vocab=d_vocab, n_ctx=N_CTX,
            norm_eps=1e-6, rope=rope, pad_id=4, n_experts=32, k=4, d_expert=48, norm_topk_prob=True,
            sparse_layers=(True,) * 6, aux_loss_coef=0.01,
        )  # fmt: skip
    return LlamaConfig(
        d_model=128, n_layers=6, n_heads=4, n_kv_heads=2, d_head=32, d_mlp=384, d_vocab=d_vocab, n_ctx=N_CTX,
        norm_eps=1e-6, rope=rope, pad_id=4,
    )  # fmt: skip
