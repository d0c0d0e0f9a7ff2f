"""Triton's CPU interpreter, made to compute what the GPU computes, and made hostile for tests.

`TRITON_INTERPRET=1` runs kernels on CPU tensors, but the stock interpreter (measured on triton 3.6.0 to 3.9.0) is
silently wrong in bfloat16: `tl.dot` and arithmetic work on the raw bit patterns, casts truncate or reinterpret bits.
`correct()` mends that; it is called wherever kernels are about to run interpreted.

The interpreter still accepts what a compiler refuses, so every kernel must also pass the ahead-of-time compile check.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_order: np.random.Generator | None = None  # of the programs, while `shuffle_programs` is active
_corrected = False


def correct() -> None:
    """Correct the interpreter of the installed triton, once; without effect on compiled kernels."""
    global _corrected
    if _corrected:
        return
    from triton.runtime import interpreter

    _correct_casts(interpreter)
    _correct_arithmetic(interpreter)
    _correct_loop_bounds(interpreter)
    _patch_once(interpreter)
    interpreter.range = _program_range  # the grid loops read this name before the builtin
    _corrected = True


@contextmanager
def shuffle_programs(seed: int) -> Iterator[None]:
    """Run the programs of every launch in a random order: a result that changes depends on order (atomics, races)."""
    global _order
    _order = np.random.default_rng(seed)
    try:
        yield
    finally:
        _order = None


@contextmanager
def poison_buffers() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, or a huge negative integer: reading before writing shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min // 2 + 12345)

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, to nearest even as the hardware rounds; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _correct_casts(interpreter: Any) -> None:
    import triton.language as tl

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    stock_cast, stock_float = builder.cast_impl, interpreter._convert_float

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(narrow(np.asarray(src.data).astype(np.float32)).reshape(np.shape(src.data)), target)
        if source == tl.bfloat16 and target != tl.bfloat16:
            return handle(widen(src.data).astype(interpreter._get_np_dtype(target)), target)
        return stock_cast(self, src, dst_type)

    def convert_float(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return widen(data).view(np.uint32).reshape(data.shape)
        if source == tl.float32 and target == tl.bfloat16 and mode != interpreter._ir.ROUNDING_MODE.RTZ:
            return narrow(data).reshape(data.shape)
        return stock_float(data, source, target, mode)

    builder.cast_impl, interpreter._convert_float = cast, convert_float


def _correct_arithmetic(interpreter: Any) -> None:
    import triton.language as tl

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    stock_dot, stock_binary = builder.create_dot, builder.binary_op
    comparisons = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}

    def dot(self: Any, a: Any, b: Any, acc: Any, *args: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return stock_dot(self, a, b, acc, *args)
        product = np.matmul(widen(a.data), widen(b.data))
        return handle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16 or rhs.dtype.scalar != tl.bfloat16:
            return stock_binary(self, lhs, rhs, op)
        left, right = widen(lhs.data), widen(rhs.data)
        if op in comparisons:
            return stock_binary(self, handle(left, tl.float32), handle(right, tl.float32), op)
        return handle(narrow(op(left, right)), tl.bfloat16)

    builder.create_dot, builder.binary_op = dot, binary


def _correct_loop_bounds(interpreter: Any) -> None:
    """`for i in range(tensor)` fails in triton 3.6.0 with numpy 2.4 and newer."""
    stock = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch


def _patch_once(interpreter: Any) -> None:
    """Patch `triton.language` at the first call and leave it so.

    The stock interpreter does it again in every call of a jit function, also of one by another, which is most of the
    time that small blocks take.
    """
    stock, done = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            """Nothing was patched for one call alone."""

    def patch(fn: Any) -> Kept:
        if id(fn.__globals__) not in done:  # of a module, so it stays alive
            stock(fn)
            done.add(id(fn.__globals__))
        return Kept()

    interpreter._patch_lang = patch


def _program_range(*args: int) -> Any:
    """`range`, except that the loops over the grid run in a random order while `shuffle_programs` is active."""
    natural = builtins.range(*args)
    if _order is None or len(args) != 1 or sys._getframe(1).f_code.co_name != "__call__":
        return natural
    return [int(i) for i in _order.permutation(len(natural))]
