"""Expert patching: how much of the answer one expert's contribution carries, by what it wrote or by being chosen.

An expert's contribution at a token is c_e = g_e · E_e(h), zero where it was not chosen. A patch adds the difference
between the source's and the target's contribution to the target's MLP output (arXiv 2606.03780), so nothing else in
the layer changes, and the rest of the model runs on from there. Three parts of that difference are told apart:

  both     g_e(source) · E_e(h source) - g_e(target) · E_e(h target)
  values   the target's routing is kept: g_e(target) · (E_e(h source) - E_e(h target))
  routing  values are recomputed on the target's input: (g_e(source) - g_e(target)) · E_e(h target)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from workbench.capture import routed_layers
from workbench.config import Qwen3MoeConfig
from workbench.errors import InterventionError, ShapeError
from workbench.experiments.identity import check_choices
from workbench.experiments.metrics import Metric
from workbench.experiments.pairs import Pairs, Runs
from workbench.experiments.result import Result
from workbench.experiments.sweeps import sweep
from workbench.hooks import HookPoint
from workbench.interventions.where import told
from workbench.models import Llama

MODES = ("both", "values", "routing")
Experts = Sequence[int] | Tensor  # the same for all pairs, or one for each [pair]
EVERY = "every"  # the coalition of all experts: the whole MLP output


class ExpertCell(NamedTuple):
    """One expert, or one coalition by its name, patched in all pairs at once."""

    mode: str
    layer: int
    expert: Any  # a number; None for a coalition
    coalition: str | None
    pos: str | int


@torch.no_grad()
def patch_experts(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    *,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    coalitions: Mapping[str, Sequence[int]] | None = None,
    modes: Sequence[str] = MODES,
    direction: str = "denoise",
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Patch one expert's contribution, and that of each coalition, by layer x expert x position x mode.

    experts: by default all that run at that position in either version of some pair; others contribute nothing.
    coalitions: names and their experts, whose contributions move together; "every", all experts at once, is always
    among them. Frame: `mode`, `layer`, `expert` (null for a coalition), `coalition`, `pos`, `pair`, `value`,
    `recovered` (0 corrupt, 1 clean) and the weights `clean_weight` and `corrupt_weight` the experts had (0: not run).
    Raises ConfigError for a dense model.
    """
    check_choices(layers=layers, experts=experts, modes=modes)
    if EVERY in (coalitions or {}):
        raise ShapeError(f"coalitions: expected other names than {EVERY!r}, which stands for all experts.")
    runs, columns = expert_runs(model, pairs, metric, direction), pairs.columns()
    n_experts = expert_count(model)
    groups = {EVERY: tuple(range(n_experts)), **{n: tuple(e) for n, e in (coalitions or {}).items()}}
    _check(n_experts, modes, experts, groups)
    chosen = routed_layers(model) if layers is None else tuple(layers)
    tables = Contributions(runs)
    cells = list(_cells(tables, chosen, experts, groups, modes, columns))
    settings = {
        "experiment": "expert_patching", "modes": list(modes), "layers": list(chosen),
        "experts": None if experts is None else list(experts),
        "coalitions": {name: list(group) for name, group in groups.items() if name != EVERY},
        "positions": list(columns), **runs.describe(),
    }  # fmt: skip

    def measure(batch: Sequence[ExpertCell]) -> pl.DataFrame:
        values, weights = [], []
        for layer, group in groupby(batch, key=lambda cell: cell.layer):
            table = tables[layer]
            deltas, places = [], []
            for cell in group:
                there, here = runs.columns(columns[cell.pos])
                members = groups[cell.coalition] if cell.coalition else (cell.expert,)
                deltas.append(table.delta(cell.mode, members, there, here))
                places.append(here)
                weights.append(table.clean_and_corrupt_weight(members, there, here, direction))
            values.append(run_deltas(runs, layer, torch.stack(deltas), torch.stack(places)))
        frame = runs.frame(batch, torch.cat(values))
        clean, corrupt = (torch.stack(side).flatten().cpu().numpy() for side in zip(*weights, strict=True))
        return frame.with_columns(
            pl.col("coalition").cast(pl.String), clean_weight=pl.Series(clean), corrupt_weight=pl.Series(corrupt)
        )

    return sweep(
        cells, measure, settings, batch_size=runs.per_pass(rows), out=out, name="expert patching", progress=progress
    )


