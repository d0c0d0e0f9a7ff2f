"""How interventions come to act: as edits of hook points, each kept to the tokens and the row where it applies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.hooks import HookPoint
from workbench.interventions.base import Edit, Site
from workbench.interventions.order import check_order
from workbench.interventions.where import Batch, Where


@contextmanager
def attached(model: Any, batches: Sequence[Batch]) -> Iterator[None]:
    """The items of these batches act inside the block, after those of an outer one and before any hook looks."""
    lowered = [pair for batch in batches for pair in _lower(batch, model)]
    recorders = [_Recorder(point, fns) for point, fns in _needs_ids(lowered, model)]
    model.batches.extend(batches)
    try:
        for point, fn in lowered:
            n_before = sum(isinstance(other, _Lowered) for other in point.fwd_hooks)
            point.fwd_hooks.insert(n_before, fn)
        for recorder in recorders:
            recorder.point.fwd_hooks.append(recorder)
        yield
    finally:
        for batch in batches:
            model.batches.remove(batch)
        ours = {id(fn) for fn in (*(fn for _, fn in lowered), *recorders)}
        for point in (*(point for point, _ in lowered), *(recorder.point for recorder in recorders)):
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if id(other) not in ours]


def check_together(batches: Sequence[Batch], model: Any) -> None:
    """Raises InterventionError unless every item fits the model and can act beside those that meet the same row."""
    together = [*model.batches, *batches]
    rows = dict.fromkeys(None if batch.row is None else batch.row[0] for batch in together)
    for row in rows:
        met = [batch.items for batch in together if batch.row is None or batch.row[0] == row]
        check_order([item for items in met for item in items], model)


class _Lowered:
    """One edit of one hook point, kept to where it applies."""

    def __init__(self, edit: Edit, where: Where, batch: Batch) -> None:
        self.edit, self.where, self.batch = edit, where, batch
        self.ids: Tensor | None = None  # [batch pos k] of this layer and pass

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor | None:
        if self.batch.row is None:
            return self._changed(x)
        number = self.batch.row[0]
        return torch.cat((x[:number], self._changed(self.batch.own(x)), x[number + 1 :]))

    def _changed(self, x: Tensor) -> Tensor:
        mask = self.batch.mask(self.where)
        ids = None if self.ids is None else self.batch.own(self.ids)
        new = self.edit(x, Site(self.batch, ids))
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


def _lower(batch: Batch, model: Any) -> list[tuple[HookPoint, _Lowered]]:
    return [
        (model.hook_dict[name], _Lowered(edit, item.where, batch))
        for item in batch.items
        for name, edit in item.edits(model)
    ]


def _needs_ids(lowered: Sequence[tuple[HookPoint, _Lowered]], model: Any) -> Iterator[tuple[HookPoint, list[_Lowered]]]:
    """The id points of the layers whose weights or outputs are edited."""
    readers: dict[HookPoint, list[_Lowered]] = {}
    for point, fn in lowered:
        prefix, _, leaf = point.name.rpartition(".hook_")
        if leaf in ("routing_weights", "expert_out"):
            readers.setdefault(model.hook_dict[f"{prefix}.hook_expert_ids"], []).append(fn)
    yield from readers.items()
