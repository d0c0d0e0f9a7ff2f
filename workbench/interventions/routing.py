"""Interventions on the router: its logits steered, biased or swapped between rows, its choice that of another run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError
from workbench.interventions.base import Edit, Intervention, Site, align, as_tensor, pack
from workbench.interventions.experts import OnExperts
from workbench.interventions.where import Where

STEERING = ("steermoe", "soft", "hard", "relative")
_DEFAULT_STRENGTH = {"steermoe": 0.01, "soft": 0.5, "hard": 1e-6, "relative": 0.03}


@dataclass(frozen=True, kw_only=True, eq=False)
class SteerRouter(OnExperts, kind="steer_router"):
    """Raise (or lower, with `activate=False`) experts' router scores, in one of the published forms.

    z are the logits at a token, s the strength (default in parentheses):
      steermoe  z_e = max z + s, or min z - s (0.01); arXiv 2509.09660, whose log-softmax only shifts all z
      soft      z_e + s · std(z), or minus (0.5); arXiv 2510.04694
      hard      z_e = max z + s, or min z - s (1e-6): the same paper, with its random tie-breaker made a constant
      relative  z_e + s · |z_e|, or minus (0.03); arXiv 2601.14050, with every share 1
    """

    form: str
    strength: float | None = None
    activate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in STEERING:
            raise InterventionError(f"form: expected one of {', '.join(STEERING)}, got {self.form!r}.")
        if self.strength is not None:
            as_tensor("strength", self.strength, n_dims=0)

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
        steered = logits[..., list(self.experts)]  # [batch pos steered]
        if self.form in ("steermoe", "hard"):
            edge = logits.amax(-1, keepdim=True) if self.activate else logits.amin(-1, keepdim=True)
            steered = (edge + step).expand_as(steered)
        elif self.form == "soft":
            steered = steered + step * logits.std(-1, keepdim=True, correction=0)
        else:
            steered = steered + step * steered.abs()
        return logits.index_copy(-1, torch.tensor(self.experts, device=logits.device), steered)


@dataclass(frozen=True, kw_only=True, eq=False)
class BiasRouter(Intervention, kind="bias_router", needs_experts=True):
    """logits + scale · bias [expert], before top-k."""

    bias: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", as_tensor("bias", self.bias, n_dims=1))

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        layers = self.layers(model)
        if self.bias.shape != (model.cfg.n_experts,):
            raise InterventionError(f"bias: expected [{model.cfg.n_experts}], got {tuple(self.bias.shape)}.")
        for layer in layers:
            yield f"blocks.{layer}.mlp.hook_router_logits", lambda z, site: z + (self.scale * self.bias).to(z)


@dataclass(frozen=True, kw_only=True, eq=False)
class SwapRouting(Intervention, kind="swap_routing", needs_experts=True):
    """Each row of the batch is routed as row `rows[i]` is: its logits take the place of the row's own.

    Rows that swap must be aligned column by column; (1, 0) swaps two.
    """

    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if any(not isinstance(row, int) or not 0 <= row < len(self.rows) for row in self.rows):
            raise InterventionError(f"rows: expected a row number for every row, got {self.rows}.")

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        for layer in self.layers(model):
            yield f"blocks.{layer}.mlp.hook_router_logits", self._swap

    def _swap(self, logits: Tensor, site: Site) -> Tensor:  # [batch pos expert]
        if logits.shape[0] != len(self.rows):
            raise InterventionError(f"swap_routing: expected {len(self.rows)} rows, got {logits.shape[0]}.")
        return logits[list(self.rows)]


@dataclass(frozen=True, kw_only=True, eq=False)
class FreezeRouting(Intervention, kind="freeze_routing", needs_experts=True):
    """Experts, and with `weights` their weights too, are those of another run at the same token positions.

    ids, weights: by layer, [row position k]; lengths: how many positions of each row were recorded. Beyond them the
    model routes by itself. Without weights these are recomputed for the frozen experts. Make it with `from_cache`.
    """

    ids: Mapping[int, Tensor]
    lengths: tuple[int, ...]
    weights: Mapping[int, Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        for name in ("ids", "weights"):
            given = getattr(self, name)
            if given is not None:
                tensors = {int(layer): as_tensor(f"{name} of layer {layer}", t, 3) for layer, t in given.items()}
                object.__setattr__(self, name, tensors)

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
                yield f"blocks.{layer}.mlp.hook_{leaf}", self._replay(leaf, by_layer[layer])

    def _replay(self, leaf: str, recorded: Tensor) -> Edit:
        def edit(x: Tensor, site: Site) -> Tensor:  # [batch pos k]
            there, known = align(recorded, self.lengths, site.batch, f"freeze_routing {leaf}")
            return torch.where(known[..., None], there.to(x), x)

        return edit
