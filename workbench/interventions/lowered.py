"""One edit of one hook point, kept to the tokens and the row where it applies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.hooks import HookPoint
from workbench.interventions.base import Edit, Intervention, Site
from workbench.interventions.where import Batch

PLANNED = ("router_logits", "router_probs", "expert_ids", "routing_weights", "expert_out")  # by each layer itself


class Lowered:
    """The hook that makes the edit; for `PLANNED` leaves also what a layer's kernels need to do it themselves.

    ran: how it did, "kernel" or "hook"; why: what made it a hook.
    """

    def __init__(self, item: Intervention, edit: Edit, point: HookPoint, batch: Batch, model: Any) -> None:
        self.item, self.edit, self.point, self.batch = item, edit, point, batch
        self.leaf = point.name.rpartition("hook_")[2]
        self.layer = point.layer() if point.name.startswith("blocks.") else None
        self.planned = self.leaf in PLANNED and ".mlp." in point.name
        self.arguments = item.arguments(self.leaf, model) if self.planned else {}
        self.ids: Tensor | None = None  # [batch pos k] of this layer and pass
        self.ran: set[str] = set()
        self.why = "" if self.planned else "not part of the experts' kernels"

    @property
    def everywhere(self) -> bool:
        where = self.item.where
        return all(
            limit is None for limit in (where.positions, where.segments, where.langs, where.phase, self.batch.row)
        )

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        self.ran.add("hook")
        if self.batch.row is None:
            return self._changed(x)
        out = x.clone()
        self.batch.own(out).copy_(self._changed(self.batch.own(x)))
        return out

    def _changed(self, x: Tensor) -> Tensor:
        mask = self.batch.mask(self.item.where)
        ids = None if self.ids is None else self.batch.own(self.ids)
        new = self.edit(x, Site(self.batch, ids, self.layer)).to(x.dtype)
        return new if mask is None else torch.where(mask.view(*mask.shape, *[1] * (x.ndim - 2)), new, x)

    def applies(self, batch_pos: torch.Size, device: torch.device) -> Tensor:  # bool [batch pos]
        mask = self.batch.mask(self.item.where)
        if self.batch.row is None:
            return torch.ones(batch_pos, dtype=torch.bool, device=device) if mask is None else mask
        found = torch.zeros(batch_pos, dtype=torch.bool, device=device)
        self.batch.own(found).copy_(torch.ones_like(self.batch.own(found)) if mask is None else mask)
        return found
