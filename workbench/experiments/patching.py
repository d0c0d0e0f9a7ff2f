"""Activation patching: which activation, moved from one run into another, carries the answer (arXiv 2202.05262).

Many patches run in one forward pass, along the batch axis, and each pass starts at the layer that is patched: what lies
before it is the same in every run and is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.experiments.identity import check_choices
from workbench.experiments.metrics import Metric
from workbench.experiments.pairs import Pairs, Runs
from workbench.experiments.result import Result
from workbench.experiments.sweeps import sweep
from workbench.hooks import HookPoint
from workbench.models import Llama

# component -> its hook point in a block; q and z are per head, k and v per kv_head
COMPONENTS = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_HEADS = {"q": "n_heads", "z": "n_heads", "k": "n_kv_heads", "v": "n_kv_heads"}
ALL = "all"  # the label of a patch at every position at once


class Cell(NamedTuple):
    """One patch, made in all pairs at once."""

    component: str
    layer: int
    head: int | None
    pos: str | int


@torch.no_grad()
def patch(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    components: str | Sequence[str] = "resid_pre",
    *,
    layers: Sequence[int] | None = None,
    all_positions: bool = False,
    together: Mapping[str, Sequence[Any]] | None = None,
    direction: str = "denoise",
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Patch every component x layer x head x position, one at a time.

    "denoise" puts clean activations into the corrupt run (is it enough to restore the answer?), "noise" corrupt ones
    into the clean run (is it needed?). Frame: `component`, `layer`, `head` (kv_head for k and v; null for components
    without heads), `pos` (number or label), `pair`, `value` of the metric and `recovered`, which is 0 at the corrupt
    and 1 at the clean run's value, in both directions. `result.mean("recovered", by=[...])` adds intervals over pairs.

    all_positions: patch a component at all positions at once. together: sets of the pairs' named positions, each under
    a label of its own, that are also patched all at once, for an answer that is partly at its subject and partly at the
    end already. rows: how many sequences run together; by default chosen by their length and the device. out: a
    directory that a killed sweep continues from. Raises ShapeError when the metric does not tell clean from corrupt, or
    when `together` names what is not there.
    """
    names = [components] if isinstance(components, str) else list(components)
    check_choices(components=names, layers=layers)
    sets = dict(together or {})
    if all_positions and (sets or pairs.corrupt_mask is not None):
        wrong = "sets of positions" if sets else "masks that differ"
        raise ShapeError(f"all_positions: expected versions of one length and no sets, got {wrong}. Name positions.")
    columns = {ALL: None} if all_positions else pairs.columns() | _sets(pairs, sets)
    cells = list(_cells(model, names, layers, list(columns)))
    runs = Runs(model, pairs, metric, {COMPONENTS[name] for name in names}, direction)
    settings = {
        "experiment": "patching", "components": names, "layers": sorted({cell.layer for cell in cells}),
        "positions": ALL if all_positions else list(columns), **runs.describe(),
        "together": {label: list(members) for label, members in sets.items()},
    }  # fmt: skip

    def measure(batch: Sequence[Cell]) -> pl.DataFrame:
        groups = [list(group) for _, group in groupby(batch, key=lambda cell: cell.layer)]
        values = torch.cat([_run_cells(runs, group, columns) for group in groups])  # [cell pair]
        return runs.frame(batch, values)

    batch_size = runs.per_pass(rows)
    result = sweep(cells, measure, settings, batch_size=batch_size, out=out, name="patching", progress=progress)
    order = {name: place for place, name in enumerate(names)}
    sorted_frame = result.frame.sort(pl.col("component").replace_strict(order), "layer", "head", maintain_order=True)
    return Result(sorted_frame, result.settings)


