"""Hook points, and the model base that runs with hooks.

A hook point is a named identity inside a model.  `fn(tensor, hook)` sees the tensor there; what it returns, unless
None, takes its place downstream.  A point that nobody listens to passes its tensor through and does nothing else.
Call shapes and names are TransformerLens'; the classes are ours, so that importing the workbench pulls in nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.activations import ActivationCache, unknown_name
from workbench.errors import HookError

HookFn = Callable[..., "Tensor | None"]  # called as fn(tensor, hook=point)
NameFilter = str | Sequence[str] | Callable[[str], bool]


class HookPoint(nn.Module):
    """A named identity. `shape` and `dtype` document the tensor, `cost` what listening adds to a forward pass.

    dtype is "model", "wide" (the model's, but float32 at least), or the name of a dtype that is always the same.
    A point with a cost is lazy: its tensor is only computed while somebody listens, and a cache that was not asked
    for it by name or predicate leaves it out.  `read_only` points report a derived quantity: replacing it would act
    on nothing, so a hook that returns a value there raises a HookError, and so does one that edits in place (but not
    under torch.inference_mode(), where tensors do not count their edits).
    """

    def __init__(self, shape: str, dtype: str = "model", cost: str = "", read_only: bool = False) -> None:
        super().__init__()
        self.name = ""
        self.shape, self.dtype, self.cost, self.read_only = shape, dtype, cost, read_only
        self.fwd_hooks: list[HookFn] = []
        self.bwd_hooks: list[HookFn] = []
        # asked at each pass, for frameworks that wrap `forward` and decide while the model runs whether to look
        self.watchers: list[Callable[[], bool]] = []
        # together, since an idle point is asked at every pass
        torch_hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        self._listeners = (self.fwd_hooks, self.bwd_hooks, *torch_hooks)
        self._foreign = (*torch_hooks, self.watchers)
        self._asked = (*self._listeners, self.watchers)

    @property
    def may_change(self) -> bool:
        """Whether a listener could replace or edit the tensor; functions marked by `only_looks` never do."""
        if not any(self._foreign) and not self.bwd_hooks:
            return not all(getattr(fn, "only_looks", False) for fn in self.fwd_hooks)
        return self.listened

    @property
    def listened(self) -> bool:
        """Whether anything listens here: our hooks, torch's own, or a watcher that wants this pass."""
        if not any(self._asked):
            return False
        return any(self._listeners) or any(wants() for wants in self.watchers)

    def layer(self) -> int:
        """The layer in this point's name. Raises HookError at points outside the blocks."""
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise HookError(f"layer of {self.name}: expected a point inside a block, got one outside. Use hook.name.")
        return int(parts[1])

    def add_hook(self, fn: HookFn, dir: str = "fwd") -> None:
        """Listen here until `remove_hooks`; prefer the `hooks` context, which cleans up after itself."""
        if dir not in ("fwd", "bwd"):
            raise HookError(f"dir: expected fwd or bwd, got {dir!r}. Pass one of them.")
        _check_callable(fn)
        (self.fwd_hooks if dir == "fwd" else self.bwd_hooks).append(fn)

    def remove_hooks(self, dir: str = "both") -> None:
        if dir not in ("fwd", "bwd", "both"):
            raise HookError(f"dir: expected fwd, bwd or both, got {dir!r}. Pass one of them.")
        if dir != "bwd":
            self.fwd_hooks.clear()
        if dir != "fwd":
            self.bwd_hooks.clear()

    def __call__(self, x: Tensor) -> Tensor:
        if not any(self._asked):
            return x  # an idle point skips nn.Module's call machinery, and so does one with hooks of ours alone
        if not any(self._foreign):
            return self.forward(x)
        return super().__call__(x) if self.listened else x

    def forward(self, x: Tensor) -> Tensor:
        version = x._version if self.read_only and not x.is_inference() else 0
        for fn in tuple(self.fwd_hooks):  # a hook may remove itself
            x = self._checked(x, fn(x, hook=self))
        if self.read_only and not x.is_inference() and x._version != version:
            raise HookError(f"hook at {self.name}: expected no change (this point is read-only), got an edit in place.")
        if self.bwd_hooks:
            x = self._watch_gradient(x)
        return x

    def _checked(self, x: Tensor, new: Tensor | None) -> Tensor:
        if new is None or new is x:
            return x
        if self.read_only:
            raise HookError(f"hook at {self.name}: expected None (this point is read-only), got a tensor. Return None.")
        if not isinstance(new, Tensor) or _kind(new) != _kind(x):
            got = _shown(new) if isinstance(new, Tensor) else type(new).__name__
            raise HookError(
                f"hook at {self.name}: expected None or a tensor {_shown(x)}, got {got}. "
                "Return the same shape and dtype, dense and on the same device, for instance with .to(x)."
            )
        return new

    def _watch_gradient(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            raise HookError(
                f"backward hook at {self.name}: expected a tensor with a gradient, got {x.dtype} without one. "
                "Run with gradients enabled, at a point that the loss depends on."
            )

        listeners = tuple(self.bwd_hooks)  # backward runs later, when the `hooks` block may have ended

        def on_gradient(grad: Tensor) -> Tensor:
            for fn in listeners:
                grad = self._checked(grad, fn(grad, hook=self))
            return grad

        # a view of its own, so that two points sharing one tensor each see their own gradient
        x = x.view_as(x)
        x.register_hook(on_gradient)
        return x


def _kind(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.dtype, x.device, x.layout


def _shown(x: Tensor) -> str:
    layout = "" if x.layout == torch.strided else f" {x.layout}"
    return f"{tuple(x.shape)} {x.dtype} on {x.device}{layout}"


def only_looks(fn: HookFn) -> HookFn:
    """Mark a hook that neither edits nor replaces what it sees, so that nothing has to be checked after it."""
    fn.only_looks = True  # type: ignore[attr-defined]
    return fn


class HookRow(NamedTuple):
    """One row of `hook_table`: a hook point's name, the axes of its tensor, its dtype, what listening costs."""

    name: str
    shape: str
    dtype: str
    cost: str


def as_device(device: torch.device | str) -> torch.device:
    """The device by its name. Raises HookError when this machine does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch asserts when it was built without the backend
        reason = str(error).splitlines()[0].rstrip(".")
        raise HookError(f"device: expected one this machine has, got {device!r} ({reason}). Use 'cpu'.") from None


def _checked_pair(pair: tuple[NameFilter, HookFn]) -> tuple[NameFilter, HookFn]:
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
        raise HookError(f"hooks: expected pairs of a name and a function, got {pair!r}. Write [(name, function)].")
    return pair[0], pair[1]


def _check_callable(fn: HookFn) -> None:
    """Raises HookError for a function that cannot be called as fn(tensor, hook=point), before a model runs."""
    try:
        inspect.signature(fn).bind(None, hook=None)
    except TypeError as error:
        raise HookError(
            f"hook function: expected one to be called as fn(tensor, hook=point), got {fn!r} ({error}). "
            "Write def fn(tensor, hook)."
        ) from None
    except ValueError:  # built in, and says nothing about its arguments
        return


class HookedModel(nn.Module):
    """Base of the models: finds hook points by name and runs with hooks, or with a cache, attached."""

    def name_hook_points(self) -> None:
        """Give every hook point its name; called once, after the model is built."""
        self.mod_dict: dict[str, nn.Module] = {name: module for name, module in self.named_modules() if name}
        self.hook_dict: dict[str, HookPoint] = {}
        for name, module in self.mod_dict.items():
            if isinstance(module, HookPoint):
                module.name = name
                self.hook_dict[name] = module
            owner, _, leaf = name.rpartition(".")
            # found at once, where nn.Module looks for submodules only after everything else
            self.get_submodule(owner).__dict__[leaf] = module

    def hook_table(self) -> list[HookRow]:
        """All hook points in order of execution within each module; `pl.DataFrame(model.hook_table())` is a table."""
        dtype = next(self.parameters()).dtype
        actual = {"model": dtype, "wide": torch.promote_types(dtype, torch.float32)}
        return [
            HookRow(
                name,
                point.shape,
                str(actual.get(point.dtype, point.dtype)).removeprefix("torch."),
                point.cost or "none",
            )
            for name, point in self.hook_dict.items()
        ]

    def select_hooks(self, names: NameFilter) -> list[HookPoint]:
        """The hook points of a name, a list of names or a predicate on names. Raises HookError if one is unknown."""
        if callable(names):
            chosen = [name for name in self.hook_dict if names(name)]
            if not chosen:
                raise HookError("hook names: expected a predicate that accepts some, got one that accepts none.")
        else:
            if not isinstance(names, str | list | tuple | set | frozenset):
                raise HookError(f"hook names: expected a name, a list of names or a predicate, got {names!r}.")
            chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:
            if name not in self.hook_dict:
                raise HookError(unknown_name(name, self.hook_dict))
        return [self.hook_dict[name] for name in chosen]

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[tuple[NameFilter, HookFn]] = (),
        bwd_hooks: Iterable[tuple[NameFilter, HookFn]] = (),
    ) -> Iterator[HookedModel]:
        """Listen inside the `with` block: fwd_hooks see activations, bwd_hooks gradients. Nothing stays attached."""
        with self._attached(self._resolved(fwd_hooks, bwd_hooks)):
            yield self

    def reach(self, **kwargs: Any) -> Callable[[str], bool]:
        """Which hook points `model(tokens, **kwargs)` gets to, by name; a model that can run in part says more."""
        return lambda name: True

    def _resolved(
        self,
        fwd_hooks: Iterable[tuple[NameFilter, HookFn]],
        bwd_hooks: Iterable[tuple[NameFilter, HookFn]],
        **kwargs: Any,
    ) -> list[tuple[HookPoint, str, HookFn]]:
        """Each point, direction and function that is meant, all checked; a point given by name must be in the pass."""
        given = (("fwd_hooks", fwd_hooks), ("bwd_hooks", bwd_hooks))
        for direction, pairs in given:
            if not isinstance(pairs, Iterable) or isinstance(pairs, str):
                raise HookError(f"{direction}: expected a list of (name, function), got {pairs!r}.")
        reached, wanted = self.reach(**kwargs), []
        for direction, pairs in given:
            for names, fn in map(_checked_pair, pairs):
                points = self.select_hooks(names)
                missed = [] if callable(names) else [p.name for p in points if not reached(p.name)]
                if missed:
                    raise HookError(
                        f"hook at {missed[0]}: expected a point between start_at_layer and stop_at_layer, got one that "
                        "this pass does not reach. Run more layers, or name points of these."
                    )
                wanted += [(point, direction, fn) for point in points]
        for fn in {id(fn): fn for _, _, fn in wanted}.values():
            _check_callable(fn)
        return wanted

    @contextmanager
    def _attached(self, wanted: list[tuple[HookPoint, str, HookFn]]) -> Iterator[None]:
        try:
            for point, direction, fn in wanted:
                getattr(point, direction).append(fn)
            yield
        finally:
            for point, direction, fn in wanted:
                listeners = getattr(point, direction)
                if fn in listeners:  # a hook may have removed itself
                    listeners.remove(fn)

    def reset_hooks(self) -> None:
        """Remove every hook that was attached with `add_hook`."""
        for point in self.hook_dict.values():
            point.remove_hooks()

    def run_with_hooks(
        self,
        tokens: Tensor,
        *,
        fwd_hooks: Iterable[tuple[NameFilter, HookFn]] = (),
        bwd_hooks: Iterable[tuple[NameFilter, HookFn]] = (),
        **kwargs: Any,
    ) -> Tensor:
        """`model(tokens, **kwargs)` with hooks attached for this one call.

        Backward hooks fire in `backward`, after this call has returned: they stay attached to the graph of this call.
        Raises HookError for a point given by name that start_at_layer or stop_at_layer leave out; a predicate may
        accept such points too.
        """
        with self._attached(self._resolved(fwd_hooks, bwd_hooks, **kwargs)):
            return self(tokens, **kwargs)

    def run_with_cache(
        self,
        tokens: Tensor,
        names_filter: NameFilter | None = None,
        *,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """Run and keep activations, detached, moved to `device` if given.

        Without a filter every point that costs nothing to read is kept; points with a cost (attention scores,
        per-expert tensors) are kept when a name or predicate asks for them. `stop_at_layer` ends the run early; raises
        HookError for a name that it leaves out. An `attention_mask` goes by name.
        """
        cache = ActivationCache()
        target = None if device is None else as_device(device)
        # One storage may pass several points (resid_post of a layer is resid_pre of the next): where another hook could
        # edit it in place later, what was seen here has to be copied.
        shared = any(point.listened for point in self.hook_dict.values())

        def keep(x: Tensor, hook: HookPoint) -> None:
            x = x.detach() if target is None else x.detach().to(target)
            cache[hook.name] = x.clone() if shared else x

        wanted = names_filter if names_filter is not None else lambda name: not self.hook_dict[name].cost
        return self.run_with_hooks(tokens, fwd_hooks=[(wanted, keep)], **kwargs), cache
