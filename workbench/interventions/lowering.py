"""How interventions come to act: as arguments of a layer's kernels where those have one, else as edits of hook points.

Which of the two is settled by each layer in every pass (see `kernel_plan`) and said by `intervention_table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from workbench.interventions.base import Intervention
from workbench.interventions.kernel_plan import LayerPlan
from workbench.interventions.lowered import Lowered
from workbench.interventions.order import check_order
from workbench.interventions.where import Batch


class InterventionRow(NamedTuple):
    """One intervention that is attached, with the leaves and layers it edits.

    row: of the batch, under PerRow. ran: "kernel" or "hook", both where passes or layers differed, "" before any pass.
    why: what made it a hook the last time.
    """

    kind: str
    row: int | None
    points: tuple[str, ...]
    layers: tuple[int, ...]
    ran: str
    why: str


@contextmanager
def attached(model: Any, batches: Sequence[Batch]) -> Iterator[None]:
    """The items of these batches act inside the block, after those of an outer one and before any hook looks."""
    for batch in batches:
        batch.edits = [
            Lowered(item, edit, model.hook_dict[name], batch, model)
            for item in batch.items
            for name, edit in item.edits(model)
        ]
    try:
        _place(model, [*model.batches, *batches])
        yield
    finally:
        _place(model, [batch for batch in model.batches if batch not in batches])


def check_together(batches: Sequence[Batch], model: Any) -> None:
    """Raises InterventionError unless every item fits the model and can act beside those that meet the same row."""
    together = [*model.batches, *batches]
    for row in dict.fromkeys(None if batch.row is None else batch.row[0] for batch in together):
        met = [batch.items for batch in together if batch.row is None or batch.row[0] == row]
        check_order([item for items in met for item in items], model)


def intervention_table(model: Any) -> list[InterventionRow]:
    """One row for each intervention that is attached, in the order in which they act."""
    return [_row(batch, item) for batch in model.batches for item in batch.items]


def _place(model: Any, batches: Sequence[Batch]) -> None:
    """Make `batches` the ones that are attached: what layers plan goes to them, the rest to its hook points."""
    for edit in _edits([*model.batches, *batches]):
        if edit.planned:
            LayerPlan.clear(_mlp(model, edit))
        else:
            edit.point.fwd_hooks[:] = [fn for fn in edit.point.fwd_hooks if not isinstance(fn, Lowered)]
    model.batches[:] = batches
    by_layer: dict[Any, list[Lowered]] = {}
    for edit in reversed(list(_edits(batches))):
        if edit.planned:
            by_layer.setdefault(_mlp(model, edit), []).insert(0, edit)
        else:
            edit.point.fwd_hooks.insert(0, edit)
    for mlp, edits in by_layer.items():
        mlp.plan = LayerPlan(mlp, edits)


def _edits(batches: Sequence[Batch]) -> Iterator[Lowered]:
    for batch in batches:
        yield from batch.edits


def _mlp(model: Any, edit: Lowered) -> Any:
    return model.blocks[edit.layer].mlp


def _row(batch: Batch, item: Intervention) -> InterventionRow:
    edits = [edit for edit in batch.edits if edit.item is item]
    ran = sorted({way for edit in edits for way in edit.ran}, reverse=True)
    layers = dict.fromkeys(edit.layer for edit in edits if edit.layer is not None)
    whys = dict.fromkeys(edit.why for edit in edits if edit.why and "hook" in edit.ran)
    points = dict.fromkeys(edit.leaf for edit in edits)
    row = None if batch.row is None else batch.row[0]
    return InterventionRow(item.kind, row, tuple(points), tuple(layers), ", ".join(ran), "; ".join(whys))
