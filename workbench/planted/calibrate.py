"""Calibrate the default pipeline for one shape of model: many trials, resumable, then tables and effect floors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import polars as pl
from tqdm import tqdm

from workbench.errors import ConfigError
from workbench.io.run_files import atomic, write_text
from workbench.planted.design import Design
from workbench.planted.trials import Trial, run_trial
from workbench.stats.calibration import (
    accuracy,
    average_precision,
    choose_floors,
    coverage,
    family_wise_error,
    floor_curve,
)


@dataclass(frozen=True)
class Scope:
    """What is tried, for a shape: n_experts, k. Draws are fresh documents; every second draw has another checkpoint.

    strengths, groups, draws: for the accuracy of "shared", "all" and "mode" (documents: two per group). nulls: trials
    without any effect. held: trials per strength of HELD and number of groups of HELD_GROUPS, all of one checkpoint,
    for coverage.
    """

    n_experts: int
    k: int
    strengths: tuple[float, ...] = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
    groups: tuple[int, ...] = (10, 20, 40)
    draws: int = 8
    nulls: int = 400
    held: int = 60
    n_words: int = 64

    def __post_init__(self) -> None:
        Design(self.n_experts, self.k)  # raises ConfigError for a shape that cannot be planted
        if self.draws < 2 or self.nulls < 1:
            raise ConfigError(f"draws: expected at least 2, got {self.draws}, and at least 1 null, got {self.nulls}.")


N_MODELS = 4
HELD, HELD_GROUPS = (0.05, 0.25), (20, 40, 80)
CONFOUNDED = (0.25, 1.0)
NULL_KINDS = ("planted", "null", "upcycled")


def quick(n_experts: int, k: int) -> Scope:
    """A scope for continuous integration: a minute, wide intervals."""
    return Scope(n_experts, k, strengths=(0.25,), groups=(40,), draws=4, nulls=40, held=0)


def plan_trials(scope: Scope) -> list[Trial]:
    """Every trial of a scope, each with its own documents."""

    def design(strength: float, draw: int, kind: str = "planted") -> Design:
        return Design(scope.n_experts, scope.k, strength=strength, kind=kind, seed=draw // 2 % N_MODELS)

    def trial(contrast: str, planted: Design, draw: int, n_groups: int = max(scope.groups)) -> Trial:
        return Trial(contrast, planted, n_groups, scope.n_words, draw)

    draws = range(scope.draws)
    trials = [
        trial(contrast, design(strength, draw), draw, n_groups)
        for contrast, strength, n_groups, draw in product(
            ("shared", "all", "mode"), scope.strengths, scope.groups, draws
        )
    ]
    trials += [trial("effort", design(strength, draw), draw) for strength, draw in product(scope.strengths, draws)]
    trials += [trial("confounded", design(strength, draw), draw) for strength, draw in product(CONFOUNDED, draws)]
    trials += [
        trial("null", design(0.25, draw, NULL_KINDS[draw % len(NULL_KINDS)]), draw) for draw in range(scope.nulls)
    ]
    held = range(1000, 1000 + scope.held)
    trials += [
        trial("shared", Design(scope.n_experts, scope.k, strength=strength, seed=99), draw, n_groups)
        for strength, n_groups, draw in product(HELD, HELD_GROUPS, held)
    ]
    return trials


def run_trials(trials: Sequence[Trial], folder: str | Path, progress: bool = True) -> pl.DataFrame:
    """Run the trials that `folder` does not hold yet; returns all of them below each other.

    Each trial is a file of its own that appears whole or not at all, so that an interrupted run continues.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{trial.name}.parquet" for trial in trials]
    missing = [(trial, file) for trial, file in zip(trials, files, strict=True) if not file.exists()]
    done = len(trials) - len(missing)
    bar = tqdm(missing, desc="calibrate", unit="trial", initial=done, total=len(trials), disable=not progress)
    for trial, file in bar:
        with atomic(file) as temporary:
            run_trial(trial).write_parquet(temporary)
    return pl.concat([pl.read_parquet(file) for file in files])


def score(
    trials: pl.DataFrame, floors: tuple[float, float] | None = None
) -> tuple[dict[str, pl.DataFrame], tuple[float, float]]:
    """(tables by name, floors). Floors are chosen on the even draws, and accuracy is that of the odd ones alone.

    With `floors`, which other trials must have chosen, nothing is chosen here and accuracy is that of all draws.
    """
    even = pl.col("draw") % 2 == 0
    plain = trials.filter(pl.col("draw") < 1000, pl.col("contrast") != "null")
    judged = plain if floors else plain.filter(~even)
    floors = floors or choose_floors(plain.filter(even))
    tables = {
        "accuracy": accuracy(judged, *floors),
        "accuracy_without_floors": accuracy(judged),
        "average_precision": average_precision(plain),
        "family_wise_error": family_wise_error(trials, *floors),
        "coverage": coverage(trials.filter((pl.col("draw") >= 1000) | (pl.col("contrast") == "null"))),
        "floor_curve": floor_curve(plain.filter(even)),
    }
    return tables, floors


def calibrate(
    scope: Scope, out: str | Path, progress: bool = True, floors: tuple[float, float] | None = None
) -> tuple[dict[str, pl.DataFrame], tuple[float, float]]:
    """Run and score a scope; writes trials/, one CSV per table and floors.json into `out`. See `score`."""
    out = Path(out)
    trials = run_trials(plan_trials(scope), out / "trials", progress)
    tables, floors = score(trials, floors)
    for name, table in tables.items():
        with atomic(out / f"{name}.csv") as file:
            table.write_csv(file, float_precision=4)
    found = {"n_experts": scope.n_experts, "k": scope.k, "risk_floor": floors[0], "logit_floor": floors[1]}
    write_text(out / "floors.json", json.dumps(found, indent=2) + "\n")
    return tables, floors


def summary(scope: Scope, tables: dict[str, pl.DataFrame], floors: tuple[float, float]) -> str:
    """The tables that matter, as text."""
    style = pl.Config(
        tbl_rows=200, tbl_cols=20, tbl_width_chars=160, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True,
        tbl_formatting="MARKDOWN", fmt_str_lengths=60, float_precision=3,
    )  # fmt: skip
    shown = ("contrast", "strength", "n_groups", "n_trials", "precision", "recall", "wrong")
    with style:
        parts = [
            f"{scope.n_experts} experts, k={scope.k}: floors |risk difference| {floors[0]:g}, |logit d| {floors[1]:g}",
            f"accuracy with these floors\n{tables['accuracy'].select(shown)}",
            f"accuracy of significance alone\n{tables['accuracy_without_floors'].select(shown[:-1])}",
            f"family-wise error without any effect\n{tables['family_wise_error']}",
            f"coverage of 95% intervals\n{tables['coverage']}",
            f"ranking\n{tables['average_precision']}",
        ]
    return "\n\n".join(parts)
