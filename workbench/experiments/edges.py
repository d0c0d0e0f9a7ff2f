"""Which part talks to which: edge attribution for every edge at once, path patching (`paths`) for single ones, exactly.

Both work with grouped-query attention: key and value readers are key-value heads (see `edge_nodes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.errors import ConfigError
from workbench.experiments.attribution_sites import Versions, aligned, named
from workbench.experiments.edge_nodes import (
    RECEIVERS,
    SENDERS,
    Node,
    needed,
    part,
    reading,
    reading_point,
    receivers,
    senders,
    stream,
    written,
)
from workbench.experiments.identity import check_choices, describe_metric, describe_model
from workbench.experiments.metrics import Metric, score_rows
from workbench.experiments.pairs import Pairs, cells_per_pass
from workbench.experiments.paths import Ends, path_patching
from workbench.experiments.result import Result
from workbench.experiments.sweeps import staged, sweep
from workbench.hooks import HookPoint
from workbench.models import Llama
from workbench.models.layers import wide

__all__ = ["edge_attribution", "path_patching"]

_PER_PASS = 64  # receivers whose gradients are in memory at a time


def edge_attribution(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    *,
    from_: Sequence[str] = ("embed", "head", "mlp"),
    to: Sequence[str] = ("q", "k", "v", "mlp", "logits"),
    exact_sample: int = 0,
    seed: int = 0,
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """First-order effect on `metric` of carrying each sender's clean output to each receiver alone (EAP, 2310.10348).

    value = sum over positions of (sender's output in the clean run - in the corrupt run) · gradient of the metric at
    the receiver's own reading of the residual stream, in the corrupt run. Senders: embed, head, mlp, expert (instead of
    mlp in sparse layers). Receivers: q by head, k and v by key-value head, mlp, logits; and in sparse layers, instead
    of mlp, router and experts, which sum to it. One row per pair and edge: pair, sender, receiver (as "head 1.2",
    "k 3.0", "mlp 2"), value, and `exact`, the effect by path patching, for `exact_sample` edges (the half with the
    largest estimates and as many others at random), else null. `settings["agreement"]` has their correlation.
    Interventions at a receiver or at the norm before it take part in its gradient. rows: how many sequences run
    together in path patching. out: a directory that a killed call continues from.
    Where the pairs' positions lie in different columns, as between languages, outputs are carried between these alone.
    """
    _check(from_, to)
    froms, tos = senders(model, tuple(from_)), receivers(model, tuple(to))
    ends, gradients, base = _both_runs(model, aligned(pairs), metric, tos, "expert" in from_)
    deltas = {node: written(model, ends.clean, node) - written(model, ends.corrupt, node) for node in froms}
    settings = {
        "experiment": "edge_attribution", **describe_model(model), **describe_metric(metric), "from": list(from_),
        "to": list(to), "pairs": pairs.describe(), "exact_sample": exact_sample, "seed": seed, "corrupt": base.tolist(),
    }  # fmt: skip

    def run(at: Callable[[str], Path | None]) -> Result:
        estimates = sweep(
            tos, lambda batch: _estimates(ends, gradients, deltas, batch), settings, batch_size=_PER_PASS,
            out=at("estimates"), name="edges", progress=progress,
        ).frame  # fmt: skip
        if edges := _sample(estimates, exact_sample, seed):
            exact = sweep(
                edges, lambda batch: _measure(ends, base, batch), settings,
                batch_size=cells_per_pass(model, pairs, rows), out=at("exact"), name="exact", progress=progress,
            ).frame  # fmt: skip
            on = ["pair", "sender", "receiver"]
            frame = estimates.join(exact, on=on, how="left", maintain_order="left")
        else:
            frame = estimates.with_columns(exact=pl.lit(None, pl.Float64))
        return Result(named(frame, pairs), {**settings, "agreement": _agreement(frame)})

    return staged(run, settings, out)


def _check(from_: Sequence[str], to: Sequence[str]) -> None:
    check_choices(from_=from_, to=to)
    for name, kinds, known in (("from_", from_, SENDERS), ("to", to, RECEIVERS)):
        for kind in kinds:
            if kind not in known:
                raise ConfigError(f"{name}: expected some of {', '.join(known)}, got {kind!r}.")


def _both_runs(
    model: Llama, versions: Versions, metric: Metric, tos: Sequence[Node], experts: bool
) -> tuple[Ends, dict[str, Tensor], Tensor]:
    """Both runs, and the metric of the corrupt one with its gradients where the receivers read."""
    names = needed(model, experts)
    with torch.no_grad():
        _, clean = model.run_with_cache(versions.clean, attention_mask=versions.clean_mask, names_filter=names)
    watched = sorted({reading_point(model, read) for node in tos for read in _readings(node)})
    live: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        live[hook.name] = x

    hooks = [("hook_embed", lambda x, hook: x.detach().requires_grad_()), (sorted({*names, *watched}), keep)]
    with torch.enable_grad():
        logits = model.run_with_hooks(versions.corrupt, attention_mask=versions.mask, fwd_hooks=hooks)
        values = score_rows(metric, logits)
        wanted = [name for name in watched if live[name].requires_grad]  # not what an intervention sets
        found = torch.autograd.grad(values.sum(), [live[name] for name in wanted], allow_unused=True)
    gradients = {n: torch.zeros_like(live[n]) for n in watched}
    gradients |= {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
    corrupt = ActivationCache({n: live[n].detach() for n in names})
    ends = Ends(model, metric, versions.corrupt, versions.mask, versions.carried(clean, corrupt), corrupt)
    return ends, gradients, values.detach()


def _readings(node: Node) -> list[Node]:
    """The readers that make a receiver up: the experts are the mixture without its router."""
    return [Node("mlp", node.layer), Node("router", node.layer)] if node.kind == "experts" else [node]


@torch.no_grad()
def _estimates(
    ends: Ends, gradients: dict[str, Tensor], deltas: dict[Node, Tensor], batch: Sequence[Node]
) -> pl.DataFrame:
    """Some receivers' edges: pair, sender, receiver and the first-order effect."""
    pulled = _gradients_of_readings(ends, gradients, [read for node in batch for read in _readings(node)])
    rows = []
    for receiver in batch:
        first, *rest = (pulled[read] for read in _readings(receiver))
        gradient = first - rest[0] if rest else first  # [pair pos d_model]
        for sender, delta in deltas.items():
            if sender.time(ends.model) < receiver.time(ends.model):
                values = (delta * gradient).sum((1, 2)).double().tolist()
                rows += [(pair, str(sender), str(receiver), value) for pair, value in enumerate(values)]
    schema = {"pair": pl.Int64, "sender": pl.String, "receiver": pl.String, "value": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _gradients_of_readings(
    ends: Ends, gradients: dict[str, Tensor], nodes: Sequence[Node]
) -> dict[Node, Tensor]:  # [pair pos d_model] each
    """The metric's gradient at what each receiver alone reads of the stream, in a pass of the corrupt prompts.

    It goes back through the receiver's projection and norm, and through the interventions on either, which act by what
    is running.
    """
    found: dict[Node, Tensor] = {}

    def pull(node: Node) -> Callable[[Tensor, HookPoint], None]:
        def at(old: Tensor, hook: HookPoint) -> None:
            own = part(slice(None), node)
            with torch.enable_grad():
                x = wide(stream(ends.model, ends.corrupt, node)).detach().requires_grad_()
                read = reading(ends.model, hook, old.detach(), x, [(slice(None), node)])[own]
                given = gradients[hook.name][own].to(read.dtype)
                grad = torch.autograd.grad(read, x, given, allow_unused=True)[0] if read.requires_grad else None
            found[node] = torch.zeros_like(x) if grad is None else grad

        return at

    hooks = [(reading_point(ends.model, node), pull(node)) for node in dict.fromkeys(nodes)]
    n_layers = ends.model.cfg.n_layers
    ends.run(hooks, 1, 1 + max(n_layers - 1 if node.layer is None else node.layer for node in nodes))
    return found


def _sample(frame: pl.DataFrame, n_edges: int, seed: int) -> list[tuple[str, str]]:
    means = frame.group_by("sender", "receiver", maintain_order=True).agg(pl.col("value").mean().abs())
    ranked = means.sort("value", descending=True, maintain_order=True)
    n_top = min(n_edges - n_edges // 2, len(ranked))
    rest = ranked[n_top:]
    chosen = pl.concat([ranked[:n_top], rest.sample(min(n_edges // 2, len(rest)), seed=seed)])
    return chosen.select("sender", "receiver").rows()


@torch.no_grad()
def _measure(ends: Ends, base: Tensor, edges: Sequence[tuple[str, str]]) -> pl.DataFrame:
    """pair, sender, receiver and `exact`, the effect by path patching."""
    effects = (ends.measure([list(map(Node.parse, edge)) for edge in edges]) - base).double().tolist()
    rows = [(pair, *edge, effect) for edge, of in zip(edges, effects, strict=True) for pair, effect in enumerate(of)]
    schema = {"pair": pl.Int64, "sender": pl.String, "receiver": pl.String, "exact": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _agreement(frame: pl.DataFrame) -> dict[str, float | int | None]:
    means = (
        frame.drop_nulls("exact")
        .group_by("sender", "receiver", maintain_order=True)
        .agg(pl.col("value", "exact").mean())
    )
    if len(means) < 3:
        return {"pearson": None, "spearman": None, "n_edges": len(means)}
    found = means.select(pearson=pl.corr("value", "exact"), spearman=pl.corr("value", "exact", method="spearman"))
    return {**found.fill_nan(None).row(0, named=True), "n_edges": len(means)}
