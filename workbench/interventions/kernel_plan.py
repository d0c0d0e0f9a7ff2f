"""Which interventions of a layer its kernels do by themselves, settled in every pass: it depends on who listens.

A hook sees what the interventions leave. Before its taps a kernel has done nothing to logits, ids and weights, and
everything to outputs; so it takes the last edits of the former and the first of the latter, and none that a listener
would have to see. What scales a weight scales the output there, which shows at neither point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.hooks import HookPoint
from workbench.interventions.lowered import PLANNED, Lowered
from workbench_kernels.moe.plan import Intervene

_READ_IDS = ("routing_weights", "expert_out")  # their edits ask which slot holds which expert
_PER_TOKEN = ("router_bias", "keep_mask")  # arguments that may differ from token to token


class LayerPlan:
    """The edits of one layer's routing and experts, in the order in which they act."""

    def __init__(self, mlp: Any, edits: Sequence[Lowered]) -> None:
        self.edits, self.points = edits, _points(mlp)
        weight = mlp.router.weight
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self.router = weight.dtype if mlp.router_dtype == "model" else self.dtype  # what weights are rounded to
        self.rounds = mlp.router_dtype == "model" and weight.dtype != self.dtype
        self._kept: dict[Any, dict[str, Tensor]] = {}
        self._constants: dict[Lowered, dict[str, Tensor]] = {}  # an edit's own arguments, on the device

    @staticmethod
    def clear(mlp: Any) -> None:
        mlp.plan = None
        for point in _points(mlp).values():
            point.fwd_hooks[:] = _others(point)

    def settle(self, batch_pos: torch.Size) -> Intervene:
        """What the kernels are to do in this pass; what they are not is put in place as hooks."""
        inside = self._inside()
        outside = [edit for edit in self.edits if edit not in inside]
        readers = [edit for edit in outside if edit.leaf in _READ_IDS]
        for leaf, point in self.points.items():
            last = [_Ids(readers)] if leaf == "expert_ids" and readers else []
            point.fwd_hooks[:] = [*(edit for edit in outside if edit.leaf == leaf), *_others(point), *last]
        for edit in inside:
            edit.ran.add("kernel")
        return Intervene(**self._arguments(inside, batch_pos)) if inside else Intervene()

    def _inside(self) -> list[Lowered]:
        at = {leaf: [edit for edit in self.edits if edit.leaf == leaf] for leaf in PLANNED}
        for edit in self.edits:
            edit.why = self._obstacle(edit)
        outputs = _unbroken(at["expert_out"], "")
        blocked = self._listener("router_logits", "router_probs") or _beside(at["router_probs"])
        logits = _unbroken(at["router_logits"][::-1], blocked)[::-1]
        blocked = self._listener(*_READ_IDS) or _beside(at["expert_out"][len(outputs) :])
        weights = _unbroken(at["routing_weights"][::-1], blocked)[::-1]
        # given experts come with their weights, which nothing else may choose or replace
        alone = len(at["expert_ids"]) == 1 and weights == at["routing_weights"] and _given(weights) == weights[:1]
        blocked = self._listener("expert_ids") or ("" if alone else "experts or weights are changed by hooks besides")
        ids = _unbroken(at["expert_ids"], blocked)
        if not ids:
            for edit in _given(weights):
                edit.why = edit.why or blocked
                weights = weights[weights.index(edit) + 1 :]
        return [*logits, *ids, *outputs, *weights]

    def _obstacle(self, edit: Lowered) -> str:
        """What in the edit itself keeps it out of the kernels."""
        if not edit.arguments:
            return "the kernels have no argument for it"
        if not edit.everywhere and not set(edit.arguments) <= set(_PER_TOKEN):
            return "limited to some tokens"
        return "the router rounds its logits" if self.rounds and "router_bias" in edit.arguments else ""

    def _listener(self, *leaves: str) -> str:
        heard = [leaf for leaf in leaves if _heard(self.points[leaf])]
        return f"a hook listens at {heard[0]}" if heard else ""

    def _arguments(self, inside: Sequence[Lowered], batch_pos: torch.Size) -> dict[str, Tensor]:
        """In buffers that stay where they are from pass to pass of a shape; what depends on tokens is written anew."""
        moves = not all(edit.everywhere for edit in inside)
        per_shape = moves or any("forced_ids" in edit.arguments for edit in inside)
        key = (tuple(map(id, inside)), batch_pos if per_shape else None)
        if key in self._kept and not moves:
            return self._kept[key]
        with torch.inference_mode(False), torch.no_grad():
            found = self._composed(inside, batch_pos)
            if key in self._kept:
                for name, buffer in self._kept[key].items():
                    buffer.copy_(found[name])
            else:
                self._kept = {**dict(list(self._kept.items())[-3:]), key: found}  # of a few shapes, not of all ever met
        return self._kept[key]

    def _composed(self, inside: Sequence[Lowered], batch_pos: torch.Size) -> dict[str, Tensor]:
        """One tensor for each argument, of all edits in their order; [token expert] where tokens differ.

        Nothing comes from the host but in an edit's first pass: a graph could not capture it.
        """
        found: dict[str, Tensor] = {}
        for edit in inside:
            own = self._own(edit)
            for name, value in own.items():
                if name in _PER_TOKEN and not edit.everywhere:
                    elsewhere = ~edit.applies(batch_pos, self.device).flatten()[:, None]  # [token 1]
                    value = value.expand(batch_pos.numel(), -1).masked_fill(elsewhere, name == "keep_mask")
                if name == "router_bias":
                    found[name] = found.get(name, 0) + value
                elif name == "keep_mask":
                    found[name] = found.get(name, True) & value
                elif name.startswith("forced"):
                    found[name] = value.expand(batch_pos.numel(), -1)
            if "expert_scale" in own:
                _then(found, own)
        dtypes = {"forced_weights": self.router}
        floats = {n: value.to(dtypes.get(n, self.dtype)) for n, value in found.items() if value.is_floating_point()}
        return {name: value.contiguous() for name, value in (found | floats).items()}

    def _own(self, edit: Lowered) -> dict[str, Tensor]:
        if edit not in self._constants:
            self._constants[edit] = {
                name: value.to(self.device, torch.float64 if value.is_floating_point() else value.dtype)
                for name, value in edit.arguments.items()
            }
        return self._constants[edit]


