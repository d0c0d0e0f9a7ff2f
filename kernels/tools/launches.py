"""What the host code would launch: recorded from its own calls on tensors without data, as input for the compiler.

Nothing about a kernel's arguments is written down twice: the check sees the launches that run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from workbench_kernels.moe import stages
from workbench_kernels.moe.api import plan_layer
from workbench_kernels.moe.plan import NEEDS, Intervene, Need
from workbench_kernels.quant import QuantizedExperts

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
SHAPE = {"d_model": 2560, "d_expert": 960, "n_experts": 128, "k": 8}
TAPS = ("router_logits", "router_probs", "expert_ids", "routing_weights",
        "expert_pre", "expert_pre_linear", "expert_post", "expert_out")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What decides, beside sizes and formats, which variant of a kernel runs."""

    needs: bool = False  # everything that may be asked for
    selected: bool = False  # for chosen experts and tokens
    changed: bool = False  # every intervention
    tapped: bool = False  # hooks at every point of the model
    numerics: str = "trained"
    normalised: bool = True
    mixed: bool = False  # a float32 router beside half-precision experts


OPTIONS = {
    "plain": Options(),
    "needs": Options(needs=True),
    "selected": Options(needs=True, selected=True),
    "changed": Options(changed=True),
    "everything": Options(needs=True, selected=True, changed=True),
    "tapped": Options(tapped=True),
    "unnormalised": Options(normalised=False),
    "unnormalised tapped": Options(normalised=False, tapped=True),
    "mixed": Options(mixed=True),
    "hf": Options(numerics="hf"),
    "hf tapped": Options(numerics="hf", tapped=True),
    "hf everything": Options(needs=True, selected=True, changed=True, numerics="hf"),
    "hf mixed": Options(needs=True, selected=True, changed=True, numerics="hf", mixed=True),
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel, as the compiler takes it."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that 16 divides
    warps: int
    stages: int

    @property
    def kernel(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.name)

    def source(self) -> ASTSource:
        attributes = {(index,): [["tt.divisibility", 16]] for index in self.aligned}
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)

    def key(self, arch: str) -> str:
        """A digest of all that the compiler sees and of which compiler it is: the same key, the same result."""
        seen = (
            code(self.kernel), self.signature, sorted((name, str(value)) for name, value in self.constants),
            self.aligned, self.warps, self.stages, arch, triton.__version__,
        )  # fmt: skip
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


@functools.cache
def code(kernel: JITFunction) -> str:
    """A digest of a kernel and of all that it calls, without comments and docstrings."""
    digest, waiting, known = hashlib.sha256(), [kernel], {kernel}
    while waiting:
        function = waiting.pop()
        tree = ast.parse(function.src)
        body = tree.body[0].body  # type: ignore[attr-defined]
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
        digest.update(ast.dump(tree).encode())
        used = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
        named = {name: function.fn.__globals__[name] for name in used if name in function.fn.__globals__}
        for name, value in named.items():
            if isinstance(value, triton.language.constexpr):
                digest.update(f"{name}={value}".encode())
            if isinstance(value, JITFunction) and value not in known:
                known.add(value)
                waiting.append(value)
    return digest.hexdigest()


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
    path: str, n_tokens: int, dtype: torch.dtype, bits: int, group: int, blocks: dict[str, Any],
    options: Options = OPTIONS["plain"],
) -> list[Launch]:  # fmt: skip
    """The launches of one layer at the real shape."""
    d, f, e, k = SHAPE.values()
    with recording() as found, torch.device("meta"):
        x = torch.empty(n_tokens, d, dtype=dtype)
        router = torch.empty(e, d, dtype=torch.float32 if options.mixed else dtype)
        gate_up = _weight((e, 2 * f, d), dtype, bits, group)
        down = _weight((e, d, f), dtype, bits, 64)  # 128 does not divide d_expert
        narrow = options.numerics == "hf" and not options.mixed  # transformers' weights have its router's dtype
        change = _changes(n_tokens, dtype if narrow else torch.float32) if options.changed else Intervene()
        masks = [torch.empty(size, dtype=torch.bool) for size in (e, n_tokens)] if options.selected else ()
        need = Need(NEEDS, *masks) if options.needs else Need()
        layer = plan_layer(
            x, router, gate_up, down, k, options.normalised, need, change, path, options.numerics, blocks
        )
        taps = dict.fromkeys(TAPS, lambda tensor: tensor) if options.tapped else {}
        routed, tiles = stages.order(layer, stages.route(layer, taps))
        stages.experts(layer, routed, tiles, taps)
    return list(found)


def _weight(shape: tuple[int, int, int], dtype: torch.dtype, bits: int, group: int) -> torch.Tensor | QuantizedExperts:
    if bits == 16:
        return torch.empty(shape, dtype=dtype)
    e, o, i = shape
    group = i if bits == 8 else group
    values = torch.empty(e, o, i * bits // 8, dtype=torch.int8)
    scales = torch.empty(e, i // group, o, dtype=torch.float32 if bits == 8 else torch.bfloat16)
    return QuantizedExperts(values, scales, bits, group, shape, dtype)


def _changes(n_tokens: int, weights: torch.dtype) -> Intervene:
    d, _, e, k = SHAPE.values()
    return Intervene(
        router_bias=torch.empty(n_tokens, e),
        keep_mask=torch.empty(e, dtype=torch.bool),
        expert_scale=torch.empty(e),
        expert_add=torch.empty(e, d),
        forced_ids=torch.empty(n_tokens, k, dtype=torch.int64),
        forced_weights=torch.empty(n_tokens, k, dtype=weights),
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
    module, name = kernel.fn.__module__, kernel.fn.__name__
    return Launch(module, name, tuple(signature), tuple(constants), tuple(aligned), warps, stages)


def _kind(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
