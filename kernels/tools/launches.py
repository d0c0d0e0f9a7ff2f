"""What the host code would launch: recorded from its own calls on tensors without data, as input for the compiler.

Nothing about a kernel's arguments is written down twice: the check sees the launches that run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from workbench_kernels.moe.api import plan_layer, run_layer
from workbench_kernels.moe.plan import NEEDS, Intervene, Need
from workbench_kernels.quant import QuantizedExperts

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
SHAPE = {"d_model": 2560, "d_expert": 960, "n_experts": 128, "k": 8}
OPTIONS = ("plain", "needs", "changed", "everything")


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel, as the compiler takes it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that 16 divides
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def source(self) -> ASTSource:
        attributes = {(index,): [["tt.divisibility", 16]] for index in self.aligned}
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)


@contextmanager
def recording() -> Iterator[dict[Launch, None]]:
    """Keep every launch instead of running it; equal ones once, in order."""
    found: dict[Launch, None] = {}
    run = JITFunction.run

    def keep(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
        found[_launch(kernel, args, options, warps, stages)] = None

    JITFunction.run = keep
    try:
        yield found
    finally:
        JITFunction.run = run


def layer_launches(
    path: str, n_tokens: int, dtype: torch.dtype, bits: int, group: int, blocks: dict[str, Any], options: str,
    numerics: str = "trained",
) -> list[Launch]:  # fmt: skip
    """The launches of one layer at the real shape."""
    d, f, e, k = SHAPE.values()
    with recording() as found, torch.device("meta"):
        x, router = torch.empty(n_tokens, d, dtype=dtype), torch.empty(e, d, dtype=dtype)
        gate_up = _weight((e, 2 * f, d), dtype, bits, group)
        down = _weight((e, d, f), dtype, bits, 64)  # 128 does not divide d_expert
        change = _changes(n_tokens) if options in ("changed", "everything") else Intervene()
        need = Need()
        if options in ("needs", "everything"):
            masks = [torch.empty(size, dtype=torch.bool) for size in (e, n_tokens)] if options == "everything" else ()
            need = Need(NEEDS, *masks)
        run_layer(plan_layer(x, router, gate_up, down, k, True, need, change, path, numerics, blocks))
    return list(found)


def _weight(shape: tuple[int, int, int], dtype: torch.dtype, bits: int, group: int) -> torch.Tensor | QuantizedExperts:
    if bits == 16:
        return torch.empty(shape, dtype=dtype)
    e, o, i = shape
    group = i if bits == 8 else group
    values = torch.empty(e, o, i * bits // 8, dtype=torch.int8)
    scales = torch.empty(e, i // group, o, dtype=torch.float32 if bits == 8 else torch.bfloat16)
    return QuantizedExperts(values, scales, bits, group, shape, dtype)


def _changes(n_tokens: int) -> Intervene:
    d, _, e, k = SHAPE.values()
    return Intervene(
        router_bias=torch.empty(n_tokens, e),
        keep_mask=torch.empty(e, dtype=torch.bool),
        expert_scale=torch.empty(e),
        expert_add=torch.empty(e, d),
        forced_ids=torch.empty(n_tokens, k, dtype=torch.int64),
        forced_weights=torch.empty(n_tokens, k),
        replace_experts=torch.empty(e, dtype=torch.bool),
        replace_rows=torch.empty(n_tokens, k, d, dtype=torch.bfloat16),
    )


def _launch(kernel: JITFunction, args: tuple, options: dict[str, Any], warps: int, stages: int) -> Launch:
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind = "constexpr" if parameter.is_constexpr or value is None else _kind(value)
        if kind == "i32" and value == 1 and not parameter.do_not_specialize:
            kind = "constexpr"  # the launcher makes a constant of 1
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((parameter.name, value))
        elif kind.startswith("*") or (kind == "i32" and value % 16 == 0 and not parameter.do_not_specialize):
            aligned.append(index)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), warps, stages)


def _kind(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
