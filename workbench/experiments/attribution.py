"""Attribution patching: what patching every site would do, to first order, from one forward pass and one backward.

effect(site) = (activation in the clean run - activation in the corrupt run) · d metric / d activation, in the corrupt
run (Nanda 2023; Syed et al., arXiv 2310.10348). It is an estimate: normalisation, attention patterns and above all the
router's choice are not linear. A sample of sites is therefore patched for real, and the agreement stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.errors import ConfigError
from workbench.experiments.attribution_sites import KINDS, Pair, Site, Versions, aligned, named, patched_metrics
from workbench.experiments.identity import check_choices, describe_metric, describe_model
from workbench.experiments.metrics import Metric, score_rows
from workbench.experiments.pairs import Pairs, cells_per_pass
from workbench.experiments.result import Result
from workbench.experiments.sweeps import staged, sweep
from workbench.hooks import HookPoint
from workbench.models import Llama
from workbench.models.moe import Moe

SITE_COLUMNS = ("kind", "layer", "pos", "head", "expert", "neuron")


def attribution_patching(
    model: Llama,
    pairs: Pairs,
    metric: Metric,
    *,
    kinds: Sequence[str] = ("node", "head", "expert"),
    exact_sample: int = 24,
    seed: int = 0,
    rows: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Estimated effect on `metric` of putting each site's clean activation into the corrupt run (denoising).

    `metric` gives one number per pair. Versions correspond column by column; or, where the pairs' positions lie in
    different columns, at these alone: `pos` is then a column of the corrupt version, and elsewhere nothing is carried
    and values are 0. Kinds of site:
      node    attention output and MLP output (or expert mixture) by layer and pos; rows say "attn" or "mlp" as kind
      head    one head's z by layer and pos
      neuron  one neuron, all positions at once; inside experts its weighted activation, 0 where the expert did not run
      expert  one expert's weighted contribution by layer and pos, 0 where it did not run (arXiv 2606.03780)
      router  one router logit by layer and pos; its gradient sees reweighting but no change of the chosen set
    One row per pair and site: pair, kind, layer, pos, head, expert, neuron, `value` (the estimate) and `exact`, the
    measured change where the site was sampled, else null.

    `settings["agreement"]` has, per kind, the Pearson and Spearman correlation of estimate and exact effect over the
    sampled sites (means over pairs): half of them those with the largest estimates, half drawn from the rest. Pass
    `exact_sample=0` for none. rows: how many sequences run together when sites are patched; out: a directory that a
    killed call continues from. Raises ConfigError for an unknown kind or one the model has no site of.
    """
    _check(model, kinds)
    pair = _both_runs(model, aligned(pairs), metric, kinds)
    settings = {
        "experiment": "attribution_patching", **describe_model(model), **describe_metric(metric),
        "kinds": list(kinds), "pairs": pairs.describe(), "exact_sample": exact_sample, "seed": seed,
        "corrupt": pair.value.tolist(),
    }  # fmt: skip

    def run(at: Callable[[str], Path | None]) -> Result:
        cells = [(kind, layer) for kind in kinds for layer in range(model.cfg.n_layers) if _points(model, kind, layer)]
        estimates = sweep(
            cells, lambda batch: pl.concat([_estimates(model, pair, *cell) for cell in batch]), settings,
            batch_size=1, out=at("estimates"), name="attribution", progress=progress,
        ).frame  # fmt: skip
        sites = [site for kind in kinds for site in _sample(estimates, kind, exact_sample, seed)]
        if sites:
            exact = sweep(
                sites, lambda batch: _measure(model, pair, batch), settings,
                batch_size=cells_per_pass(model, pairs, rows), out=at("exact"), name="exact", progress=progress,
            ).frame  # fmt: skip
            on = ["pair", *SITE_COLUMNS]
            frame = estimates.join(exact, on=on, how="left", nulls_equal=True, maintain_order="left")
        else:
            frame = estimates.with_columns(exact=pl.lit(None, pl.Float64))
        return Result(named(frame, pairs), {**settings, "agreement": agreement(frame)})

    return staged(run, settings, out)


