"""A small Qwen3-MoE of transformers, run with chosen experts so that implementations are compared on the same ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def model(dtype: torch.dtype, k: int = 2) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=k,
        norm_topk_prob=True,
    )  # fmt: skip
    built = transformers.Qwen3MoeForCausalLM(config).to(dtype).eval()
    for layer in built.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=1.0)
    return built


@torch.no_grad()
def forced(built: Any, implementation: str, record: dict[int, Tensor]) -> Tensor:
    """Logits with `implementation`; the experts of the first run are forced on every later one."""
    built.set_experts_implementation(implementation)

    def force(
        layer: int, gate: torch.nn.Module, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, ids = output
        ids = record.setdefault(layer, ids)
        weights = logits.softmax(-1, dtype=torch.float32).gather(-1, ids)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), ids

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda gate, _, output, at=at: force(at, gate, output))
        for at, layer in enumerate(built.model.layers)
    ]
    logits = built(torch.arange(40).reshape(2, 20)).logits
    for hook in hooks:
        hook.remove()
    return logits
