"""Interventions on named experts: taken out, forced, weighted, rewritten.

Weights and outputs are edited at the slots that hold the expert; what is edited before top-k re-routes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InterventionError
from workbench.interventions.base import Edit, Intervention, Site, by_expert, check_experts, plus
from workbench.interventions.values import as_flag, as_number, as_tensor, expert_tuple

KNOCK_OUTS = ("reroute", "drop", "drop_renormalise")


@dataclass(frozen=True, kw_only=True, eq=False)
class OnExperts(Intervention, needs_experts=True):
    """An intervention on named experts of every layer in `where`, through one or two hook points of the block."""

    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", expert_tuple(self.experts))

    def edits(self, model: Any) -> Iterator[tuple[str, Edit]]:
        layers = self.layers(model)
        check_experts(self.kind, self.experts, model)
        self._check(model)
        for layer in layers:
            if self.experts:
                for leaf, edit in self._leaves():
                    yield f"blocks.{layer}.mlp.hook_{leaf}", edit

    def _check(self, model: Any) -> None: ...

    def _leaves(self) -> Iterator[tuple[str, Edit]]:
        yield from ()

    def _per_expert(self, model: Any, value: float, others: float) -> Tensor:  # float64 [expert]
        return torch.full((model.cfg.n_experts,), others, dtype=torch.float64).index_fill_(
            0, torch.tensor(self.experts, dtype=torch.long), value
        )

    def _holds(self, site: Site) -> Tensor:  # bool [batch pos k]
        """The slots that one of these experts takes."""
        assert site.ids is not None
        return torch.isin(site.ids, torch.tensor(self.experts, device=site.ids.device))


@dataclass(frozen=True, kw_only=True, eq=False)
class KnockOut(OnExperts, kind="knock_out"):
    """Take experts out of the computation.

    mode "reroute": masked before top-k, so that the next best expert runs instead and the model weighs what runs as it
    always does (to a sum of 1 if its `norm_topk_prob` is set, else by probabilities over the experts left);
    "drop": their contribution is zeroed and nothing takes its place; "drop_renormalise": what is left is weighted up to
    the sum that all k had, which is 1 only with `norm_topk_prob`. The modes answer different questions and rank experts
    differently.
    """

    mode: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mode, str) or self.mode not in KNOCK_OUTS:
            raise InterventionError(f"mode: expected one of {', '.join(KNOCK_OUTS)}, got {self.mode!r}.")

    def _check(self, model: Any) -> None:
        left = model.cfg.n_experts - len(self.experts)
        if self.mode == "reroute" and left < model.cfg.k:
            raise InterventionError(
                f"knock_out: expected at least k = {model.cfg.k} experts to be left, got {left}. Use mode drop."
            )

    def _leaves(self) -> Iterator[tuple[str, Edit]]:
        if self.mode == "reroute":
            yield "router_logits", self._mask
        else:
            yield "routing_weights", self._drop

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        kept = self._per_expert(model, 0, 1)
        if self.mode == "drop_renormalise":  # looks at the other weights
            return {}
        return {"keep_mask": kept.bool()} if self.mode == "reroute" else {"expert_scale": kept}

    def _mask(self, logits: Tensor, site: Site) -> Tensor:  # [batch pos expert]
        return logits.index_fill(-1, torch.tensor(self.experts, device=logits.device), -torch.inf)

    def _drop(self, weights: Tensor, site: Site) -> Tensor:  # [batch pos k]
        held = self._holds(site)
        left = weights.masked_fill(held, 0)
        if self.mode == "drop":
            return left
        total = left.sum(-1, keepdim=True)
        renormalised = torch.where(total > 0, left * (weights.sum(-1, keepdim=True) / total), left)
        return torch.where(held.any(-1, keepdim=True), renormalised, weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class ForceExperts(OnExperts, kind="force_experts"):
    """These experts run at every token, in the slots of the last of those the router chose; other slots keep theirs.

    Weights are the router's own probabilities of the experts that run, renormalised as usual; or `weights`, one for
    each, when all k are forced. Tokens that already use them are left as they are. After a FreezeRouting with weights
    the experts that stay keep their recorded weights, and those forced in have the router's own.
    """

    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            weights = as_tensor("weights", self.weights, n_dims=1).tolist()
            given = self.weights if isinstance(self.weights, Sequence) else weights  # to the bit, where it is a list
            object.__setattr__(self, "weights", tuple(map(float, given)))

    def decides(self, model: Any) -> frozenset[str]:
        if len(self.experts) < model.cfg.k:
            return frozenset()
        return frozenset({"expert_ids"} if self.weights is None else {"expert_ids", "routing_weights"})

    def _check(self, model: Any) -> None:
        k, n_forced = model.cfg.k, len(self.experts)
        if n_forced > k:
            raise InterventionError(f"force_experts: expected at most k = {k} experts, got {n_forced}. Force fewer.")
        if self.weights is not None and not n_forced == len(self.weights) == k:
            raise InterventionError(
                f"force_experts weights: expected all k = {k} experts and as many weights, "
                f"got {n_forced} and {len(self.weights)}. Leave weights out."
            )

    def _leaves(self) -> Iterator[tuple[str, Edit]]:
        yield "expert_ids", self._force
        if self.weights is not None:
            yield "routing_weights", self._weigh

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        if self.weights is None:  # experts that run anyway keep their slots, which the router has to say first
            return {}
        given = {"expert_ids": torch.tensor(self.experts), "routing_weights": torch.tensor(self.weights)}
        return {{"expert_ids": "forced_ids", "routing_weights": "forced_weights"}[leaf]: given[leaf]}

    def _weigh(self, weights: Tensor, site: Site) -> Tensor:  # [batch pos k]
        given = torch.tensor(self.weights).to(weights).expand_as(weights)
        return by_expert(torch.tensor(self.experts, device=weights.device), given, site.ids, weights)

    def _force(self, ids: Tensor, site: Site) -> Tensor:  # [batch pos k]
        forced = torch.tensor(self.experts, device=ids.device)
        if self.weights is not None:
            return forced.expand_as(ids)  # all of them, in the order of the weights
        is_forced = torch.isin(ids, forced)
        missing = (forced[:, None] != ids[..., None, :]).all(-1)  # [batch pos forced]
        n_missing = missing.sum(-1, keepdim=True)
        newcomers = forced[(~missing).to(torch.int8).argsort(dim=-1, stable=True)]  # the missing ones first
        from_end = (~is_forced).flip(-1).cumsum(-1).flip(-1)  # 1 at the last slot that may go, 2 at the one before
        replaced = ~is_forced & (from_end <= n_missing)
        index = (n_missing - from_end).clamp(0, len(self.experts) - 1)
        return torch.where(replaced, newcomers.gather(-1, index), ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reweight(OnExperts, kind="reweight"):
    """factor · routing weight of the experts where they run (RICE, arXiv 2505.14681); `renormalise` keeps the sum."""

    factor: float
    renormalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", as_number("factor", self.factor))
        as_flag("renormalise", self.renormalise)

    def _leaves(self) -> Iterator[tuple[str, Edit]]:
        yield "routing_weights", self._scale

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        looks = self.renormalise and self.factor != 1  # at the other weights
        return {} if looks else {"expert_scale": self._per_expert(model, self.factor, 1)}

    def _scale(self, weights: Tensor, site: Site) -> Tensor:  # [batch pos k]
        held = self._holds(site)
        scaled = torch.where(held, weights * self.factor, weights)
        if self.renormalise and self.factor != 1:
            share = weights.sum(-1, keepdim=True) / scaled.sum(-1, keepdim=True)
            scaled = torch.where(held.any(-1, keepdim=True), scaled * share, scaled)
        return scaled


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleExperts(OnExperts, kind="scale_experts"):
    """factor · what the experts write, before weighting."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", as_number("factor", self.factor))

    def _leaves(self) -> Iterator[tuple[str, Edit]]:
        yield "expert_out", lambda out, site: torch.where(self._holds(site)[..., None], out * self.factor, out)

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        return {"expert_scale": self._per_expert(model, self.factor, 1)}


@dataclass(frozen=True, kw_only=True, eq=False)
class SetExpertOutput(OnExperts, kind="set_expert_output"):
    """What the experts write becomes `value` [d_model] wherever they run: their mean output makes it a mean-ablation.

    With `add`, it is added instead.
    """

    value: Tensor
    add: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", as_tensor("value", self.value, n_dims=1))
        as_flag("add", self.add)

    def _check(self, model: Any) -> None:
        if self.value.shape != (model.cfg.d_model,):
            raise InterventionError(
                f"set_expert_output value: expected [{model.cfg.d_model}], got {tuple(self.value.shape)}."
            )

    def _leaves(self) -> Iterator[tuple[str, Edit]]:
        yield "expert_out", self._set

    def arguments(self, leaf: str, model: Any) -> dict[str, Tensor]:
        held = self._per_expert(model, 1, 0)
        added = {"expert_add": held[:, None] * self.value.double()} if bool(self.value.any()) else {}
        return {"expert_scale": torch.ones_like(held) if self.add else 1 - held, **added}

    def _set(self, out: Tensor, site: Site) -> Tensor:  # [batch pos k d_model]
        value = plus(out, self.value) if self.add else self.value.to(out)
        return torch.where(self._holds(site)[..., None], value, out)
