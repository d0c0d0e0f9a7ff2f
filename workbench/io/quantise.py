"""Experts in int8 or int4: in a loaded model, while a checkpoint is read, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl
import torch
from torch import Tensor, nn

from workbench.config import ModelConfig, Qwen3MoeConfig
from workbench.errors import CheckpointError, ConfigError
from workbench.io.names import Slot
from workbench.models import Llama, quantised_implementation
from workbench.models.moe import Moe
from workbench.models.moe_weights import EXPERT_FORMATS, GROUP, QuantizedWeight, hold_quantised
from workbench_kernels.quant import quantize_into, weight_bytes


class ErrorTally:
    """What quantising has cost so far, added up per layer, weight and expert."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str, int], list[float]] = {}

    def add(self, param: str, expert: int, exact: Tensor, error: Tensor) -> None:
        layer, weight = int(param.split(".")[1]), param.rsplit(".", 1)[1]
        sums = self._sums.setdefault((layer, weight, expert), [0.0, 0.0, 0.0, 0.0])
        sums[0] += float(error.square().sum())
        sums[1] += float(exact.square().sum())
        sums[2] = max(sums[2], float(error.abs().max()))
        sums[3] = max(sums[3], float(exact.abs().max()))

    def frame(self) -> pl.DataFrame:
        """One row per layer, weight (gate_up, down) and expert: relative Frobenius error, largest error and weight."""
        rows = [
            (*key, (error / norm) ** 0.5 if norm else 0.0, largest, weight)
            for key, (error, norm, largest, weight) in sorted(self._sums.items())
        ]
        schema = ["layer", "weight", "expert", "relative_error", "max_error", "max_weight"]
        return pl.DataFrame(rows, schema=schema, orient="row")


def quantise_experts(model: Llama, experts: str, group: int = GROUP) -> pl.DataFrame:
    """Turn the experts of a loaded model into "int8" or "int4", layer by layer in place; returns the error of each.

    The frame is `ErrorTally.frame`'s; `df.sort("relative_error").tail(1)` is the worst expert. The model's moe_impl has
    to run such experts: triton reads them as they are, sorted and reference dequantise, grouped_mm cannot. Raises
    ConfigError for another format, a model without experts, experts that are quantised already, and widths that the
    group does not divide.
    """
    bits = expert_bits(experts)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Moe)]
    if bits == 16 or not layers or any(isinstance(moe.gate_up, QuantizedWeight) for _, moe in layers):
        raise ConfigError(f"experts: expected int8 or int4 and a model with plain experts, got {experts!r}.")
    quantised_implementation(model.moe_impl or "", model.device, model.dtype)
    tally = ErrorTally()
    for name, moe in layers:
        exact = {weight: getattr(moe, weight).detach() for weight in ("gate_up", "down")}
        hold(moe, bits, group)
        for weight, tensor in exact.items():
            for expert in range(tensor.shape[0]):
                store(getattr(moe, weight), f"{name}.{weight}", expert, slice(None), tensor[expert], tally)
    return tally.frame()


def hold(moe: nn.Module, bits: int, group: int = GROUP) -> None:
    """`hold_quantised` with the project's error. Raises ConfigError for widths that the group does not divide."""
    try:
        hold_quantised(moe, bits, group)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@torch.no_grad()
def store(holder: QuantizedWeight, param: str, expert: int, rows: slice, exact: Tensor, tally: ErrorTally) -> None:
    """Quantise some rows [out in] of one expert into their place; rows do not depend on each other."""
    exact = exact.to(holder.values.device).float()
    values, scales = holder.values[expert, rows], holder.scales[expert, :, rows]
    try:
        quantize_into(values, scales, exact, holder.bits, holder.group, f"{param}[{expert}]")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    experts = holder.experts()
    part = type(experts)(values, scales, holder.bits, holder.group, holder.shape, torch.float32)
    tally.add(param, expert, exact, part.dequantize() - exact)


def store_piece(holder: QuantizedWeight, slot: Slot, rows: slice, piece: Tensor, tally: ErrorTally) -> None:
    """`store` for a piece of a checkpoint's tensor: rows of one expert's matrix, or of the fused layout's experts."""
    if slot.expert is None:
        for expert, matrix in zip(range(rows.start, rows.stop), piece, strict=True):
            store(holder, slot.param, expert, slice(None), matrix, tally)
    else:
        start = (slot.rows.start or 0) + rows.start
        store(holder, slot.param, slot.expert, slice(start, start + piece.shape[0]), piece, tally)


def refuse_quantised(model: Llama) -> None:
    """Raises CheckpointError for a model with quantised experts, which no checkpoint layout here can hold."""
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        raise CheckpointError("model: expected plain experts, got quantised ones. Save the model they were made from.")


def expert_bits(experts: str) -> int:
    """Bits per weight of a format's name. Raises ConfigError for an unknown one."""
    if experts not in EXPERT_FORMATS:
        raise ConfigError(f"experts: expected one of {', '.join(EXPERT_FORMATS)}, got {experts!r}.")
    return EXPERT_FORMATS[experts]


def memory(cfg: ModelConfig, n_ctx: int = 4096, cards: tuple[int, ...] = (24, 48, 80)) -> pl.DataFrame:
    """What a model needs in each format, from its configuration: one row per format.

    weight_bytes: the experts in that format, everything else in bfloat16; cache_bytes: keys and values of one sequence
    of `n_ctx` positions in bfloat16; gib: both together, in 2^30 bytes. fits_24, fits_48 ...: whether that is at most
    90% of a card of so many GiB, which leaves a tenth for activations and the driver.
    """
    formats = EXPERT_FORMATS if isinstance(cfg, Qwen3MoeConfig) else {"plain": 16}
    cache = 2 * 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * n_ctx
    rows = []
    for name, bits in formats.items():
        total = model_bytes(cfg, bits)
        fits = {f"fits_{card}": total + cache <= 0.9 * card * 2**30 for card in cards}
        rows.append(
            {"experts": name, "weight_bytes": total, "cache_bytes": cache, "gib": (total + cache) / 2**30, **fits}
        )
    return pl.DataFrame(rows)


def model_bytes(cfg: ModelConfig, bits: int = 16, group: int = GROUP, size: int = 2) -> int:
    """Bytes of all weights with the experts at `bits` and the rest at `size` bytes each, which is bfloat16."""
    shapes = list(_expert_shapes(cfg))
    n_expert_params = sum(weight_bytes(shape, 16) for shape in shapes) // 2
    return sum(weight_bytes(shape, bits, group) for shape in shapes) + size * (cfg.n_params - n_expert_params)


def _expert_shapes(cfg: ModelConfig) -> Iterator[tuple[int, int, int]]:
    if isinstance(cfg, Qwen3MoeConfig):
        for _ in range(sum(cfg.sparse_layers)):
            yield cfg.n_experts, 2 * cfg.d_expert, cfg.d_model
            yield cfg.n_experts, cfg.d_model, cfg.d_expert
