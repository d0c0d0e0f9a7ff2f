"""Our experts in transformers' models: one name per implementation in its experts interface (transformers 5).

transformers gives such a function tokens, expert ids and weights; its own router decides. transformers is imported when
`register_with_transformers` is called and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench_kernels.experts import routed_experts
from workbench_kernels.moe.api import fused_moe
from workbench_kernels.moe.choice import CHOICES, choose_implementation
from workbench_kernels.moe.plan import Intervene

PREFIX = "workbench_"
TRAITS = {
    "is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True, "has_post_expert_norm": False,
}  # fmt: skip


def register_with_transformers() -> tuple[str, ...]:
    """Add workbench_sorted, workbench_grouped_mm, workbench_reference and workbench_triton; returns these names.

    Then `model.set_experts_implementation("workbench_triton")` makes a Qwen3-MoE of transformers run on it, with the
    rounding of transformers' grouped_mm. Raises ImportError when transformers is missing or older than 5, which has no
    such interface; a call raises ValueError for experts that are not plain SwiGLU, and for an implementation that
    cannot run where the model lies.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise ImportError(
            "transformers: expected release 5 with its experts interface, got none. Install the extra `hf`."
        ) from None
    names = tuple(f"{PREFIX}{impl}" for impl in CHOICES)
    for impl, name in zip(CHOICES, names, strict=True):
        ALL_EXPERTS_FUNCTIONS.register(name, _forward(impl))
    return names


def _forward(impl: str) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _check_module(self)
        weights = self.gate_up_proj, self.down_proj
        choose_implementation(impl, hidden_states.device, hidden_states.dtype)
        if impl != "triton":
            return routed_experts(hidden_states, top_k_index, top_k_weights, *weights, impl=impl, numerics="hf")
        forced = Intervene(forced_ids=top_k_index, forced_weights=top_k_weights)
        router = _blank_router(self, hidden_states)
        return fused_moe(
            hidden_states, router, *weights, top_k_index.shape[1], intervene=forced, impl=impl, numerics="hf"
        )[0]

    forward.__name__ = f"{PREFIX}{impl}"
    forward.__doc__ = f"The experts of one layer by {impl}, as transformers' experts interface calls it."
    return forward


def _check_module(module: Any) -> None:
    """Raises ValueError unless these are plain SwiGLU experts: gate rows before up rows, no bias, silu, no clamp."""
    wrong = [name for name, expected in TRAITS.items() if bool(getattr(module, name, expected)) != expected]
    activation = type(getattr(module, "act_fn", None)).__name__
    if activation not in ("SiLUActivation", "SiLU"):
        wrong.append(f"act_fn {activation}")
    if getattr(module._apply_gate, "__module__", "") != "transformers.integrations.moe":  # its own, as DeepSeek-V4's
        wrong.append("_apply_gate")
    if getattr(module, "_is_expert_parallel", False):
        wrong.append("expert parallelism")
    if wrong:
        raise ValueError(
            f"{type(module).__name__}: expected SwiGLU experts as in Qwen3-MoE, got another {', '.join(wrong)}. "
            "Keep transformers' own implementation."
        )


def _blank_router(module: Any, x: Tensor) -> Tensor:
    """A router of zeros [E, d_model], made once: ids and weights are forced, it decides nothing."""
    cached = module.__dict__.get("_workbench_router")
    if cached is None or cached.device != x.device or cached.dtype != x.dtype:
        n_experts, d_model = module.down_proj.shape[:2]
        cached = torch.zeros(n_experts, d_model, dtype=x.dtype, device=x.device)
        module.__dict__["_workbench_router"] = cached
    return cached
