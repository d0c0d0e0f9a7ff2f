"""Refuses lists of interventions in which one undoes another, whatever the prompt.

A layer routes in a fixed sequence: logits, experts, weights. Items act in their order at each of these, so an item on
the logits cannot follow one that fixes the experts. What cannot act is refused, not skipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from workbench.errors import InterventionError
from workbench.interventions.base import Intervention
from workbench.interventions.experts import ForceExperts, KnockOut
from workbench.interventions.routing import SteerRouter

ROUTING = ("router_logits", "router_probs", "expert_ids", "routing_weights")


class _Placed(NamedTuple):
    """An item of the list, and the (layer's prefix, leaf) of the routing that it edits."""

    item: Intervention
    spots: frozenset[tuple[str, str]]

    @property
    def layers(self) -> set[str]:
        return {prefix for prefix, _ in self.spots}


def check_order(items: Sequence[Intervention], model: Any) -> None:
    """Raises InterventionError when an item cannot act for another, or too few experts are left to choose from."""
    placed = [_Placed(item, _spots(item, model)) for item in items]
    routing = [one for one in placed if one.spots]
    for first, second in itertools.combinations(routing, 2):
        if first.layers & second.layers and first.item.where.meets(second.item.where):
            _check_contradiction(first.item, second.item)
            _check_overridden(first, second, model)
    _check_enough_left(routing, model)


def _spots(item: Intervention, model: Any) -> frozenset[tuple[str, str]]:
    parts = [name.rpartition(".hook_") for name, _ in item.edits(model)]
    return frozenset((prefix, leaf) for prefix, _, leaf in parts if leaf in ROUTING)


def _check_contradiction(first: Intervention, second: Intervention) -> None:
    """The same expert knocked out and asked for. Forced first and dropped afterwards is no contradiction."""
    for gone, asked in ((first, second), (second, first)):
        if not isinstance(gone, KnockOut) or not isinstance(asked, ForceExperts | SteerRouter):
            continue
        if gone.mode != "reroute" and (asked is first or isinstance(asked, SteerRouter)):
            continue
        shared = sorted(set(gone.experts) & set(asked.experts))
        if shared:
            raise InterventionError(
                f"interventions: expected different experts for {gone.kind} ({gone.mode}) and {asked.kind} at the same "
                f"tokens, got {shared} in both. Take them out of one, or keep the two apart with Where."
            )


def _check_overridden(first: _Placed, second: _Placed, model: Any) -> None:
    lost = _lost(first, second, model)
    unweighed = "routing_weights" not in second.item.decides(model)  # a frozen expert that is masked would weigh 0
    all_lost = second.item.where.covers(first.item.where) and lost | _replaced(first, second, model) == first.spots
    if all_lost or (lost and unweighed and isinstance(first.item, KnockOut)):
        _refuse(first.item, second.item, "Put it after, or keep the two apart with Where.")
    # What comes later in the list, but is asked by the model earlier. A knock-out is a claim about all its tokens.
    lost = _lost(second, first, model)
    all_lost = first.item.where.covers(second.item.where) and lost == second.spots
    if all_lost or (lost and isinstance(second.item, KnockOut)):
        _refuse(second.item, first.item, "Keep the two apart with Where.")


def _lost(one: _Placed, other: _Placed, model: Any) -> set[tuple[str, str]]:
    """Edits of `one` before the choice of experts that no longer matter once `other` has decided it."""
    decided = other.item.decides(model)
    matters = "routing_weights" not in decided and not isinstance(one.item, KnockOut)
    if "expert_ids" not in decided or matters:
        return set()
    return {(prefix, leaf) for prefix, leaf in one.spots if prefix in other.layers and leaf in ROUTING[:2]}


def _replaced(one: _Placed, other: _Placed, model: Any) -> set[tuple[str, str]]:
    """Edits of `one` that `other` then replaces whole."""
    decided = other.item.decides(model)
    return {(prefix, leaf) for prefix, leaf in one.spots if prefix in other.layers and leaf in decided}


def _refuse(lost: Intervention, winner: Intervention, remedy: str) -> None:
    raise InterventionError(
        f"interventions: expected each to act, got a {lost.kind} that cannot, since {winner.kind} decides the routing "
        f"of the same tokens. {remedy}"
    )


def _check_enough_left(routing: Sequence[_Placed], model: Any) -> None:
    """Reroutes that meet at some token must together leave k experts to choose from."""
    reroutes = [one for one in routing if isinstance(one.item, KnockOut) and one.item.mode == "reroute"]
    for layer in dict.fromkeys(layer for one in reroutes for layer in sorted(one.layers)):
        for together in _meeting([one.item for one in reroutes if layer in one.layers]):
            gone = {expert for item in together for expert in item.experts}  # type: ignore[attr-defined]
            left = model.cfg.n_experts - len(gone)
            if left < model.cfg.k:
                raise InterventionError(
                    f"interventions: expected at least k = {model.cfg.k} experts to be left in {layer} by all "
                    f"knock-outs together, got {left}. Use mode drop."
                )


def _meeting(
    more: Sequence[Intervention], held: tuple[Intervention, ...] = (), tried: tuple[Intervention, ...] = ()
) -> Iterator[tuple[Intervention, ...]]:
    """The largest sets whose members all meet one another: `held` and some of `more` (Bron and Kerbosch 1973)."""
    if not more and not tried:
        yield held
        return
    pivot = (*more, *tried)[0]  # every largest set holds it, or one that does not meet it
    for one in [one for one in more if one is pivot or not one.where.meets(pivot.where)]:
        met_more, met_tried = ([o for o in part if o.where.meets(one.where) and o is not one] for part in (more, tried))
        yield from _meeting(met_more, (*held, one), tuple(met_tried))
        more, tried = [other for other in more if other is not one], (*tried, one)
