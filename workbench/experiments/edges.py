"""Which part talks to which: edge attribution for every edge at once, path patching for single ones, exactly.

Both work with grouped-query attention: key and value readers are key-value heads (see `edge_nodes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from workbench.errors import ConfigError
from workbench.experiments.attribution_sites import Versions, aligned, named
from workbench.experiments.edge_nodes import (
    RECEIVERS,
    SENDERS,
    Node,
    check_node,
    needed,
    patched_reading,
    projection,
    pull_back,
    receivers,
    senders,
    stream,
    written,
)
from workbench.experiments.identity import describe_metric, describe_model
from workbench.experiments.metrics import Metric, recovered, score_rows
from workbench.experiments.pairs import Pairs
from workbench.experiments.result import Result
from workbench.hooks import ActivationCache, HookPoint
from workbench.models import Llama
from workbench.models.layers import wide

Path = Sequence["str | Node"]


def edge_attribution(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    *,
    from_: Sequence[str] = ("embed", "head", "mlp"),
    to: Sequence[str] = ("q", "k", "v", "mlp", "logits"),
    exact_sample: int = 0,
    seed: int = 0,
) -> Result:
    """First-order effect on `metric` of carrying each sender's clean output to each receiver alone (EAP, 2310.10348).

    value = sum over positions of (sender's output in the clean run - in the corrupt run) · gradient of the metric at
    the receiver's own reading of the residual stream, in the corrupt run. Senders: embed, head, mlp, expert (instead of
    mlp in sparse layers). Receivers: q by head, k and v by key-value head, mlp, logits; and in sparse layers, instead
    of mlp, router and experts, which sum to it. One row per pair and edge: pair, sender, receiver (as "head 1.2",
    "k 3.0", "mlp 2"), value, and `exact`, the effect by path patching, for `exact_sample` edges (the half with the
    largest estimates and as many others at random), else null. `settings["agreement"]` has their correlation.
    Where the pairs' positions lie in different columns, as between languages, outputs are carried between these alone.
    """
    _check(from_, to)
    versions = aligned(pairs)
    corrupt, mask = versions.corrupt, versions.mask
    froms, tos = senders(model, tuple(from_)), receivers(model, tuple(to))
    clean_cache, corrupt_cache, gradients, base = _both_runs(model, versions, metric, tos, "expert" in from_)
    deltas = [written(model, clean_cache, node) - written(model, corrupt_cache, node) for node in froms]
    rows = []
    for receiver in tos:
        pulled = _gradient_at_reading(model, corrupt_cache, gradients, receiver)  # [pair pos d_model]
        for sender, delta in zip(froms, deltas, strict=True):
            if sender.time(model) < receiver.time(model):
                values = (delta * pulled).sum((1, 2)).double().tolist()
                rows += [(pair, str(sender), str(receiver), value) for pair, value in enumerate(values)]
    frame = pl.DataFrame(rows, schema=["pair", "sender", "receiver", "value"], orient="row")
    measured = _sample(frame, exact_sample, seed)
    exact = _measure_edges(model, corrupt, metric, mask, measured, clean_cache, corrupt_cache, base)
    frame = frame.join(exact, on=["pair", "sender", "receiver"], how="left", maintain_order="left")
    settings = {
        "experiment": "edge_attribution", **describe_model(model), **describe_metric(metric), "from": list(from_),
        "to": list(to), "pairs": pairs.describe(), "exact_sample": exact_sample, "seed": seed,
        "agreement": _agreement(frame),
    }  # fmt: skip
    return Result(named(frame, pairs), settings)


@torch.no_grad()
def path_patching(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    paths: Sequence[Path],
) -> Result:
    """Exact effect of a sender's clean output carried along one path only, everything else as in the corrupt run.

    A path is a sender and one or more receivers, as texts or Nodes: `["head 1.2", "q 3.1", "logits"]`. The first
    receiver reads the corrupt stream plus the sender's change; what it then writes differently goes to the next, and
    the last one's effect runs through the rest of the model freely (Wang et al., arXiv 2211.00593; Goldowsky-Dill et
    al., arXiv 2304.05969). A k or v receiver passes on what its whole group of heads writes. One row per pair and path:
    pair, path, `value` (metric), `effect` (change from the corrupt run), `recovered` (0 corrupt, 1 clean). Positions
    correspond as in `edge_attribution`.
    Raises ConfigError for a node that is unknown, in the wrong role, or not after the one before it.
    """
    versions = aligned(pairs)
    corrupt, mask = versions.corrupt, versions.mask
    routes = [_route(model, path) for path in paths]
    names = needed(model, with_experts=any(route[0].kind == "expert" for route in routes))
    clean_logits, clean_cache = model.run_with_cache(
        versions.clean, attention_mask=versions.clean_mask, names_filter=names
    )
    corrupt_logits, corrupt_cache = model.run_with_cache(corrupt, attention_mask=mask, names_filter=names)
    clean_cache = versions.carried(clean_cache, corrupt_cache)
    target, base = score_rows(metric, clean_logits), score_rows(metric, corrupt_logits)
    frames = []
    for route in routes:
        values = _run_path(model, corrupt, metric, mask, route, clean_cache, corrupt_cache)
        columns = {"value": values, "effect": values - base, "recovered": recovered(values, base, target)}
        label = " -> ".join(map(str, route))
        frames.append(
            pl.DataFrame({"pair": range(len(values)), "path": [label] * len(values)}).with_columns(
                **{name: pl.Series(column.double().cpu().numpy()) for name, column in columns.items()}
            )
        )
    settings = {
        "experiment": "path_patching",
        **describe_model(model),
        **describe_metric(metric),
        "pairs": pairs.describe(),
    }
    return Result(named(pl.concat(frames), pairs), settings)


def _check(from_: Sequence[str], to: Sequence[str]) -> None:
    for name, kinds, known in (("from_", from_, SENDERS), ("to", to, RECEIVERS)):
        for kind in kinds:
            if kind not in known:
                raise ConfigError(f"{name}: expected some of {', '.join(known)}, got {kind!r}.")


def _both_runs(
    model: Llama, versions: Versions, metric: Metric, tos: Sequence[Node], experts: bool
) -> tuple[ActivationCache, ActivationCache, dict[str, Tensor], Tensor]:
    """Both caches, and the metric of the corrupt run with its gradients where the receivers read."""
    names = needed(model, experts)
    with torch.no_grad():
        _, clean_cache = model.run_with_cache(versions.clean, attention_mask=versions.clean_mask, names_filter=names)
    watched = sorted({name for node in tos for name in _gradient_names(node)})
    live: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        live[hook.name] = x

    hooks = [("hook_embed", lambda x, hook: x.detach().requires_grad_()), ([*names, *watched], keep)]
    with torch.enable_grad():
        logits = model.run_with_hooks(versions.corrupt, attention_mask=versions.mask, fwd_hooks=hooks)
        values = score_rows(metric, logits)
        found = torch.autograd.grad(values.sum(), [live[name] for name in watched], allow_unused=True)
    gradients = {n: torch.zeros_like(live[n]) if g is None else g for n, g in zip(watched, found, strict=True)}
    corrupt_cache = ActivationCache({n: live[n].detach() for n in names})
    return versions.carried(clean_cache, corrupt_cache), corrupt_cache, gradients, values.detach()


def _gradient_names(node: Node) -> list[str]:
    if node.kind == "logits":
        return ["ln_final.hook_normalized"]
    if node.kind in ("q", "k", "v"):
        return [f"blocks.{node.layer}.attn.hook_{node.kind}"]
    router, both = f"blocks.{node.layer}.mlp.hook_router_logits", f"blocks.{node.layer}.ln2.hook_normalized"
    return {"mlp": [both], "router": [router], "experts": [both, router]}[node.kind]


def _gradient_at_reading(
    model: Llama, corrupt: ActivationCache, gradients: dict[str, Tensor], node: Node
) -> Tensor:  # [pair pos d_model]
    """The metric's gradient at what one receiver reads of the residual stream."""
    names = _gradient_names(node)
    first = wide(gradients[names[0]])
    if node.kind in ("mlp", "logits"):
        at_normalized = first
    elif node.kind == "experts":
        at_normalized = first - wide(gradients[names[1]]) @ wide(projection(model, Node("router", node.layer))[1])
    else:
        own = first if node.kind == "router" else first[:, :, node.index]
        at_normalized = own @ wide(projection(model, node)[1])
    return pull_back(model, stream(model, corrupt, node), at_normalized)


