"""What a captured graph does, played on any device: the operations of one step, run again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Notes every operation of a step with the tensors it touched; `replay` repeats them, without any Python between.

    As with a CUDA graph, whatever Python computed, compared or read from a tensor stays as it was while noting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _place(old) != _place(new):  # neither a view nor written in place
                    old.copy_(new)

    def shapes(self) -> list[tuple[str, list[tuple[int, ...]]]]:
        """Which operations, on which shapes."""
        return [
            (str(func), [tuple(x.shape) for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)])
            for func, args, kwargs, out in self.calls
        ]


def taped(step: Callable[[], None]) -> Callable[[], object]:
    """In place of `workbench.models.fixed.capture`; noting runs the step, which is the first replay then."""
    with Tape() as tape:
        step()
    noted = [True]

    def replay() -> None:
        if noted:
            noted.clear()
        else:
            tape.replay()

    return replay


class OnDevice(TorchDispatchMode):
    """Raises when an operation touches a tensor of the host, which in a captured step nothing may."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                raise AssertionError(f"{func}: expected tensors on the device alone, got {tensor.shape} on the host")
        return out


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
