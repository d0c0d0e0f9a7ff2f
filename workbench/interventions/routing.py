"""Interventions on the router: its logits steered, biased or swapped between rows, its choice that of another run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError
from workbench.interventions.base import Edit, Intervention, Site, align, by_expert, pack, plus
from workbench.interventions.experts import OnExperts
from workbench.interventions.values import (
    as_flag,
    as_integers,
    as_mapping,
    as_number,
    as_tensor,
    check_recorded,
)
from workbench.interventions.where import Where

STEERING = ("steermoe", "soft", "hard", "relative")
_BLOCK = 1024  # positions whose tie-breakers are drawn together
_DEFAULT_STRENGTH = {"steermoe": 0.01, "soft": 0.5, "hard": 1e-3, "relative": 0.03}


@dataclass(frozen=True, kw_only=True, eq=False)
class SteerRouter(OnExperts, kind="steer_router"):
    """Raise (or lower, with `activate=False`) experts' router scores, in one of the published forms.

    z are the logits at a token, s the strength (default in parentheses); experts that an earlier knock-out masked stay
    masked and count in no max, min or std:
      steermoe  z_e = max z + s, or min z - s (0.01); arXiv 2509.09660, whose log-softmax only shifts all z
      soft      z_e + s · std(z), or minus (0.5); arXiv 2510.04694
      hard      z_e = max z + s · ξ, or min z + s · ξ, ξ drawn from N(0, 1) to break ties (0.001, whose square is the
                paper's 1e-6, a variance in its notation); the same paper
      relative  z_e + s · |z_e|, or minus (0.03); arXiv 2601.14050, with every share 1

    ξ depends on `seed`, layer, expert and the token's position alone: it is the same in any batch and while decoding.
    """

    form: str
    strength: float | None = None
    activate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.form, str) or self.form not in STEERING:
            raise InterventionError(f"form: expected one of {', '.join(STEERING)}, got {self.form!r}.")
        if self.strength is not None:
            object.__setattr__(self, "strength", as_number("strength", self.strength))
        as_flag("activate", self.activate)
        as_integers("seed", (self.seed,))

    def _check(self, model: Any) -> None:
        if self.activate and len(self.experts) > model.cfg.k:
            raise InterventionError(
                f"steer_router: expected at most k = {model.cfg.k} experts to activate, got {len(self.experts)}."
            )

    def _leaves(self) -> Iterator[tuple[str, Edit]]:
        yield "router_logits", self._steer

    def _steer(self, logits: Tensor, site: Site) -> Tensor:  # [batch pos expert]
        strength = _DEFAULT_STRENGTH[self.form] if self.strength is None else self.strength
        step = strength if self.activate else -strength
        own = logits[..., list(self.experts)]  # [batch pos steered]
        masked = logits == -torch.inf  # [batch pos expert]
        if self.form in ("steermoe", "hard"):
            low = logits.masked_fill(masked, torch.inf).amin(-1, keepdim=True)
            edge = logits.amax(-1, keepdim=True) if self.activate else low
            steered = edge + (step if self.form == "steermoe" else strength * self._ties(site).to(own))
            steered = steered.expand_as(own)
        elif self.form == "soft":
            steered = own + step * _spread(logits, masked)
        else:
            steered = own + step * own.abs()
        steered = torch.where(own == -torch.inf, own, steered)
        return logits.index_copy(-1, torch.tensor(self.experts, device=logits.device), steered)

    def _ties(self, site: Site) -> Tensor:  # [batch pos steered], on the CPU
        positions = site.batch.positions.cpu()
        starts = range(0, int(positions.max()) + 1, _BLOCK)
        drawn = [
            torch.cat([_draws(self.seed, site.layer, expert, start) for start in starts]) for expert in self.experts
        ]
        return torch.stack(drawn, -1)[positions]


@lru_cache(maxsize=4096)
def _draws(seed: int, layer: int | None, expert: int, start: int) -> Tensor:  # [_BLOCK], for the positions from `start`
    name = hashlib.sha256(f"{seed} {layer} {expert} {start}".encode())
    generator = torch.Generator().manual_seed(int.from_bytes(name.digest()[:7], "little"))
    return torch.randn(_BLOCK, generator=generator)


def _spread(logits: Tensor, masked: Tensor) -> Tensor:  # [batch pos 1]
    """The standard deviation of a token's logits over the experts that are not masked."""
    if not bool(masked.any()):
        return logits.std(-1, keepdim=True, correction=0)
    n_left = (~masked).sum(-1, keepdim=True)
    mean = logits.masked_fill(masked, 0).sum(-1, keepdim=True) / n_left
    return ((logits - mean).masked_fill(masked, 0).square().sum(-1, keepdim=True) / n_left).sqrt()


@dataclass(frozen=True, kw_only=True, eq=False)
class BiasRouter(Intervention, kind="bias_router", needs_experts=True):
    """logits + scale · bias [expert], before top-k."""

    bias: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", as_tensor("bias", self.bias, n_dims=1))
        object.__setattr__(self, "scale", as_number("scale", self.scale))

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        layers = self.layers(model)
        if self.bias.shape != (model.cfg.n_experts,):
            raise InterventionError(f"bias: expected [{model.cfg.n_experts}], got {tuple(self.bias.shape)}.")
        for layer in layers:
            yield f"blocks.{layer}.mlp.hook_router_logits", lambda z, site: plus(z, self.scale * self.bias)

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        return {"router_bias": self.scale * self.bias}


@dataclass(frozen=True, kw_only=True, eq=False)
class SwapRouting(Intervention, kind="swap_routing", needs_experts=True):
    """Each row of the batch is routed as row `rows[i]` is: its logits take the place of the row's own.

    Rows that swap must be aligned column by column; (1, 0) swaps two.
    """

    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", as_integers("rows", self.rows))
        if any(row >= len(self.rows) for row in self.rows):
            raise InterventionError(f"rows: expected a row number for every row, got {self.rows}.")

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        for layer in self.layers(model):
            yield f"blocks.{layer}.mlp.hook_router_logits", self._swap

    def _swap(self, logits: Tensor, site: Site) -> Tensor:  # [batch pos expert]
        copies = site.batch.copies
        if logits.shape[0] != len(self.rows) * copies:
            raise InterventionError(f"swap_routing: expected {len(self.rows)} rows, got {logits.shape[0] // copies}.")
        return logits.unflatten(0, (copies, -1))[:, list(self.rows)].flatten(0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class FreezeRouting(Intervention, kind="freeze_routing", needs_experts=True):
    """Experts, and with `weights` their weights too, are those of another run at the same token positions.

    ids, weights: by layer, [row position k]; lengths: how many positions of each row were recorded. Beyond them the
    model routes by itself. Weights belong to their expert: a slot that a later item gave to another expert has the
    router's own. Without weights these are recomputed for the frozen experts. Make it with `from_cache`.
    """

    ids: Mapping[int, Tensor]
    lengths: tuple[int, ...]
    weights: Mapping[int, Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", as_integers("lengths", self.lengths))
        for name in ("ids", "weights"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._by_layer(name))

    def _by_layer(self, name: str) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for layer, value in as_mapping(name, getattr(self, name)).items():
            what = f"{name} of layer {layer}"
            found[_layer_number(layer)] = recorded = as_tensor(what, value, 3)
            check_recorded(what, recorded, self.lengths)
            if name == "ids" and recorded.is_floating_point():
                raise InterventionError(f"{what}: expected expert numbers, got {recorded.dtype}.")
        return found

    def decides(self, model: Any) -> frozenset[str]:
        return frozenset({"expert_ids"} if self.weights is None else {"expert_ids", "routing_weights"})

    @classmethod
    def from_cache(
        cls,
        cache: Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        *,
        weights: bool = True,
        where: Where | None = None,
    ) -> FreezeRouting:
        """The routing in a cache that holds `hook_expert_ids` and, unless left out, `hook_routing_weights`."""
        found: dict[str, dict[int, Tensor]] = {"expert_ids": {}, "routing_weights": {}}
        lengths: tuple[int, ...] = ()
        for name, value in cache.items():
            leaf = name.rpartition("hook_")[2]
            if leaf in found:
                found[leaf][int(name.split(".")[1])], lengths = pack(value, attention_mask)
        ids, g = found["expert_ids"], found["routing_weights"]
        if not ids or (weights and ids.keys() != g.keys()):
            raise InterventionError(
                "cache: expected hook_expert_ids and hook_routing_weights, got one without. Cache both."
            )
        return cls(ids=ids, lengths=lengths, weights=g if weights else None, where=where or Where())

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        recorded: Sequence[tuple[str, Mapping[int, Tensor]]] = [("expert_ids", self.ids)]
        if self.weights is not None:
            recorded = [*recorded, ("routing_weights", self.weights)]
        layers = [layer for layer in self.layers(model) if self.where.layers is not None or layer in self.ids]
        for leaf, by_layer in recorded:
            for layer in layers:
                if layer not in by_layer or by_layer[layer].shape[-1] != model.cfg.k:
                    raise InterventionError(
                        f"freeze_routing: expected {leaf} [row position {model.cfg.k}] of layer {layer}, got "
                        f"{tuple(by_layer[layer].shape) if layer in by_layer else 'none'}."
                    )
                self._check_ids(layer, model.cfg.n_experts)
                yield f"blocks.{layer}.mlp.hook_{leaf}", self._replay(leaf, layer)

    def _check_ids(self, layer: int, n_experts: int) -> None:
        ids = self.ids[layer]  # [row position k]
        recorded = torch.cat([row[:length] for row, length in zip(ids, self.lengths, strict=True)])
        ordered = recorded.sort(-1).values
        known = bool(((recorded >= 0) & (recorded < n_experts)).all())
        if not known or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise InterventionError(
                f"freeze_routing ids of layer {layer}: expected different experts from 0 to {n_experts - 1} "
                "at every position, got others."
            )

    def _replay(self, leaf: str, layer: int) -> Edit:
        def edit(x: Tensor, site: Site) -> Tensor:  # [batch pos k]
            ids, known = align(self.ids[layer], self.lengths, site.batch, f"freeze_routing {leaf}")
            if leaf == "expert_ids":
                return torch.where(known[..., None], ids.to(x), x)
            assert self.weights is not None
            weights, _ = align(self.weights[layer], self.lengths, site.batch, f"freeze_routing {leaf}")
            return torch.where(known[..., None], by_expert(ids, weights.to(x), site.ids, x), x)

        return edit


def _layer_number(layer: Any) -> int:
    try:
        return int(layer)
    except (TypeError, ValueError):
        raise InterventionError(f"layer: expected a number, got {layer!r}. Use layers as keys.") from None