def _sets(pairs: Pairs, together: Mapping[str, Sequence[Any]]) -> dict[Any, Any]:
    """For each set its members' columns [member pair] in the clean and in the corrupt version."""
    single = pairs.columns()
    found = {}
    for label, members in together.items():
        if pairs.positions is None or not members or not set(members) <= set(single) or label in single:
            raise ShapeError(
                f"together: expected a new label for some of the pairs' named positions, got {label!r} for "
                f"{', '.join(map(repr, members)) or 'none'}. Name positions in Pairs(positions=...); there are "
                f"{', '.join(map(repr, pairs.positions or ())) or 'none'}."
            )
        sides = zip(*(single[member] for member in members), strict=True)
        found[label] = tuple(torch.stack(side) for side in sides)
    return found


def _cells(model: Llama, names: Sequence[str], layers: Sequence[int] | None, labels: Sequence[Any]) -> Iterator[Cell]:
    """Layer by layer and position by position, so that what runs together starts late in both."""
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown or not names:
        raise ShapeError(f"components: expected some of {', '.join(COMPONENTS)}, got {', '.join(unknown) or 'none'}.")
    chosen = range(model.cfg.n_layers) if layers is None else sorted(layers)  # one order, whoever continues a sweep
    for layer in chosen:
        if not 0 <= layer < model.cfg.n_layers:
            raise ShapeError(f"layers: expected 0 to {model.cfg.n_layers - 1}, got {layer}.")
        for label in labels:
            for name in names:
                heads = range(getattr(model.cfg, _HEADS[name])) if name in _HEADS else (None,)
                yield from (Cell(name, layer, head, label) for head in heads)


def _run_cells(runs: Runs, cells: Sequence[Cell], columns: Mapping[Any, Any]) -> Tensor:  # [cell pair]
    """Cells of one layer: those on the residual stream need no hook, and those behind the layer not even the layer."""
    values = torch.empty(len(cells), runs.pairs.n_pairs)
    by_start: dict[int, list[int]] = {}
    for place, cell in enumerate(cells):
        by_start.setdefault(cell.layer + (cell.component == "resid_post"), []).append(place)
    here = {label: runs.columns(places) for label, places in columns.items() if places is not None}
    for start, places in by_start.items():
        chosen = [cells[place] for place in places]
        first = 0 if ALL in columns else runs.start(torch.cat([here[cell.pos][1].flatten() for cell in chosen]))
        x = runs.resid[start][:, first:].repeat(len(chosen), 1, 1)  # [(cell pair) pos d_model]
        hooks = []
        for component in dict.fromkeys(cell.component for cell in chosen):
            edit = _Edit(runs, component, chosen, here, first)
            if component in ("resid_pre", "resid_post"):
                x = edit(x)
            else:
                hooks.append((f"blocks.{start}.{COMPONENTS[component]}", edit))
        values[places] = runs.continue_from(start, x, first, hooks)
    return values


class _Edit:
    """Puts the source's activation of one component into each cell's own rows, heads and columns."""

    def __init__(
        self, runs: Runs, component: str, cells: Sequence[Cell], columns: Mapping[Any, tuple[Tensor, Tensor]],
        first: int,
    ) -> None:  # fmt: skip
        self.n_pairs, self.device = runs.pairs.n_pairs, runs.model.device
        self.source = runs.source[f"blocks.{cells[0].layer}.{COMPONENTS[component]}"]  # [pair pos ...]
        self.mine = [(place, cell) for place, cell in enumerate(cells) if cell.component == component]
        self.columns, self.first = columns, first

    def __call__(self, x: Tensor, hook: HookPoint | None = None) -> Tensor:  # [(cell pair) pos ...]
        x = x.clone()
        pair = torch.arange(self.n_pairs, device=self.device)
        for place, cell in self.mine:
            part, new = x[place * self.n_pairs : (place + 1) * self.n_pairs], self.source
            if cell.head is not None:
                part, new = part[:, :, cell.head], new[:, :, cell.head]
            if cell.pos == ALL:
                part.copy_(new)
            else:
                there, here = self.columns[cell.pos]
                part[pair, here - self.first] = new[pair, there]
        return x