def _sample(frame: pl.DataFrame, n_edges: int, seed: int) -> list[tuple[str, str]]:
    means = frame.group_by("sender", "receiver", maintain_order=True).agg(pl.col("value").mean().abs())
    ranked = means.sort("value", descending=True, maintain_order=True)
    n_top = min(n_edges - n_edges // 2, len(ranked))
    rest = ranked[n_top:]
    chosen = pl.concat([ranked[:n_top], rest.sample(min(n_edges // 2, len(rest)), seed=seed)])
    return chosen.select("sender", "receiver").rows()


@torch.no_grad()
def _measure_edges(
    model: Llama, corrupt: Tensor, metric: Metric, mask: Tensor | None, edges: Sequence[tuple[str, str]],
    clean_cache: ActivationCache, corrupt_cache: ActivationCache, base: Tensor,
) -> pl.DataFrame:  # fmt: skip
    rows = []
    for sender, receiver in edges:
        route = [Node.parse(sender), Node.parse(receiver)]
        effects = _run_path(model, corrupt, metric, mask, route, clean_cache, corrupt_cache) - base
        rows += [(pair, sender, receiver, effect) for pair, effect in enumerate(effects.double().tolist())]
    schema = {"pair": pl.Int64, "sender": pl.String, "receiver": pl.String, "exact": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _agreement(frame: pl.DataFrame) -> dict[str, float | int | None]:
    means = frame.drop_nulls("exact").group_by("sender", "receiver").agg(pl.col("value", "exact").mean())
    if len(means) < 3:
        return {"pearson": None, "spearman": None, "n_edges": len(means)}
    found = means.select(pearson=pl.corr("value", "exact"), spearman=pl.corr("value", "exact", method="spearman"))
    return {**found.fill_nan(None).row(0, named=True), "n_edges": len(means)}


def _route(model: Llama, path: Path) -> list[Node]:
    nodes = [Node.parse(node) if isinstance(node, str) else node for node in path]
    if len(nodes) < 2:
        raise ConfigError(f"path: expected a sender and at least one receiver, got {len(nodes)} nodes.")
    check_node(model, nodes[0], SENDERS)
    for before, node in itertools.pairwise(nodes):
        check_node(model, node, RECEIVERS)
        if before.time(model) >= node.time(model):
            raise ConfigError(f"path: expected {str(node)!r} to act after {str(before)!r}, got the reverse.")
    return nodes


def _run_path(
    model: Llama, corrupt: Tensor, metric: Metric, mask: Tensor | None, route: Sequence[Node],
    clean_cache: ActivationCache, corrupt_cache: ActivationCache,
) -> Tensor:  # [pair]  # fmt: skip
    """The metric with the route's first node clean along the route."""
    delta = written(model, clean_cache, route[0]) - written(model, corrupt_cache, route[0])
    for node in route[1:-1]:
        hooks = patched_reading(model, corrupt_cache, node, delta)
        assert node.layer is not None
        leaf = "attn.hook_z" if node.kind in ("q", "k", "v") else "hook_mlp_out"
        name = f"blocks.{node.layer}.{leaf}"
        changed = ActivationCache()
        hooks.append((name, lambda x, hook, into=changed: into.__setitem__(hook.name, x)))
        model.run_with_hooks(corrupt, attention_mask=mask, fwd_hooks=hooks, stop_at_layer=node.layer + 1)
        delta = written(model, changed, node) - written(model, corrupt_cache, node)
    hooks = patched_reading(model, corrupt_cache, route[-1], delta)
    return score_rows(metric, model.run_with_hooks(corrupt, attention_mask=mask, fwd_hooks=hooks))