def expert_runs(model: Llama, pairs: Pairs, metric: Metric, direction: str = "denoise") -> Runs:
    """Clean and corrupt run with what the experts read. Raises ConfigError for a dense model."""
    routed_layers(model)
    return Runs(model, pairs, metric, {"hook_resid_mid"}, direction, both=True)


def run_deltas(runs: Runs, layer: int, deltas: Tensor, places: Tensor) -> Tensor:
    """Add each delta [cell pair d_model] to the target's MLP output at its column [cell pair]: metric [cell pair]."""
    n_cells, n_pairs = places.shape
    first = runs.start(places)
    x = runs.resid[layer + 1][:, first:].repeat(n_cells, 1, 1)  # [(cell pair) pos d_model]
    rows = torch.arange(n_cells * n_pairs, device=x.device)
    x[rows, places.flatten() - first] += deltas.flatten(0, 1).to(x.dtype)
    return runs.continue_from(layer + 1, x, first)


def _cells(
    tables: Contributions,
    layers: Sequence[int],
    experts: Sequence[int] | None,
    groups: Mapping[str, Sequence[int]],
    modes: Sequence[str],
    columns: Mapping[Any, tuple[Tensor, Tensor]],
) -> Iterator[ExpertCell]:
    for layer in layers:
        for pos, places in columns.items():
            found = tables[layer].active(*tables.runs.columns(places)) if experts is None else experts
            for mode in modes:
                yield from (ExpertCell(mode, layer, expert, None, pos) for expert in found)
                yield from (ExpertCell(mode, layer, None, name, pos) for name in groups)


def _check_sum_stays(model: Llama, layer: int) -> None:
    """Raises InterventionError when a change of what the experts write would not reach the stream as it is."""
    after = {f"blocks.{layer}.hook_{leaf}" for leaf in ("mlp_out", "resid_post")}
    for edit in (edit for batch in model.batches for edit in batch.edits):
        if edit.point.name in after and edit.item.kind != "add_vector":
            raise InterventionError(
                f"expert patching: expected the sum of a layer's experts to reach the stream, got a {edit.item.kind} "
                f"at {edit.point.name}, which changes what a patch before it does. Patch other layers, or without it."
            )


def expert_count(model: Llama) -> int:
    assert isinstance(model.cfg, Qwen3MoeConfig)
    return model.cfg.n_experts


def _check(
    n_experts: int, modes: Sequence[str], experts: Sequence[int] | None, groups: Mapping[str, Sequence[int]]
) -> None:
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ShapeError(f"modes: expected some of {', '.join(MODES)}, got {', '.join(unknown) or 'none'}.")
    for expert in [*(experts or ()), *(expert for group in groups.values() for expert in group)]:
        if not 0 <= expert < n_experts:
            raise ShapeError(f"experts: expected 0 to {n_experts - 1}, got {expert}.")