class _Ids:
    """Listens last at a layer's expert ids and hands them to the edits that ask which slot holds which expert."""

    only_looks = True

    def __init__(self, readers: Sequence[Lowered]) -> None:
        self.readers = readers

    def __call__(self, ids: Tensor, hook: HookPoint) -> None:
        for reader in self.readers:
            reader.ids = ids


def _unbroken(edits: Iterable[Lowered], blocked: str) -> list[Lowered]:
    """The first edits that nothing keeps out; after one that stays a hook so do all."""
    found = []
    for edit in edits:
        edit.why = edit.why or blocked
        blocked = blocked or _beside([edit] if edit.why else [])
        if not edit.why:
            found.append(edit)
    return found


def _beside(edits: Sequence[Lowered]) -> str:
    return f"{edits[0].item.kind} beside it is a hook" if edits else ""


def _given(weights: Sequence[Lowered]) -> list[Lowered]:
    return [edit for edit in weights if "forced_weights" in edit.arguments]


def _points(mlp: Any) -> dict[str, HookPoint]:
    return {leaf: getattr(mlp, f"hook_{leaf}") for leaf in PLANNED}


def is_intervention(fn: Any) -> bool:
    """Whether what listens at a hook point was put there by an intervention."""
    return isinstance(fn, Lowered | _Ids)


def _others(point: HookPoint) -> list[Any]:
    return [fn for fn in point.fwd_hooks if not is_intervention(fn)]


def _heard(point: HookPoint) -> bool:
    """Whether anybody else listens; a watcher may want to look while the model runs already."""
    own = point.fwd_hooks[:]
    point.fwd_hooks[:] = _others(point)
    heard = point.listened or bool(point.watchers)
    point.fwd_hooks[:] = own
    return heard


def _then(found: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """scale · output + add, after what was found so far. Given weights are left: they are no output."""
    scale, add = own["expert_scale"], own.get("expert_add")
    found["expert_scale"] = found["expert_scale"] * scale if "expert_scale" in found else scale
    added = [] if add is None else [add]
    if "expert_add" in found:
        added.insert(0, found["expert_add"] * scale[:, None])
    if added:
        found["expert_add"] = added[0] if len(added) == 1 else added[0] + added[1]
