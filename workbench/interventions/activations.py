"""Interventions on activations: add, project out, set, scale, patch from another run.

`point` is a hook point's leaf ("resid_post", "attn_out", "z", "mlp.hook_post" ...), taken in every layer of `where`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError
from workbench.hooks import HookPoint
from workbench.interventions.base import Edit, Intervention, Site, align, pack, plus, resolve_point
from workbench.interventions.values import as_integers, as_mapping, as_number, as_tensor, check_recorded
from workbench.interventions.where import Where


@dataclass(frozen=True, kw_only=True, eq=False)
class _AtPoint(Intervention):
    """An intervention on one leaf; a subclass says what becomes of the tensor."""

    point: str = "resid_post"

    def __post_init__(self) -> None:
        if not isinstance(self.point, str):
            raise InterventionError(f"point: expected the name of a hook point, got {self.point!r}.")

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        self._check_layers(model)
        points = dict.fromkeys(resolve_point(model, self.point, layer) for layer in self.layers(model))
        for point in points:  # a full name is one point, whatever the layer
            axes = _checked_axes(self.kind, point)
            self._check(point, axes, _sizes(model))
            yield point.name, self._limited(axes, _sizes(model))

    def _check(self, point: HookPoint, axes: list[str], sizes: Mapping[str, int]) -> None: ...

    def _edit(self, x: Tensor, site: Site) -> Tensor:
        return x

    def _check_layers(self, model: Any) -> None:
        """A full name says its layer itself: `where` may name no other."""
        layers = self.where.layers
        if not layers or self.point not in model.hook_dict:
            return
        if not self.point.startswith("blocks.") or layers != (model.hook_dict[self.point].layer(),):
            raise InterventionError(
                f"{self.kind} layers: expected none with the full name {self.point}, got {layers}. Name its leaf alone."
            )

    def _limited(self, axes: list[str], sizes: Mapping[str, int]) -> Edit:
        return _on_heads(self._edit, self.where.heads, f"{self.kind} heads", self.point, axes, sizes)


@dataclass(frozen=True, kw_only=True, eq=False)
class AddVector(_AtPoint, kind="add_vector"):
    """x + scale · vector (activation steering, arXiv 2308.10248). vector: [d], the point's last axis or axes."""

    vector: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "vector", as_tensor("vector", self.vector))
        object.__setattr__(self, "scale", as_number("scale", self.scale))

    def _check(self, point: HookPoint, axes: list[str], sizes: Mapping[str, int]) -> None:
        _check_trailing("vector", self.vector, point, axes, sizes)

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        change = self.scale * self.vector
        if leaf == "router_logits":
            return {"router_bias": change.expand(model.cfg.n_experts)}
        return _outputs(model, 1.0, change) if leaf == "expert_out" and change.ndim < 2 else {}

    def _edit(self, x: Tensor, site: Site) -> Tensor:
        return plus(x, self.scale * self.vector)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectOut(_AtPoint, kind="project_out"):
    """x - scale · (x·u) u with u the direction at unit length (directional ablation, arXiv 2406.11717)."""

    direction: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", as_tensor("direction", self.direction, n_dims=1).float())
        object.__setattr__(self, "scale", as_number("scale", self.scale))
        if not self.direction.norm() > 0:
            raise InterventionError("direction: expected a vector with a length, got zeros.")

    def _check(self, point: HookPoint, axes: list[str], sizes: Mapping[str, int]) -> None:
        _check_trailing("direction", self.direction, point, axes, sizes)

    def _edit(self, x: Tensor, site: Site) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        u = (self.direction / self.direction.norm()).to(x.device, wide)
        along = (x.to(wide) * u).sum(-1, keepdim=True)
        return (x.to(wide) - self.scale * along * u).to(x.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class SetActivation(_AtPoint, kind="set_activation"):
    """x becomes `value`: a number (0 ablates), or a tensor of the point's last axis or axes (a mean, say)."""

    value: Tensor | float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", as_tensor("value", self.value))

    def _check(self, point: HookPoint, axes: list[str], sizes: Mapping[str, int]) -> None:
        assert isinstance(self.value, Tensor)
        _check_trailing("value", self.value, point, axes, sizes)

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        assert isinstance(self.value, Tensor)
        return _outputs(model, 0.0, self.value) if leaf == "expert_out" and self.value.ndim < 2 else {}

    def _edit(self, x: Tensor, site: Site) -> Tensor:
        assert isinstance(self.value, Tensor)
        return self.value.to(x).expand_as(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleActivation(_AtPoint, kind="scale_activation"):
    """factor · x; 1 changes nothing, 0 ablates."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", as_number("factor", self.factor))

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        scales = leaf == "expert_out" and self.where.heads is None
        return _outputs(model, self.factor, torch.zeros(())) if scales else {}

    def _edit(self, x: Tensor, site: Site) -> Tensor:
        return x * self.factor


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchActivations(Intervention, kind="patch_activations"):
    """Activations of another run, by hook name, at the same token positions (activation patching).

    values: each [row position ...], one row or as many as are running; lengths: how many positions of each row were
    recorded; beyond them nothing is patched. `where.layers` leaves only those layers' points. See `from_cache`.
    """

    values: Mapping[str, Tensor]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        given = as_mapping("values", self.values)
        values = {name: as_tensor(f"values of {name}", value) for name, value in given.items()}
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "lengths", as_integers("lengths", self.lengths))
        for name, value in values.items():
            check_recorded(f"values of {name}", value, self.lengths)

    @classmethod
    def from_cache(
        cls, cache: Mapping[str, Tensor], attention_mask: Tensor | None = None, where: Where | None = None
    ) -> PatchActivations:
        """The activations in a cache of `run_with_cache`, whose run had this mask.

        Left out is what is none: expert ids (see FreezeRouting) and counts over the batch.
        """
        tokenwise = {name: value for name, value in cache.items() if value.ndim > 2 and value.is_floating_point()}
        packed = {name: pack(value, attention_mask) for name, value in tokenwise.items()}
        lengths = next(iter(packed.values()))[1] if packed else ()
        values = {name: value for name, (value, _) in packed.items()}
        return cls(values=values, lengths=lengths, where=where or Where())

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        layers, n_found = self.layers(model), 0
        for name, value in self.values.items():
            point = resolve_point(model, name, 0)
            axes, sizes = _checked_axes(self.kind, point), _sizes(model)
            _check_trailing(name, value[0, 0], point, axes, sizes)
            whole = _patch(name, value, self.lengths)
            edit = _on_heads(whole, self.where.heads, f"{self.kind} heads", name, axes, sizes)
            if self.where.layers is None or (point.name.startswith("blocks.") and point.layer() in layers):
                n_found += 1
                yield point.name, edit
        if layers and not n_found:
            raise InterventionError(f"{self.kind} layers: expected some with recorded values, got {layers}.")


def _outputs(model: Any, scale: float, added: Tensor) -> dict[str, Tensor]:
    """The same change of what every expert writes; added: one number, or [d_model]."""
    n_experts, d_model = model.cfg.n_experts, model.cfg.d_model
    scales = torch.full((n_experts,), scale, dtype=torch.float64)
    return {"expert_scale": scales, **({"expert_add": added.expand(n_experts, d_model)} if bool(added.any()) else {})}


def _patch(name: str, value: Tensor, lengths: tuple[int, ...]) -> Edit:
    def edit(x: Tensor, site: Site) -> Tensor:
        there, known = align(value, lengths, site.batch, name)
        return torch.where(known.view(*known.shape, *[1] * (x.ndim - 2)), there.to(x), x)

    return edit


def _on_heads(
    whole: Edit, heads: tuple[int, ...] | None, what: str, point: str, axes: list[str], sizes: Mapping[str, int]
) -> Edit:
    """The edit, kept to some heads if there are any named. Raises InterventionError where there is no head axis."""
    if heads is None:
        return whole
    if len(axes) != 4 or not axes[2].endswith("head"):
        raise InterventionError(f"{what}: expected a point with a head axis, got {point!r}.")
    unknown = [head for head in heads if not 0 <= head < sizes[axes[2]]]
    if unknown:
        raise InterventionError(f"{what}: expected 0 to {sizes[axes[2]] - 1}, got {unknown[0]}.")

    def edit(x: Tensor, site: Site) -> Tensor:  # [batch pos head d_head]
        chosen = torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
        chosen[list(heads)] = True
        return torch.where(chosen[:, None], whole(x, site), x)

    return edit


def _checked_axes(kind: str, point: HookPoint) -> list[str]:
    axes = point.shape.split()
    if axes[:2] != ["batch", "pos"] or point.read_only or point.dtype == "int64":
        raise InterventionError(
            f"{kind}: expected a point with an activation for every token, got {point.name} ({point.shape})."
        )
    return axes


def _sizes(model: Any) -> dict[str, int]:
    """How long each named axis of a hook point is in this model."""
    names = {"d_model": "d_model", "head": "n_heads", "kv_head": "n_kv_heads", "d_head": "d_head", "d_mlp": "d_mlp"}
    names |= {"expert": "n_experts", "k": "k", "d_expert": "d_expert"}
    return {axis: getattr(model.cfg, name) for axis, name in names.items() if hasattr(model.cfg, name)} | {"1": 1}


def _check_trailing(name: str, value: Tensor, point: HookPoint, axes: list[str], sizes: Mapping[str, int]) -> None:
    """`value` must have the length of the point's last axes, as many as it has axes itself."""
    shape = tuple(sizes[axis] for axis in axes[2:])
    if value.ndim > len(shape) or tuple(value.shape) != shape[len(shape) - value.ndim :]:
        raise InterventionError(f"{name}: expected the last axes of {point.name} {shape}, got {tuple(value.shape)}.")
