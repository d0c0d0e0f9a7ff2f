"""Path patching: what a sender does to the answer along one path alone, exactly; many paths in one forward pass.

It works with grouped-query attention: key and value readers are key-value heads (see `edge_nodes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.errors import ConfigError
from workbench.experiments.attribution_sites import aligned, named
from workbench.experiments.edge_nodes import RECEIVERS, SENDERS, Node, check_node, needed, patched_readings, written
from workbench.experiments.identity import describe_metric, describe_model
from workbench.experiments.metrics import Metric, recovered, score_rows
from workbench.experiments.pairs import Pairs, cells_per_pass
from workbench.experiments.result import Result
from workbench.experiments.sweeps import sweep
from workbench.hooks import HookPoint
from workbench.interventions.where import told
from workbench.models import Llama

Route = Sequence["str | Node"]


@torch.no_grad()
def path_patching(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    paths: Sequence[Route],
    *,
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Exact effect of a sender's clean output carried along one path only, everything else as in the corrupt run.

    A path is a sender and one or more receivers, as texts or Nodes: `["head 1.2", "q 3.1", "logits"]`. The first
    receiver reads the corrupt stream plus the sender's change; what it then writes differently goes to the next, and
    the last one's effect runs through the rest of the model freely (Wang et al., arXiv 2211.00593; Goldowsky-Dill et
    al., arXiv 2304.05969). A k or v receiver passes on what its whole group of heads writes. One row per pair and path:
    pair, path, `value` (metric), `effect` (change from the corrupt run), `recovered` (0 corrupt, 1 clean). Positions
    correspond as in `edge_attribution`. rows: how many sequences run together, several paths at a time; by default
    chosen by their length and the device. out: a directory that a killed call continues from.
    Raises ConfigError for a node that is unknown, in the wrong role, or not after the one before it.
    """
    versions = aligned(pairs)
    routes = [_route(model, path) for path in paths]
    names = needed(model, with_experts=any(route[0].kind == "expert" for route in routes))
    clean_logits, clean = model.run_with_cache(versions.clean, attention_mask=versions.clean_mask, names_filter=names)
    corrupt_logits, corrupt = model.run_with_cache(versions.corrupt, attention_mask=versions.mask, names_filter=names)
    ends = Ends(model, metric, versions.corrupt, versions.mask, versions.carried(clean, corrupt), corrupt)
    target, base = score_rows(metric, clean_logits), score_rows(metric, corrupt_logits)

    def measure(batch: Sequence[list[Node]]) -> pl.DataFrame:
        measured = zip(batch, ends.measure(batch), strict=True)
        return named(pl.concat([_frame(route, values, base, target) for route, values in measured]), pairs)

    settings = {
        "experiment": "path_patching", **describe_model(model), **describe_metric(metric), "pairs": pairs.describe(),
        "paths": [_label(route) for route in routes], "clean": target.tolist(), "corrupt": base.tolist(),
    }  # fmt: skip
    return sweep(
        routes, measure, settings, batch_size=cells_per_pass(model, pairs, rows), out=out, name="paths",
        progress=progress,
    )  # fmt: skip


def _label(route: Sequence[Node]) -> str:
    return " -> ".join(map(str, route))


def _frame(route: Sequence[Node], values: Tensor, base: Tensor, target: Tensor) -> pl.DataFrame:
    columns = {"value": values, "effect": values - base, "recovered": recovered(values, base, target)}
    return pl.DataFrame({"pair": range(len(values)), "path": [_label(route)] * len(values)}).with_columns(
        **{name: pl.Series(column.double().cpu().numpy()) for name, column in columns.items()}
    )


def _route(model: Llama, path: Route) -> list[Node]:
    nodes = [Node.parse(node) if isinstance(node, str) else node for node in path]
    if len(nodes) < 2:
        raise ConfigError(f"path: expected a sender and at least one receiver, got {len(nodes)} nodes.")
    check_node(model, nodes[0], SENDERS)
    for before, node in itertools.pairwise(nodes):
        check_node(model, node, RECEIVERS)
        if before.time(model) >= node.time(model):
            raise ConfigError(f"path: expected {str(node)!r} to act after {str(before)!r}, got the reverse.")
    return nodes


@dataclass(frozen=True, eq=False)
class Ends:
    """A clean and a corrupt run at the points that edges are computed from, and the corrupt prompts to run again."""

    model: Llama
    metric: Metric
    tokens: Tensor  # of the corrupt run [pair pos]
    mask: Tensor | None
    clean: ActivationCache
    corrupt: ActivationCache

    def measure(self, routes: Sequence[Sequence[Node]]) -> Tensor:  # [route pair]
        """The metric with each route's first node clean along the route; all routes run together."""
        deltas = [written(self.model, self.clean, r[0]) - written(self.model, self.corrupt, r[0]) for r in routes]
        for step in range(1, max(map(len, routes)) - 1):
            going = [number for number, route in enumerate(routes) if len(route) > step + 1]
            passed = self._passed_on([(routes[number][step], deltas[number]) for number in going])
            for number, delta in zip(going, passed, strict=True):
                deltas[number] = delta
        last = [(route[-1], delta) for route, delta in zip(routes, deltas, strict=True)]
        logits = self.run(patched_readings(self.model, self.corrupt, last), len(routes))
        return torch.stack([score_rows(self.metric, part) for part in logits.split(len(self.tokens))])

    def run(self, hooks: list[Any], n_copies: int, stop_at_layer: int | None = None) -> Tensor:
        """A pass over copies of the corrupt prompts, copy after copy."""
        mask = None if self.mask is None else self.mask.repeat(n_copies, 1)
        with told(self.model, self.tokens, self.mask):
            return self.model.run_with_hooks(
                self.tokens.repeat(n_copies, 1), attention_mask=mask, fwd_hooks=hooks, stop_at_layer=stop_at_layer
            )

    def _passed_on(self, cells: Sequence[tuple[Node, Tensor]]) -> list[Tensor]:
        """What each cell's node writes differently when it reads the cell's delta: [pair pos d_model] by cell."""
        names, found = [_written_at(node) for node, _ in cells], dict[str, Tensor]()

        def keep(x: Tensor, hook: HookPoint) -> None:
            found[hook.name] = x

        hooks = [*patched_readings(self.model, self.corrupt, cells), (sorted(set(names)), keep)]
        self.run(hooks, len(cells), stop_at_layer=1 + max(node.layer or 0 for node, _ in cells))
        copies = [{name: found[name].split(len(self.tokens))[number]} for number, name in enumerate(names)]
        return [
            written(self.model, ActivationCache(copy), node) - written(self.model, self.corrupt, node)
            for copy, (node, _) in zip(copies, cells, strict=True)
        ]


def _written_at(node: Node) -> str:
    return f"blocks.{node.layer}.{'attn.hook_z' if node.kind in ('q', 'k', 'v') else 'hook_mlp_out'}"
