"""The whole model with random weights: prefill, and decoding one token per sequence from a filled cache."""

from __future__ import annotations

from typing import Any

import torch
from measure import Report, graphed, medians

from workbench.config import Qwen3MoeConfig, RopeConfig
from workbench.models import build_model
from workbench.models.llama import Llama

REAL = Qwen3MoeConfig(
    d_model=2560, n_layers=32, n_heads=40, n_kv_heads=4, d_head=128, d_mlp=7680, d_vocab=196_608, n_ctx=65_536,
    norm_eps=1e-6, rope=RopeConfig(theta=500_000.0), n_experts=128, k=8, d_expert=960, sparse_layers=(True,) * 32,
)  # fmt: skip
SMOKE = Qwen3MoeConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=96, d_vocab=101, n_ctx=256, norm_eps=1e-6,
    rope=RopeConfig(theta=1e4), n_experts=8, k=2, d_expert=64, sparse_layers=(True,) * 2,
)  # fmt: skip


@torch.no_grad()
def whole_model(
    report: Report, cfg: Qwen3MoeConfig, dtype: torch.dtype, device: torch.device, impl: str,
    prompts: tuple[int, ...], batches: tuple[int, ...], context: int,
) -> None:  # fmt: skip
    """Rows of section "model": milliseconds and tokens per second."""
    model = build_model(cfg, dtype=dtype, device=device, moe_impl=impl)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter) if parameter.ndim == 1 else torch.nn.init.normal_(parameter, std=0.02)
    common = {"dtype": str(dtype), "routing": "random weights"}
    for n_tokens in prompts:
        case = common | {"n_tokens": n_tokens, "how": "eager"}
        if report.left > 30 or n_tokens == prompts[0]:
            report.attempt("model", "prefill", lambda n=n_tokens, c=case: _prefill(report, model, n, c), **case)
        else:
            report.add("model", "prefill", **case, note="left out: the time budget is spent")
    for batch in batches:
        case = common | {"n_tokens": batch}
        report.attempt("model", "decode", lambda b=batch, c=case: _decode(report, model, b, context, c), **case)


def _prefill(report: Report, model: Llama, n_tokens: int, case: dict[str, Any]) -> None:
    """Up to the logits of the last position, as a generation needs them."""
    tokens = torch.arange(n_tokens, device=model.device)[None] % model.cfg.d_vocab

    def run() -> torch.Tensor:
        stream = model(tokens, stop_at_layer=model.cfg.n_layers)
        return model.unembed(model.ln_final(stream[:, -1:]))

    seconds = medians({"prefill": run}, model.device, reps=7)["prefill"]
    report.add("model", "prefill", **case, us=seconds * 1e6, tokens_per_s=n_tokens / seconds)


def _decode(report: Report, model: Llama, batch: int, context: int, case: dict[str, Any]) -> None:
    """One step after `context` positions, the same step again and again."""
    cache = model.new_cache(batch, context + 1)
    cache.keys.zero_()
    cache.values.zero_()
    tokens = torch.ones(batch, 1, dtype=torch.int64, device=model.device)

    def step() -> torch.Tensor:
        cache.n_seen = context
        return model(tokens, cache=cache)

    replay = report.attempt("model", "decode, graph", lambda: graphed(step, model.device), **case)
    seconds = medians({"decode": replay or step}, model.device, reps=15)["decode"]
    how = "graph" if replay and model.device.type == "cuda" else "eager"
    note = f"context {context}"
    report.add("model", "decode", **case, us=seconds * 1e6, tokens_per_s=batch / seconds, how=how, note=note)
