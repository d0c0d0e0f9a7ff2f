"""What is taken out of the model: experts by name, by a study's contrast or by a scan; and controls that match it."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from workbench.capture import routed_layers
from workbench.errors import RunError
from workbench.interventions import AddVector, Intervention, KnockOut, ProjectOut, Where
from workbench.models import Llama

Place = tuple[int, int]  # (layer, expert)
NEAREST = 6  # experts of the layer among which a control is drawn for each expert of a set
_CONTRASTS = ("shared", "contrasts")  # tables of a study, the one to be preferred first


@dataclass(frozen=True)
class Target:
    """A change to be judged, by name. `places` are the experts it is about; none for other interventions."""

    name: str
    items: tuple[Intervention, ...]
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Control:
    """One random change that matches a target, and the load of its experts over that of the target's."""

    items: tuple[Intervention, ...]
    load_ratio: float | None


def parse_places(text: str) -> tuple[Place, ...]:
    """ "2:5,2:7,3:0" as (layer, expert); or a file with such text, or with JSON [[2, 5], ...]. Raises RunError."""
    path = Path(text)
    if path.suffix or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path}: expected a file of experts, got {error.strerror}. Check the path.") from None
    try:
        if text.lstrip().startswith("["):
            found = [(int(layer), int(expert)) for layer, expert in json.loads(text)]
        else:
            words = text.replace(",", " ").split()
            found = [(int(layer), int(expert)) for layer, expert in (word.split(":") for word in words)]
    except (ValueError, TypeError):
        raise RunError(f"experts: expected layer:expert, such as 2:5,3:17, got {text[:60]!r}.") from None
    if not found:
        raise RunError("experts: expected one or more as layer:expert, got none.")
    return tuple(dict.fromkeys(found))


