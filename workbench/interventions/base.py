"""What all interventions share: a kind, a place, and how they become edits of hook points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from workbench.activations import unknown_name
from workbench.errors import InterventionError
from workbench.hooks import HookedModel, HookPoint
from workbench.interventions.where import Batch, Where


class Site(NamedTuple):
    """What an edit may look at besides its tensor: the running batch, and the experts chosen in this layer."""

    batch: Batch
    ids: Tensor | None  # [batch pos k] after every edit of them; None before they are known
    layer: int | None = None  # None outside the blocks


Edit = Callable[[Tensor, Site], Tensor]
KINDS: dict[str, type[Intervention]] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One change to a running model, as a value. `where` limits it; `kind` names it in JSON."""

    where: Where = field(default_factory=Where)

    kind: ClassVar[str] = ""
    needs_experts: ClassVar[bool] = False

    def __init_subclass__(cls, kind: str = "", needs_experts: bool | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        if needs_experts is not None:
            cls.needs_experts = needs_experts
        if kind:
            KINDS[kind] = cls

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        """(hook name, edit) for every point touched; raises InterventionError when this does not fit the model.

        An edit gives the whole tensor as it would be everywhere; where it applies is decided by `where` alone.
        """
        raise InterventionError(
            f"{type(self).__name__}: expected a kind of intervention, got the base of all. Use one of its kinds."
        )
        yield

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        """The edit of this leaf at all tokens as arguments that a layer's kernels have; empty when they have none.

        router_bias [expert], keep_mask bool [expert], forced_ids and forced_weights [k]; expert_scale [expert] and
        expert_add [expert d_model], at `expert_out` of what an expert writes, at `routing_weights` of its weight.
        """
        return {}

    def decides(self, model: Any) -> frozenset[str]:
        """The leaves whose tensor this replaces whole, whatever the router or an earlier item put there."""
        return frozenset()

    def layers(self, model: Any) -> tuple[int, ...]:
        """The layers meant: those of `where`, by default all (for the experts' kinds, all that have experts)."""
        if self.needs_experts and self.where.heads is not None:
            raise InterventionError(
                f"{self.kind} heads: expected none (experts have no heads), got {self.where.heads}."
            )
        n_layers = model.cfg.n_layers
        usable = tuple(layer for layer, sparse in enumerate(_sparse(model)) if sparse or not self.needs_experts)
        if not usable:
            raise InterventionError(
                f"{self.kind}: expected a mixture of experts, got {model.cfg.model_type!r} without any. "
                "Use an intervention on activations."
            )
        if self.where.layers is None:
            return usable
        for layer in self.where.layers:
            if layer not in usable:
                what = "a layer with experts" if 0 <= layer < n_layers else f"0 to {n_layers - 1}"
                raise InterventionError(f"{self.kind} layers: expected {what}, got {layer}. Name others.")
        return self.where.layers


def _sparse(model: Any) -> tuple[bool, ...]:
    return tuple(getattr(model.cfg, "sparse_layers", (False,) * model.cfg.n_layers))


def resolve_point(model: HookedModel, point: str, layer: int) -> HookPoint:
    """The hook point of a leaf such as "resid_post" or "mlp.hook_post" in a layer; or a full name, as it is."""
    if point in model.hook_dict:
        return model.hook_dict[point]
    part, _, leaf = point.rpartition(".")
    leaf = leaf.removeprefix("hook_")
    prefixes = [f"{part}."] if part else ["", "attn.", "mlp.", "ln1.", "ln2."]
    names = [f"blocks.{layer}.{prefix}hook_{leaf}" for prefix in prefixes]
    found = [name for name in names if name in model.hook_dict]
    if len(found) != 1:
        if not found:
            raise InterventionError(f"point: {unknown_name(names[0], model.hook_dict)}")
        raise InterventionError(f"point: expected one of {', '.join(found)}, got {point!r}. Use its full name.")
    return model.hook_dict[found[0]]


def check_experts(kind: str, experts: Sequence[int], model: Any) -> None:
    n_experts = getattr(model.cfg, "n_experts", 0)
    for expert in experts:
        if not 0 <= expert < n_experts:
            raise InterventionError(f"{kind} experts: expected 0 to {n_experts - 1}, got {expert}. Name others.")


def plus(x: Tensor, change: Tensor) -> Tensor:
    """x + change; zeros leave every bit, the sign of -0.0 too."""
    return x + change.to(x) if bool(change.any()) else x


def by_expert(experts: Tensor, given: Tensor, ids: Tensor | None, weights: Tensor) -> Tensor:  # [batch pos k]
    """`given` [batch pos k], the weights of `experts`, at the slots where those run now; `weights` at the others."""
    assert ids is not None
    same = ids[..., :, None] == experts[..., None, :]  # [batch pos k k]
    found = (given[..., None, :] * same).sum(-1)
    return torch.where(same.any(-1), found, weights)


def align(recorded: Tensor, lengths: Sequence[int], batch: Batch, what: str) -> tuple[Tensor, Tensor]:
    """A recorded [row position ...] at the running batch's tokens: ([batch pos ...], bool [batch pos] where known)."""
    n_rows = batch.positions.shape[0] // batch.copies
    if recorded.shape[0] not in (1, n_rows):
        raise InterventionError(
            f"{what}: expected a recording of 1 or {n_rows} rows, as are running, got {recorded.shape[0]}."
        )
    places, device = batch.positions, batch.positions.device
    rows = torch.arange(places.shape[0], device=device)[:, None] % recorded.shape[0]
    ends = torch.tensor(list(lengths), device=device)[rows]
    known = places < ends  # [batch pos]
    return recorded.to(device)[rows, places.clamp(max=recorded.shape[1] - 1)], known


def pack(recorded: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """[row column ...] -> [row position ...] with padding moved to the end, and each row's number of tokens."""
    if attention_mask is None:
        return recorded.detach().cpu(), (recorded.shape[1],) * recorded.shape[0]
    real = attention_mask.bool().cpu()
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)  # [row column]: tokens first, in order
    rows = torch.arange(real.shape[0])[:, None]
    return recorded.detach().cpu()[rows, order], tuple(real.sum(1).tolist())
