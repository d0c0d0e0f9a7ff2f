"""An ordered list of interventions, and how it is attached to a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError
from workbench.hooks import HookPoint
from workbench.interventions.base import Edit, Intervention, Site
from workbench.interventions.order import check_order
from workbench.interventions.where import Batch, Label, Where


@dataclass(frozen=True, eq=False)
class Interventions:
    """Interventions in the order in which they act, and what is known of the sequences they meet.

    label: token ids of a sequence -> the segment of each; needed to limit by segment. langs: the language of each row;
    needed to limit by language. n_prompt: how many tokens of each row are prompt; by default all of the first pass.
    Only the items are stored in files.
    """

    items: Sequence[Intervention]
    label: Label | None = None
    langs: Sequence[str] | None = None
    n_prompt: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.items, Intervention):
            object.__setattr__(self, "items", (self.items,))
        if not isinstance(self.items, Sequence):
            raise InterventionError(f"interventions: expected a list of them, got {type(self.items).__name__}.")
        for item in self.items:
            if not isinstance(item, Intervention):
                raise InterventionError(f"interventions: expected values such as KnockOut(...), got {item!r}.")
        object.__setattr__(self, "items", tuple(self.items))

    def check(self, model: Any) -> None:
        """Raises InterventionError unless every item fits the model and can act beside those attached already."""
        outer = [item for batch in model.batches for item in batch.items]
        check_order([*outer, *self.items], model)

    @contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        """Act on every pass inside the block, those of an outer block first; hooks of any kind see the outcome.

        Nothing stays attached: outside the block the model computes what it did before, bit for bit.
        """
        if not self.items:
            yield
            return
        self.check(model)
        batch = Batch(self.label, self.langs, self.n_prompt)
        batch.items = self.items
        lowered = _lower(self.items, batch, model)
        recorders = [_Recorder(point, fns) for point, fns in _needs_ids(lowered, model)]
        model.batches.append(batch)
        try:
            for point, fn in lowered:
                n_before = sum(isinstance(other, _Lowered) for other in point.fwd_hooks)
                point.fwd_hooks.insert(n_before, fn)
            for recorder in recorders:
                recorder.point.fwd_hooks.append(recorder)
            yield
        finally:
            model.batches.remove(batch)
            ours = {id(fn) for fn in (*(fn for _, fn in lowered), *recorders)}
            for point in (*(point for point, _ in lowered), *(recorder.point for recorder in recorders)):
                point.fwd_hooks[:] = [other for other in point.fwd_hooks if id(other) not in ours]


def as_interventions(given: Interventions | Intervention | Sequence[Intervention]) -> Interventions:
    return given if isinstance(given, Interventions) else Interventions(given)  # type: ignore[arg-type]


class _Lowered:
    """One edit of one hook point, kept to where it applies."""

    def __init__(self, edit: Edit, where: Where, batch: Batch) -> None:
        self.edit, self.where, self.batch = edit, where, batch
        self.ids: Tensor | None = None  # [batch pos k] of this layer and pass

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor | None:
        mask = self.batch.mask(self.where)
        new = self.edit(x, Site(self.batch, self.ids))
        if mask is None:
            return new.to(x.dtype)
        return torch.where(mask.view(*mask.shape, *[1] * (x.ndim - 2)), new.to(x.dtype), x)


class _Recorder:
    """Listens last at a layer's expert ids and hands them to the edits that ask which slot holds which expert."""

    def __init__(self, point: HookPoint, readers: Sequence[_Lowered]) -> None:
        self.point, self.readers = point, readers

    def __call__(self, ids: Tensor, hook: HookPoint) -> None:
        for reader in self.readers:
            reader.ids = ids


def _lower(items: Sequence[Intervention], batch: Batch, model: Any) -> list[tuple[HookPoint, _Lowered]]:
    return [
        (model.hook_dict[name], _Lowered(edit, item.where, batch)) for item in items for name, edit in item.edits(model)
    ]


def _needs_ids(lowered: Sequence[tuple[HookPoint, _Lowered]], model: Any) -> Iterator[tuple[HookPoint, list[_Lowered]]]:
    """The id points of the layers whose weights or outputs are edited."""
    readers: dict[HookPoint, list[_Lowered]] = {}
    for point, fn in lowered:
        prefix, _, leaf = point.name.rpartition(".hook_")
        if leaf in ("routing_weights", "expert_out"):
            readers.setdefault(model.hook_dict[f"{prefix}.hook_expert_ids"], []).append(fn)
    yield from readers.items()