def agreement(frame: pl.DataFrame) -> dict[str, dict[str, float | int | None]]:
    """Per kind: Pearson and Spearman correlation of estimate and exact effect over sampled sites, and their number."""
    sampled = frame.drop_nulls("exact").group_by(SITE_COLUMNS, maintain_order=True).agg(pl.col("value", "exact").mean())
    found: dict[str, dict[str, float | int | None]] = {}
    for (kind,), sites in sampled.group_by(
        pl.col("kind").replace({"attn": "node", "mlp": "node"}), maintain_order=True
    ):
        values = {
            method: sites.select(pl.corr("value", "exact", method=method)).item() for method in ("pearson", "spearman")
        }
        found[str(kind)] = {
            **{method: None if value is None or np.isnan(value) else float(value) for method, value in values.items()},
            "n_sites": len(sites),
        }
    return found


def _check(model: Llama, kinds: Sequence[str]) -> None:
    check_choices(kinds=kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kinds: expected some of {', '.join(KINDS)}, got {kind!r}.")
        if kind in ("expert", "router") and not any(isinstance(block.mlp, Moe) for block in model.blocks):
            raise ConfigError(
                f"kinds: expected a model with experts for {kind!r}, got a dense one. Use node or neuron."
            )


def _both_runs(model: Llama, versions: Versions, metric: Metric, kinds: Sequence[str]) -> Pair:
    """Activations of both runs and the corrupt run's gradients at every point that the kinds need."""
    corrupt, mask = versions.corrupt, versions.mask
    names = sorted(
        {name for kind in kinds for layer in range(model.cfg.n_layers) for name in _points(model, kind, layer)}
    )
    with torch.no_grad():
        _, clean_cache = model.run_with_cache(
            versions.clean, attention_mask=versions.clean_mask, names_filter=names, stop_at_layer=model.cfg.n_layers
        )
    live: dict[str, Tensor] = {}

    def start(x: Tensor, hook: HookPoint) -> Tensor:
        return x.detach().requires_grad_()  # so that gradients flow whether or not the weights ask for them

    def keep(x: Tensor, hook: HookPoint) -> None:
        live[hook.name] = x

    with torch.enable_grad():
        logits = model.run_with_hooks(corrupt, attention_mask=mask, fwd_hooks=[("hook_embed", start), (names, keep)])
        values = score_rows(metric, logits)
        wanted = [name for name in names if live[name].requires_grad]
        gradients = torch.autograd.grad(values.sum(), [live[name] for name in wanted], allow_unused=True)
    by_name = {
        name: torch.zeros_like(live[name]) if g is None else g for name, g in zip(wanted, gradients, strict=True)
    }
    corrupt_cache = ActivationCache({name: x.detach() for name, x in live.items()})
    clean_cache = versions.carried(clean_cache, corrupt_cache)
    return Pair(corrupt, mask, metric, values.detach(), clean_cache, corrupt_cache, ActivationCache(by_name))


def _points(model: Llama, kind: str, layer: int) -> list[str]:
    sparse = isinstance(model.blocks[layer].mlp, Moe)
    leaves = {
        "node": ["hook_attn_out", "hook_mlp_out"],
        "head": ["attn.hook_z"],
        "router": ["mlp.hook_router_logits", "mlp.hook_expert_ids"] if sparse else [],
        "neuron": ["mlp.hook_post"],
        "expert": [],
    }[kind]
    if sparse and kind in ("neuron", "expert"):
        slots = "mlp.hook_expert_post" if kind == "neuron" else "mlp.hook_expert_out"
        leaves = [slots, "mlp.hook_expert_ids", "mlp.hook_routing_weights", "hook_mlp_out"]
    return [f"blocks.{layer}.{leaf}" for leaf in leaves]


def _estimates(model: Llama, pair: Pair, kind: str, layer: int) -> pl.DataFrame:
    """The first-order effects of one kind's sites in a layer that has some, as `value`."""
    if kind == "node":
        parts = [(name, pair.first_order(f"{name}_out", layer).sum(-1)) for name in ("attn", "mlp")]
        return pl.concat([_frame(name, layer, ("pos",), values) for name, values in parts])
    if kind == "head":
        return _frame(kind, layer, ("pos", "head"), pair.first_order("z", layer).sum(-1))
    if kind == "neuron" and not isinstance(model.blocks[layer].mlp, Moe):
        return _frame(kind, layer, ("neuron",), pair.first_order("post", layer).sum(1))
    if kind == "neuron":
        return _frame(kind, layer, ("expert", "neuron"), _expert_neurons(model, pair, layer))
    values = pair.first_order("router_logits", layer) if kind == "router" else _experts(model, pair, layer)
    ran = _ran(model, pair.clean["expert_ids", layer]) | _ran(model, pair.corrupt["expert_ids", layer])
    return _frame(kind, layer, ("pos", "expert"), values, ran)


def _experts(model: Llama, pair: Pair, layer: int) -> Tensor:  # [pair pos expert]
    """Each expert's change of contribution along the gradient at the mixture's output."""
    gradient = pair.gradient["mlp_out", layer]

    def along(cache: ActivationCache) -> Tensor:
        weighted = torch.einsum(
            "bpkm,bpm->bpk", cache["expert_out", layer], gradient.to(cache["expert_out", layer].dtype)
        )
        values = weighted.float() * cache["routing_weights", layer].float()
        empty = values.new_zeros(*values.shape[:2], model.cfg.n_experts)  # type: ignore[union-attr]
        return empty.scatter_add_(-1, cache["expert_ids", layer], values)

    return along(pair.clean) - along(pair.corrupt)


def _expert_neurons(model: Llama, pair: Pair, layer: int) -> Tensor:  # [pair expert neuron], summed over pos
    mlp: Any = model.blocks[layer].mlp
    gradient = pair.gradient["mlp_out", layer].float()  # [pair pos d_model]
    total = gradient.new_zeros(len(gradient), mlp.cfg.n_experts, mlp.cfg.d_expert)
    for cache, sign in ((pair.clean, 1), (pair.corrupt, -1)):
        ids, weights = cache["expert_ids", layer], cache["routing_weights", layer].float()
        for expert in ids.unique().tolist():  # one product per expert that ran, instead of one matrix per slot
            rows, places, slots = (ids == expert).nonzero(as_tuple=True)
            read = gradient[rows, places] @ mlp.down[expert].float()  # [n d_expert]
            post = cache["expert_post", layer][rows, places, slots].float() * weights[rows, places, slots, None]
            total[:, expert].index_add_(0, rows, sign * post * read)
    return total


def _ran(model: Llama, ids: Tensor) -> Tensor:  # [pair pos k] -> bool [pair pos expert]
    return torch.zeros(*ids.shape[:2], model.cfg.n_experts, dtype=torch.bool, device=ids.device).scatter_(-1, ids, True)  # type: ignore[union-attr]


def _frame(kind: str, layer: int, axes: Sequence[str], values: Tensor, kept: Tensor | None = None) -> pl.DataFrame:
    """Rows of values [pair *axes]; with `kept` only sites that some pair has, so that every pair has every site."""
    index = torch.meshgrid(*(torch.arange(size) for size in values.shape), indexing="ij")
    chosen = torch.ones(values.shape, dtype=torch.bool) if kept is None else kept.any(0).expand(values.shape).cpu()
    columns = {name: part[chosen].numpy() for name, part in zip(("pair", *axes), index, strict=True)}
    missing = [pl.lit(None, pl.Int64).alias(name) for name in SITE_COLUMNS[2:] if name not in axes]
    return pl.DataFrame(columns).select(
        "pair", pl.lit(kind).alias("kind"), pl.lit(layer, pl.Int64).alias("layer"),
        *(axes), *missing, pl.Series("value", values.detach().float().cpu()[chosen].numpy()).cast(pl.Float64),
    ).select("pair", *SITE_COLUMNS, "value")  # fmt: skip


def _sample(estimates: pl.DataFrame, kind: str, n_sites: int, seed: int) -> list[Site]:
    """Sites of one kind to patch for real: half those of the largest estimates, half drawn from the rest."""
    mine = estimates.filter(pl.col("kind").is_in(("attn", "mlp") if kind == "node" else (kind,)))
    means = mine.group_by(SITE_COLUMNS, maintain_order=True).agg(pl.col("value").mean().abs())
    ranked = means.sort("value", descending=True, maintain_order=True)
    n_top = min(n_sites - n_sites // 2, len(ranked))
    rest = ranked[n_top:]
    chosen = pl.concat([ranked[:n_top], rest.sample(min(n_sites // 2, len(rest)), seed=seed)])
    return [Site(**row) for row in chosen.select(SITE_COLUMNS).rows(named=True)]


def _measure(model: Llama, pair: Pair, sites: Sequence[Site]) -> pl.DataFrame:
    """pair, site and `exact`, the change of the metric when the site is patched."""
    effects = (patched_metrics(model, pair, sites) - pair.value).double().tolist()
    rows = [(n, *astuple(site), effect) for site, of in zip(sites, effects, strict=True) for n, effect in enumerate(of)]
    types = {name: pl.String if name == "kind" else pl.Int64 for name in SITE_COLUMNS}
    return pl.DataFrame(rows, schema={"pair": pl.Int64, **types, "exact": pl.Float64}, orient="row")