def knock_out(places: Sequence[Place], mode: str) -> tuple[Intervention, ...]:
    """One knock-out per layer. mode: "reroute", "drop" or "drop_renormalise" (docs/interventions.md)."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, expert in places:
        by_layer[layer].append(expert)
    return tuple(
        KnockOut(experts=tuple(experts), mode=mode, where=Where(layers=(layer,)))
        for layer, experts in sorted(by_layer.items())
    )


def check_places(model: Llama, places: Sequence[Place]) -> None:
    """Raises RunError for an expert that the model does not have."""
    layers, n_experts = routed_layers(model), int(getattr(model.cfg, "n_experts", 0))
    for layer, expert in places:
        if layer not in layers or not 0 <= expert < n_experts:
            raise RunError(
                f"experts: expected layers {', '.join(map(str, layers))} and experts 0 to {n_experts - 1}, "
                f"got {layer}:{expert}."
            )


def study_places(run: str | Path, n: int) -> tuple[str, dict[str, tuple[Place, ...]]]:
    """By language the `n` experts that a study found used most in it rather than in the other; and the table's name.

    The table is that of the same words in both languages ("shared") where the study has it, else that of all words.
    Prompts of the study are not items of a task, so nothing is chosen on what it is judged by. Raises RunError.
    """
    folder = Path(run) / "tables"
    names = [name for name in _CONTRASTS if (folder / f"{name}.parquet").is_file()]
    if not names:
        raise RunError(f"{run}: expected a study with tables/contrasts.parquet, got none. Run workbench study first.")
    frame = pl.read_parquet(folder / f"{names[0]}.parquet").sort("risk_difference", descending=True)
    places = list(frame.select("layer", "expert").iter_rows())
    return names[0], {"ja": tuple(places[:n]), "en": tuple(places[::-1][:n])}


def scan_places(scan: pl.DataFrame, n: int) -> dict[str, tuple[Place, ...]]:
    """By language the `n` experts whose removal costs it most more than the other; `scan` has selectivity by place."""
    ranked = scan.sort("selectivity", descending=True, nulls_last=True).drop_nulls("selectivity")
    places = list(ranked.select("layer", "expert").iter_rows())
    return {"ja": tuple(places[:n]), "en": tuple(places[::-1][:n])}


def matched_controls(
    target: Target, load: np.ndarray | None, n: int, seed: int, banned: Collection[Place] = ()
) -> list[Control]:
    """Up to `n` different random changes of the same kind: fewer where there are not so many, in an order of chance.

    Experts are replaced by others of the same layer that take about as many tokens: each by one of the NEAREST in
    load, a lone expert by any of the `n` nearest. None is in the target or `banned`. A vector that is added or
    projected out is replaced by a random direction of its length. load: [layer expert], share of tokens that choose
    the expert. Raises RunError for interventions that no random one matches.
    """
    rng = np.random.default_rng([seed, *target.name.encode()])
    items = tuple(part for item in target.items for part in _by_layer(item, target.places))
    taken = {*target.places, *banned}
    found: dict[str, Control] = {}
    for _ in range(50 * n):
        if len(found) == n:
            break
        control = _draw(items, load, taken, rng, NEAREST if len(target.places) != 1 else n)
        key = "|".join(_key(item) for item in control.items)
        found.setdefault(key, control)
    return list(found.values())


def _by_layer(item: Intervention, places: Sequence[Place]) -> Iterator[Intervention]:
    """The item once for each layer it acts in, since a control has other experts in each."""
    experts = getattr(item, "experts", None)
    layers = item.where.layers if item.where.layers is not None else sorted({layer for layer, _ in places})
    if experts is None or len(layers) == 1:
        yield item
        return
    for layer in layers:
        yield dataclasses.replace(item, where=dataclasses.replace(item.where, layers=(layer,)))


def _draw(
    items: Sequence[Intervention],
    load: np.ndarray | None,
    taken: Collection[Place],
    rng: np.random.Generator,
    nearest: int,
) -> Control:
    changed, own, other = [], 0.0, 0.0
    used = set(taken)
    for item in items:
        experts = getattr(item, "experts", None)
        if experts is not None:
            assert load is not None
            (layer,) = item.where.layers or (0,)
            chosen = _alike(layer, experts, load, used, rng, nearest)
            used |= {(layer, expert) for expert in chosen}
            own, other = own + float(load[layer, list(experts)].sum()), other + float(load[layer, chosen].sum())
            changed.append(dataclasses.replace(item, experts=tuple(chosen)))  # type: ignore[call-arg]
        else:
            changed.append(_random_direction(item, rng))
    return Control(tuple(changed), other / own if own else None)


def _alike(
    layer: int, experts: Sequence[int], load: np.ndarray, used: Collection[Place], rng: np.random.Generator, n: int
) -> list[int]:
    """Another expert for each, near it in load."""
    found: list[int] = []
    for expert in experts:
        free = [e for e in range(load.shape[1]) if (layer, e) not in used and e not in found]
        if not free:
            raise RunError(
                f"controls: expected {len(experts)} other experts in layer {layer}, got {len(found)}. Take out fewer."
            )
        free.sort(key=lambda other: (abs(load[layer, other] - load[layer, expert]), other))
        found.append(int(rng.choice(free[:n])))
    return found


def _random_direction(item: Intervention, rng: np.random.Generator) -> Intervention:
    names: dict[type[Intervention], str] = {AddVector: "vector", ProjectOut: "direction"}
    name = names.get(type(item))
    if name is None:
        raise RunError(
            f"controls: expected interventions on experts, add_vector or project_out, got {item.kind}, which no random "
            "one matches. Pass --controls 0."
        )
    vector = getattr(item, name)
    drawn = torch.tensor(rng.standard_normal(tuple(vector.shape)), dtype=vector.dtype)
    changed: dict[str, Any] = {name: drawn * (vector.norm() / drawn.norm())}
    return dataclasses.replace(item, **changed)


def _key(item: Intervention) -> str:
    experts = getattr(item, "experts", None)
    return f"{item.kind} {item.where} {sorted(experts) if experts is not None else id(item)}"


def target_of(name: str, items: Sequence[Intervention], model: Llama) -> Target:
    """A file's interventions as a target: the experts they name in the layers where they act."""
    places: list[Place] = []
    for item in items:
        for expert in getattr(item, "experts", None) or ():
            places += [(layer, expert) for layer in item.layers(model)]
    return Target(name, tuple(items), tuple(dict.fromkeys(places)))


def describe_places(places: Sequence[Place]) -> str:
    return ", ".join(f"{layer}:{expert}" for layer, expert in places)


def plain(items: Sequence[Intervention]) -> dict[str, Any]:
    """The interventions as JSON values, tensors included."""
    from workbench.interventions import to_json

    value: Mapping[str, Any] = to_json(items)
    return dict(value)
