"""Experts' weights inside a model: plain parameters, or int8 and int4 held as buffers that are never cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workbench_kernels.quant import QuantizedExperts, check_format

EXPERT_FORMATS = {"plain": 16, "int8": 8, "int4": 4}
GROUP = 64  # of int4; the larger group does not divide the d_expert of LLM-jp-4 32B-A3B, which is 960


class QuantizedWeight(nn.Module):
    """One stacked weight [expert out in] in int8 or int4, in place of the parameter of that name in `Moe`."""

    values: Tensor
    scales: Tensor

    def __init__(self, shape: tuple[int, int, int], bits: int, group: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.group, self.shape, self.dtype = bits, check_format(shape, bits, group), shape, dtype
        n_experts, n_rows, n_cols = shape
        self.register_buffer("values", torch.empty(n_experts, n_rows, n_cols * bits // 8, dtype=torch.int8))
        scale_dtype = torch.float32 if bits == 8 else torch.bfloat16
        self.register_buffer("scales", torch.empty(n_experts, n_cols // self.group, n_rows, dtype=scale_dtype))

    def experts(self) -> QuantizedExperts:
        """What the kernels take; it shares these buffers."""
        return QuantizedExperts(self.values, self.scales, self.bits, self.group, self.shape, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves follow the model, casts do not: as bytes the scales have no floating dtype to be cast."""
        self.values = fn(self.values)
        self.scales = fn(self.scales.view(torch.uint8)).view(self.scales.dtype)
        return self


def expert_weight(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedExperts:
    """A layer's `gate_up` or `down` as the kernels take it."""
    return weight.experts() if isinstance(weight, QuantizedWeight) else weight


def hold_quantised(moe: nn.Module, bits: int, group: int = GROUP) -> None:
    """Put unset quantised weights in place of a layer's `gate_up` and `down`."""
    for name in ("gate_up", "down"):
        parameter = getattr(moe, name)
        delattr(moe, name)
        with torch.device(parameter.device):
            setattr(moe, name, QuantizedWeight(tuple(parameter.shape), bits, group, parameter.dtype))
