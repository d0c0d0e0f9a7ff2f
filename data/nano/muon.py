"""Muon in float32: torch's own iterates in bfloat16, which a CPU without bfloat16 units does about ten times slower."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # the quintic of the Muon post, as torch has it
STEPS = 5


def orthogonalised(updates: Tensor) -> Tensor:  # [matrix rows columns]
    """Each matrix with its singular values brought near 1 by Newton-Schulz iteration (K. Jordan, Muon, 2024)."""
    tall = updates.shape[1] > updates.shape[2]
    x = updates.mT if tall else updates
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; parameters are matrices.

    The update and its state are those of `torch.optim.Muon`; matrices of one shape go through the iteration together.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append((param, self._momentum(param, param.grad, group["momentum"])))
            for shape, moved in by_shape.items():
                updates = orthogonalised(torch.stack([update for _, update in moved]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (param, _), update in zip(moved, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _momentum(self, param: Tensor, grad: Tensor, momentum: float) -> Tensor:
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        state["momentum_buffer"].lerp_(grad, 1 - momentum)
        return grad.lerp(state["momentum_buffer"], momentum)