class Contributions:
    """The contributions of every layer, computed when a layer is first asked for; the last few are kept."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._of = lru_cache(maxsize=2)(self._compute)

    def __getitem__(self, layer: int) -> LayerContributions:
        return self._of(layer)

    def _compute(self, layer: int) -> LayerContributions:
        if layer not in routed_layers(self.runs.model):
            raise ShapeError(f"layers: expected layers with experts, got {layer}.")
        _check_sum_stays(self.runs.model, layer)
        return LayerContributions(self.runs, layer)


class Slots(NamedTuple):
    """What the routed experts of one layer did: ids, weights [pair pos k], outputs before weighting [pair pos k d]."""

    ids: Tensor
    weights: Tensor
    out: Tensor

    def at(self, column: Tensor) -> Slots:  # [pair] -> [pair k ...]
        pair = torch.arange(len(column), device=column.device)
        return Slots(*(values[pair, column] for values in self))

    def weight_of(self, experts: Experts) -> Tensor:  # [pair], after `at`
        return (self.weights * self._held(experts)).sum(-1)

    def sum_of(self, experts: Experts) -> Tensor:  # weighted outputs [pair d_model], after `at`
        return (self.out * (self.weights * self._held(experts))[..., None]).sum(-2)

    def _held(self, experts: Experts) -> Tensor:  # bool [pair k]
        if isinstance(experts, Tensor):
            return self.ids == experts[:, None]
        return torch.isin(self.ids, torch.tensor(list(experts), device=self.ids.device))


class LayerContributions:
    """Both runs' experts in one layer, and each run's experts on the other run's input."""

    def __init__(self, runs: Runs, layer: int) -> None:
        self.runs, self.layer = runs, layer
        name = f"blocks.{layer}.hook_resid_mid"
        self.resid_mid = {"source": runs.source[name], "target": runs.target[name]}  # [pair pos d_model]
        self.source, self.target = (self._run(run, self.resid_mid[run], runs.positions(run)) for run in self.resid_mid)

    def active(self, there: Tensor, here: Tensor) -> list[int]:
        """Experts that run at the source's or target's columns in some pair."""
        ids = torch.cat([self.source.at(there).ids.flatten(), self.target.at(here).ids.flatten()])
        return sorted(set(ids.tolist()))

    def delta(self, mode: str, experts: Experts, there: Tensor, here: Tensor) -> Tensor:  # [pair d_model]
        """What a patch of these experts adds at column `here` of the target, from column `there` of the source."""
        source, target = self.source.at(there), self.target.at(here)
        if mode == "both":
            return source.sum_of(experts) - target.sum_of(experts)
        if mode == "values":  # the target's experts and weights on the source's input
            crossed = self._on("source", there, target)
            return crossed.sum_of(experts) - target.sum_of(experts)
        crossed = self._on("target", here, source)  # the source's experts and weights on the target's input
        return crossed.sum_of(experts) - target.sum_of(experts)

    def _on(self, run: str, column: Tensor, routed: Slots) -> Slots:
        """`routed` with outputs recomputed on another run's input at `column`, under that token's interventions."""
        pair = torch.arange(len(column), device=column.device)
        resid = self.resid_mid[run][pair, column][:, None]  # [pair 1 d_model]
        positions, _ = self.runs.positions(run)
        out = self._run(run, resid, (positions[pair, column][:, None], None), routed.ids[:, None]).out[:, 0]
        return routed._replace(out=out)

    def _run(
        self, run: str, resid_mid: Tensor, places: tuple[Tensor, Tensor | None], ids: Tensor | None = None
    ) -> Slots:
        with told(self.runs.model, *self.runs.inputs[run]):
            return run_experts(self.runs.model, self.layer, resid_mid, places, ids)

    def clean_and_corrupt_weight(
        self, experts: Sequence[int], there: Tensor, here: Tensor, direction: str
    ) -> tuple[Tensor, Tensor]:  # [pair] each
        weights = self.source.at(there).weight_of(experts), self.target.at(here).weight_of(experts)
        return weights if direction == "denoise" else weights[::-1]


def run_experts(
    model: Llama, layer: int, resid_mid: Tensor, places: tuple[Tensor, Tensor | None], ids: Tensor | None = None
) -> Slots:
    """A layer's router and experts on a residual stream [batch pos d_model]; `ids` [batch pos k] forces the experts.

    places: the positions of its tokens [batch pos], and where there is one (None: everywhere), for interventions.
    """
    block: Any = model.blocks[layer]
    found: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        found[hook.name.rpartition("hook_")[2]] = x

    prefix = f"blocks.{layer}.mlp.hook_"
    force = [] if ids is None else [(f"{prefix}expert_ids", lambda x, hook: ids)]
    listen = [(f"{prefix}{leaf}", keep) for leaf in ("expert_ids", "routing_weights", "expert_out")]
    for batch in model.batches:  # else they would act where the last pass had their tokens
        batch.begin(None, *places, False)
    with model.hooks([*force, *listen]):
        block.mlp(block.ln2(resid_mid), None)
    return Slots(found["expert_ids"], found["routing_weights"], found["expert_out"])
