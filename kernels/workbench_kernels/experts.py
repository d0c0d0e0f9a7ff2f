"""The experts of one layer, applied to the tokens that were routed to them.

Legend: T tokens, D d_model, F d_expert, E experts, K slots per token, N = T·K routed rows.
A *slot* is one (token, rank) pair; slot order is the order of expert_ids.reshape(N).

Three implementations of one grouped linear map, chosen by name and never swapped silently:
  sorted      rows sorted by expert, one matrix product per expert that was hit; the default on CPU
  grouped_mm  the same rows through torch.nn.functional.grouped_mm; the default for bfloat16 on CUDA
  reference   each row times its own expert's matrix, gathered: slow, and plain enough to be the oracle
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Tap = Callable[[Tensor], Tensor]
TAPS = ("expert_pre", "expert_pre_linear", "expert_post", "expert_out")


def routed_experts(
    x: Tensor,  # [T, D]
    expert_ids: Tensor,  # [T, K] int64
    routing_weights: Tensor,  # [T, K]
    gate_up: Tensor,  # [E, 2F, D], gate rows before up rows
    down: Tensor,  # [E, D, F]
    *,
    impl: str = "sorted",
    taps: Mapping[str, Tap] | None = None,
) -> Tensor:  # [T, D]
    """Sum over the K slots of weight · down(silu(gate x) * up x), each slot with its own expert's matrices.

    `taps` see, and may replace, the routed activations in slot order [T, K, ...]: `expert_pre` and
    `expert_pre_linear` (gate and up projections), `expert_post` (their product after silu), `expert_out` (before
    weighting). A tap that returns its argument changes no bit. Weights of higher precision than x make the weighted
    sum in that precision; the result has x's dtype. Differentiable in every floating argument.
    """
    taps = taps or {}
    n_experts, k = gate_up.shape[0], expert_ids.shape[1]
    sorted_ids, order = expert_ids.reshape(-1).sort(stable=True)  # [N], [N]: ties keep slot order, so bits repeat
    back = order.argsort()  # [N] slot -> sorted row

    def tap(name: str, rows: Tensor) -> Tensor:
        if name not in taps:
            return rows
        return taps[name](rows[back].unflatten(0, expert_ids.shape)).reshape(rows.shape)[order]

    linear = _LINEARS[impl]
    gate_up_rows = linear(x[order // k], gate_up, sorted_ids, n_experts)  # [N, 2F]
    if "expert_pre" in taps or "expert_pre_linear" in taps:
        # back into one tensor: silu rounds its last bit by memory layout, and a tap must not change a bit
        gate, up = gate_up_rows.chunk(2, dim=-1)
        gate_up_rows = torch.cat((tap("expert_pre", gate), tap("expert_pre_linear", up)), dim=-1)
    gate, up = gate_up_rows.chunk(2, dim=-1)  # [N, F] each
    hidden = F.silu(gate) * up
    out = linear(tap("expert_post", hidden), down, sorted_ids, n_experts)  # [N, D]
    slots = out[back].unflatten(0, expert_ids.shape)  # [T, K, D]
    if "expert_out" in taps:
        slots = taps["expert_out"](slots)
    return (slots * routing_weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def choose_implementation(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs for `impl` ("auto" or a name). Raises ValueError for one that cannot run."""
    if impl == "auto":
        return "grouped_mm" if device.type == "cuda" and dtype == torch.bfloat16 else "sorted"
    if impl not in _LINEARS:
        raise ValueError(f"moe_impl: expected one of auto, {', '.join(_LINEARS)}, got {impl!r}.")
    if impl == "grouped_mm" and dtype == torch.float64:
        raise ValueError("moe_impl: expected sorted or reference for a float64 model, got 'grouped_mm'.")
    return impl


def _linear_sorted(rows: Tensor, weight: Tensor, sorted_ids: Tensor, n_experts: int) -> Tensor:
    counts = torch.bincount(sorted_ids, minlength=n_experts).tolist()
    # unbind, not indexing: its backward writes one gradient for all experts instead of one full tensor for each
    parts = [part @ matrix.T for part, matrix in zip(rows.split(counts), weight.unbind(), strict=True) if part.shape[0]]
    return torch.cat(parts) if parts else rows.new_empty(0, weight.shape[1])


def _linear_grouped_mm(rows: Tensor, weight: Tensor, sorted_ids: Tensor, n_experts: int) -> Tensor:
    experts = torch.arange(n_experts, device=rows.device)
    ends = torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)  # no synchronisation with the host
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _linear_reference(rows: Tensor, weight: Tensor, sorted_ids: Tensor, n_experts: int) -> Tensor:
    return torch.einsum("ni,noi->no", rows, weight[sorted_ids])


_LINEARS = {"sorted": _linear_sorted, "grouped_mm": _linear_grouped_mm, "reference": _linear_reference}
IMPLEMENTATIONS = tuple(_LINEARS)
