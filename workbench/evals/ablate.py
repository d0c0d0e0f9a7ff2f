"""Evaluation under intervention: the same items at the baseline, under each change, and under changes that match it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from workbench.capture import routed_layers
from workbench.errors import RunError
from workbench.evals.adapter import WorkbenchLM
from workbench.evals.conditions import AblatePlan, Ablator
from workbench.evals.targets import (
    Control,
    Place,
    Target,
    check_places,
    describe_places,
    knock_out,
    matched_controls,
    scan_places,
)
from workbench.io.run_files import atomic
from workbench.stats.losses import carries, choose_metric, item_losses, judge, language_losses

BASELINE = "baseline"


@dataclass(frozen=True)
class Ablation:
    """What was measured. conditions: one row per condition with its role, target and experts. items: one row per
    condition, item and metric. losses: `stats.losses.language_losses` of all conditions, judged: those with controls
    and what these say, `carries` among it. scan: the losses of single experts on the discovery half, or None."""

    path: Path
    manifest: dict[str, Any]
    conditions: pl.DataFrame
    items: pl.DataFrame
    losses: pl.DataFrame
    judged: pl.DataFrame
    metric: str
    scan: pl.DataFrame | None = None


def ablate(
    lm: WorkbenchLM, targets: Sequence[Target], plan: AblatePlan, out: str | Path, progress: bool = True
) -> Ablation:
    """Evaluate the baseline, every target and its matched controls; returns and writes what they cost each language."""
    ablator = Ablator(lm, plan, out)
    for target in targets:
        if target.places:
            check_places(lm.model, target.places)
    return _finish(ablator, _judged_conditions(ablator, targets, progress), targets)


def ablate_by_scan(
    lm: WorkbenchLM,
    plan: AblatePlan,
    out: str | Path,
    n: int,
    mode: str = "reroute",
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Ablation:
    """Take out every expert alone; then judge the `n` that cost Japanese most, and those that cost English most.

    The groups of items are halved by a hash of their names. Experts are chosen on the discovery half and the two sets
    are judged, against matched controls, on the validation half alone: nothing is judged by what it was chosen by.
    """
    ablator = Ablator(lm, plan, out)
    usable = [layer for layer in routed_layers(lm.model) if layers is None or layer in layers]
    n_experts = int(getattr(lm.model.cfg, "n_experts", 0))
    places = [(layer, expert) for layer in usable for expert in range(n_experts)]
    if not places:
        raise RunError(f"layers: expected some of {', '.join(map(str, routed_layers(lm.model)))}, got {layers}.")
    frames = [ablator.run(BASELINE, "baseline", ())]
    for place in _bar(places, "scan", progress):
        name = f"scan {mode} {describe_places([place])}"
        frames.append(ablator.run(name, "scan", knock_out([place], mode), experts=describe_places([place])))
    items = pl.concat(frames)
    discovery = items.filter(_is_discovery(items))
    metric = choose_metric(items, plan.metric)
    scan = language_losses(item_losses(discovery), metric)
    scan = _with_places(scan, places, mode)
    chosen = scan_places(scan, n)
    targets = [Target(f"{mode} {lang} {n}", knock_out(found, mode), found) for lang, found in chosen.items()]
    judged = _judged_conditions(ablator, targets, progress)
    return _finish(ablator, judged, targets, scan)


def _judged_conditions(ablator: Ablator, targets: Sequence[Target], progress: bool) -> pl.DataFrame:
    """Items of the baseline, the targets and their controls."""
    plan, every = ablator.plan, {place for target in targets for place in target.places}
    todo = [partial(ablator.run, BASELINE, "baseline", ())]
    for target in targets:
        load = ablator.load() if target.places else None
        # sets are not compared with experts that another set was chosen for; a lone expert is, with any of its layer
        banned = every if len(target.places) > 1 else ()
        controls = matched_controls(target, load, plan.n_controls, plan.seed, banned) if plan.n_controls else []
        about = {"target": target.name, "experts": describe_places(target.places)}
        todo.append(partial(ablator.run, target.name, "target", target.items, **about))
        todo += [partial(_run_control, ablator, target, draw, control) for draw, control in enumerate(controls)]
    return pl.concat([job() for job in _bar(todo, "conditions", progress)])


def _run_control(ablator: Ablator, target: Target, draw: int, control: Control) -> pl.DataFrame:
    experts = [
        (layer, expert)
        for item in control.items
        for layer in item.where.layers or ()
        for expert in getattr(item, "experts", ())
    ]
    return ablator.run(
        f"{target.name} · control {draw}", "control", control.items,
        target=target.name, draw=draw, experts=describe_places(experts), load_ratio=control.load_ratio,
    )  # fmt: skip


def _finish(
    ablator: Ablator, items: pl.DataFrame, targets: Sequence[Target], scan: pl.DataFrame | None = None
) -> Ablation:
    """Judge, and write every table."""
    plan = ablator.plan
    metric = choose_metric(items, plan.metric)
    losses = item_losses(items if scan is None else items.filter(~_is_discovery(items)))
    summary = language_losses(losses, metric)
    conditions = _conditions(ablator)
    controls = {
        target.name: conditions.filter(pl.col("target") == target.name, pl.col("role") == "control")[
            "condition"
        ].to_list()
        for target in targets
    }
    judged = judge(losses, summary, controls, metric, plan.seed, plan.n_resamples)
    judged = judged.with_columns(
        carries=carries(judged), experts=pl.Series([_named(targets, name) for name in judged["condition"]])
    )
    found = Ablation(ablator.out, ablator.manifest, conditions, items, summary, judged, metric, scan)
    for name, frame in tables(found).items():
        with atomic(ablator.out / f"{name}.parquet") as file:
            frame.write_parquet(file)
    judged.write_csv(ablator.out / "judged.csv")
    return found


def tables(found: Ablation) -> dict[str, pl.DataFrame]:
    """Every frame by the name of its file."""
    frames = {"items": found.items, "conditions": found.conditions, "losses": found.losses, "judged": found.judged}
    return frames | ({"scan": found.scan} if found.scan is not None else {})


def _named(targets: Sequence[Target], name: str) -> str:
    return next((describe_places(target.places) for target in targets if target.name == name), "")


def _conditions(ablator: Ablator) -> pl.DataFrame:
    """One row per condition; with the share of tokens that choose its experts, in each language."""
    schema = {
        "condition": pl.String, "role": pl.String, "key": pl.String, "target": pl.String, "draw": pl.Int64,
        "experts": pl.String, "load_ratio": pl.Float64,
    }  # fmt: skip
    frame = pl.DataFrame(ablator.rows, schema=schema).unique("condition", keep="first", maintain_order=True)
    by_lang = ablator.load_by_lang() if frame["experts"].drop_nulls().str.len_chars().sum() else {}
    for lang, load in by_lang.items():
        places = [[_place(word) for word in (text or "").split(", ") if word] for text in frame["experts"]]
        frame = frame.with_columns(pl.Series(f"load_{lang}", [float(sum(load[p] for p in found)) for found in places]))
    return frame


def _place(word: str) -> Place:
    layer, expert = word.split(":")
    return int(layer), int(expert)


def _with_places(scan: pl.DataFrame, places: Sequence[Place], mode: str) -> pl.DataFrame:
    known = pl.DataFrame(
        [(f"scan {mode} {describe_places([place])}", *place) for place in places],
        schema={"condition": pl.String, "layer": pl.Int64, "expert": pl.Int64},
        orient="row",
    )
    return known.join(scan, on="condition", how="left", maintain_order="left")


def is_discovery(group: str) -> bool:
    """The half that a group of items is in, by a hash of its name."""
    return hashlib.sha256(f"half/{group}".encode()).digest()[0] % 2 == 0


def _is_discovery(items: pl.DataFrame) -> pl.Series:
    halves = {group: is_discovery(group) for group in items["group"].unique()}
    return items["group"].replace_strict(halves, return_dtype=pl.Boolean)


def _bar(jobs: Sequence[Any], what: str, progress: bool) -> Any:
    return tqdm(jobs, desc=what, unit="pass", disable=None if progress else True)
