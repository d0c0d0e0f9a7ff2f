"""Weight-only experts: int8 with one scale per output channel, int4 with one scale per 64 or 128 input values.

Legend: E experts, O output rows, I input columns, G columns per group (G = I in int8), symmetric without zero points:
weight[e, o, i] = values[e, o, i] · scales[e, i // G, o].

Layout, chosen so that a kernel reads contiguous bytes and unpacks with two shifts:
  int8  values int8 [E, O, I], as the weight itself; scales float32 [E, 1, O], applied once after the dot product
  int4  values int8 [E, O, I/2]. Group g of a row is its G/2 bytes from g·G/2 on; byte b of a group holds column b of
        the group in its low nibble and column b + G/2 in its high nibble, both in two's complement:
        low = (byte << 4) >> 4, high = byte >> 4. So one contiguous tile of bytes is two tiles of weights, each over
        contiguous columns: dot(low, x[first half of the group]) + dot(high, x[second half]), with nothing interleaved.
        scales bfloat16 [E, I/G, O]: the scales of one group lie side by side along the output rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (8, 4)
GROUPS = (64, 128)
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class QuantizedExperts:
    """One stacked weight [E, O, I] in int8 or int4; takes the place of the tensor in `fused_moe`."""

    values: Tensor  # int8 [E, O, I], or int4 pairs [E, O, I/2]
    scales: Tensor  # [E, I/group, O]
    bits: int
    group: int  # input columns that share a scale; I in int8
    shape: tuple[int, int, int]  # [E, O, I]
    dtype: torch.dtype  # of the weight it was made from, which is what `dequantize` gives

    def dequantize(self, expert: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [E, O, I], or one expert's [O, I], rounded once to `dtype` (default: the original dtype)."""
        values, scales = (self.values, self.scales) if expert is None else (self.values[expert], self.scales[expert])
        groups = (values if self.bits == 8 else unpack_int4(values, self.group)).unflatten(-1, (-1, self.group))
        weight = groups.float() * scales.float().transpose(-1, -2).unsqueeze(-1)  # [..., O, I/G, G]
        return weight.flatten(-2).to(dtype or self.dtype)

    def __getitem__(self, expert: int) -> Tensor:
        return self.dequantize(expert)

    def to(self, device: torch.device | str) -> QuantizedExperts:
        """The same experts on another device."""
        moved = self.values.to(device), self.scales.to(device)
        return QuantizedExperts(*moved, self.bits, self.group, self.shape, self.dtype)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def quantize(weight: Tensor, bits: int, group: int = 64) -> QuantizedExperts:
    """Quantise a stacked weight [E, O, I], expert by expert, so that no float32 copy of all of it is made.

    int8 takes each row's largest magnitude as 127. int4 tries five scales per group, 80% to 100% of the largest
    magnitude as 7, and keeps the one of least squared error. Raises ValueError for other bits, groups that do not
    divide I, and weights that are not finite.
    """
    group = check_format(tuple(weight.shape), bits, group)
    n_experts, n_rows, n_cols = weight.shape
    values = torch.empty(n_experts, n_rows, n_cols * bits // 8, dtype=torch.int8, device=weight.device)
    scale_dtype = torch.float32 if bits == 8 else torch.bfloat16
    scales = torch.empty(n_experts, n_cols // group, n_rows, dtype=scale_dtype, device=weight.device)
    for expert in range(n_experts):
        quantize_into(values[expert], scales[expert], weight[expert].detach(), bits, group, f"weight[{expert}]")
    return QuantizedExperts(values, scales, bits, group, (n_experts, n_rows, n_cols), weight.dtype)


def quantize_into(values: Tensor, scales: Tensor, weight: Tensor, bits: int, group: int, name: str = "weight") -> None:
    """Quantise one expert's rows [O, I] into its `values` and `scales`, as a checkpoint is read row by row."""
    groups = weight.float().unflatten(-1, (-1, group))  # [O, I/G, G]
    largest = groups.abs().amax(-1)  # [O, I/G]
    if not largest.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity. Such a checkpoint cannot be quantised.")
    top = 2 ** (bits - 1) - 1
    scale = (largest / top).to(scales.dtype) if bits == 8 else _least_error(groups, largest / top, scales.dtype)
    rounded = _rounded(groups, scale.float(), top).to(torch.int8)
    values.copy_(rounded.flatten(-2) if bits == 8 else pack_int4(rounded))
    scales.copy_(scale.transpose(-1, -2))


def quantization_error(weight: Tensor, quantized: QuantizedExperts) -> list[dict[str, float]]:
    """One row per expert: relative Frobenius error, largest absolute error and largest magnitude of the weight."""
    rows = []
    for expert in range(quantized.shape[0]):
        exact = weight[expert].detach().float()
        error = quantized.dequantize(expert, torch.float32) - exact
        norm = float(exact.norm())
        rows.append(
            {
                "expert": expert,
                "relative_error": float(error.norm()) / norm if norm else 0.0,
                "max_error": float(error.abs().max()),
                "max_weight": float(exact.abs().max()),
            }
        )
    return rows


def worst_expert(errors: list[dict[str, float]]) -> dict[str, float]:
    """The row of `quantization_error` with the largest relative error; the lowest expert among equals."""
    return max(errors, key=lambda row: row["relative_error"])


def weight_bytes(shape: tuple[int, int, int], bits: int, group: int = 64) -> int:
    """Bytes of a stacked weight [E, O, I]: 16 bits plain, or 8 or 4 bits with their scales."""
    n_experts, n_rows, n_cols = shape
    if bits == 16:
        return 2 * n_experts * n_rows * n_cols
    group = check_format(shape, bits, group)
    scale_bytes = 4 if bits == 8 else 2
    return n_experts * n_rows * (n_cols * bits // 8 + n_cols // group * scale_bytes)


def check_format(shape: tuple[int, ...], bits: int, group: int) -> int:
    """The columns per scale for this weight. Raises ValueError for a format that does not fit it."""
    if len(shape) != 3:
        raise ValueError(f"weight: expected [expert, out, in], got shape {list(shape)}. Stack the experts first.")
    if bits not in BITS:
        raise ValueError(f"bits: expected 8 or 4, got {bits}. Other widths have no kernel.")
    if bits == 8:
        return shape[2]
    if group not in GROUPS:
        raise ValueError(f"group: expected 64 or 128, got {group}. Other groups have no kernel.")
    if shape[2] % group:
        advice = "Use group 64 or int8." if shape[2] % 64 == 0 else "Use int8."
        raise ValueError(f"group: expected a divisor of the {shape[2]} input columns, got {group}. {advice}")
    return group


def pack_int4(groups: Tensor) -> Tensor:  # int8 [..., I/G, G] in -8..7 -> int8 [..., I/2]
    """Two columns per byte, half a group apart: the first in the low nibble, the second in the high one."""
    low, high = groups.chunk(2, dim=-1)
    return ((low & 0xF) | (high << 4)).flatten(-2)


def unpack_int4(packed: Tensor, group: int) -> Tensor:  # int8 [..., I/2] -> int8 [..., I] in -8..7
    """What `pack_int4` packed, back in column order."""
    bytes_ = packed.unflatten(-1, (-1, group // 2))  # [..., I/G, G/2]
    return torch.cat(((bytes_ << 4) >> 4, bytes_ >> 4), dim=-1).flatten(-2)


def _least_error(groups: Tensor, full: Tensor, dtype: torch.dtype) -> Tensor:  # [O, I/G, G], [O, I/G] -> [O, I/G]
    best = full.to(dtype)
    least = torch.full_like(full, torch.inf)
    for shrink in _SHRINK:
        scale = (full * shrink).to(dtype)  # errors are measured with the scale as it will be stored
        error = (_rounded(groups, scale.float(), 7) * scale.float().unsqueeze(-1) - groups).square_().sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _rounded(groups: Tensor, scale: Tensor, top: int) -> Tensor:  # [O, I/G, G], [O, I/G] -> whole numbers in ±top
    inverse = torch.where(scale > 0, 1 / scale, 0.0)  # a group of zeros has scale 0
    return (groups * inverse.unsqueeze(-1)).round_().clamp_(-top, top)
