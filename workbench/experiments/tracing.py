"""Causal tracing: blur the subject's embedding, put one clean activation back, see how much of the answer returns.

Meng et al., arXiv 2202.05262; with experts restored one at a time as in arXiv 2606.03780.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.errors import ConfigError, ShapeError
from workbench.experiments.attribution_sites import Site, contribution
from workbench.experiments.identity import (
    check_choices,
    describe_metric,
    describe_model,
    digest,
    mask_digest,
)
from workbench.experiments.metrics import Metric, TokenMetric, score_rows
from workbench.experiments.result import Result
from workbench.experiments.sweeps import sweep
from workbench.hooks import HookPoint
from workbench.interventions.where import told
from workbench.models import Llama
from workbench.models.layers import check_mask
from workbench.models.moe import Moe

COMPONENTS = {"resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}


class Cell(NamedTuple):
    """One restoration, made in every prompt and every sample of noise at once."""

    component: str
    layer: int
    expert: int | None
    pos: int


def causal_tracing(
    model: Llama,
    tokens: Tensor,
    subjects: Sequence[tuple[int, int]],
    metric: Metric,
    *,
    components: Sequence[str] = ("resid_post", "attn_out", "mlp_out"),
    experts: Sequence[tuple[int, int]] = (),
    window: int = 1,
    noise: float = 3.0,
    n_samples: int = 8,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """What restoring one activation does after Gaussian noise was added to the subject's embeddings.

    tokens: prompts [pair pos]; padding, if any, on the left with attention_mask. subjects: for each its (start, end)
    columns, end excluded. components: restored at every layer and column; attn_out and mlp_out over `window` layers
    around it (10 in the paper's figures for 48 layers). experts: (layer, expert) whose contributions are restored, by
    column. noise: its standard deviation in those of the embedding matrix. n_samples: draws of noise, the same for all
    restorations of a prompt, averaged.

    Frame: component, layer, expert, pos, pair, role, `value` (metric), `indirect` (restored - blurred) and `recovered`
    (0 blurred, 1 clean; null where noise changed nothing). `role` is before, subject, last_subject, after or last. In
    `settings`: clean and blurred metric of each prompt. Raises ShapeError when a subject does not fit its prompt.
    """
    trace = _Trace(model, tokens, attention_mask, subjects, metric, components, experts, noise, n_samples, seed, window)
    cells = [
        Cell(component, layer, None, pos)
        for layer in range(model.cfg.n_layers)
        for component in components
        for pos in range(tokens.shape[1])
    ] + [Cell("expert", layer, expert, pos) for layer, expert in experts for pos in range(tokens.shape[1])]
    settings = {
        "experiment": "causal_tracing", **describe_model(model), **describe_metric(metric),
        "tokens": digest(tokens.long()), "mask": mask_digest(attention_mask),
        "subjects": [list(map(int, span)) for span in subjects], "components": list(components),
        "experts": [list(map(int, pair)) for pair in experts], "window": window, "noise": noise,
        "n_samples": n_samples, "seed": seed, "clean": trace.clean.tolist(),
        "blurred": trace.blurred.tolist(),
    }  # fmt: skip
    result = sweep(cells, trace.measure, settings, batch_size=16, out=out, name="causal tracing", progress=progress)
    return Result(result.frame.filter(pl.col("role") != "padding"), result.settings)


class _Trace:
    """The clean run, the blurred run of every noise sample, and restorations in the latter."""

    @torch.no_grad()
    def __init__(
        self, model: Llama, tokens: Tensor, mask: Tensor | None, subjects: Sequence[tuple[int, int]], metric: Metric,
        components: Sequence[str], experts: Sequence[tuple[int, int]], noise: float, n_samples: int, seed: int,
        window: int,
    ) -> None:  # fmt: skip
        _check(model, tokens, mask, subjects, components, experts, noise, n_samples, window)
        check_choices(components=components, experts=experts)
        self.model, self.metric, self.n_samples, self.window = model, metric, n_samples, window
        self.inputs = tokens, mask
        self.roles = [
            _roles(tokens.shape[1], span, None if mask is None else mask[i]) for i, span in enumerate(subjects)
        ]
        self.mask = None if mask is None else mask.repeat(n_samples, 1)
        names = [name for name in model.hook_dict if name.split(".", 2)[-1] in COMPONENTS.values()]
        slots = [
            f"blocks.{layer}.mlp.{leaf}"
            for layer in dict.fromkeys(layer for layer, _ in experts)
            for leaf in ("hook_expert_out", "hook_expert_ids", "hook_routing_weights")
        ]
        end, self.cache = model.run_with_cache(
            tokens, attention_mask=mask, names_filter=[*names, *slots], stop_at_layer=model.cfg.n_layers
        )
        self.clean = self._score(end, 1)
        self._blur = self._noise(tokens.shape, subjects, noise, seed)  # [(sample pair) pos d_model]
        streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
        with told(model, *self.inputs), model.hooks([("hook_embed", lambda x, hook: x + self._blur)]):
            end, blurred = model.run_with_cache(
                tokens.repeat(n_samples, 1), attention_mask=self.mask, names_filter=[*streams, *slots],
                stop_at_layer=model.cfg.n_layers,
            )  # fmt: skip
        self.streams = [blurred[name] for name in streams] + [end]
        self.deltas = {pair: self._restored(blurred, *pair) for pair in experts}
        self.blurred = self._score(end, n_samples)

    @torch.no_grad()
    def measure(self, cells: Sequence[Cell]) -> pl.DataFrame:
        return pl.concat([self._frame(cell, self._restore(cell)) for cell in cells])

    def _restore(self, cell: Cell) -> Tensor:  # [pair]
        """The metric, averaged over noise, with one cell's clean activation in place."""
        if cell.component == "resid_post":
            x = self.streams[cell.layer + 1].clone()  # [(sample pair) pos d_model]
            x[:, cell.pos] = self._clean(f"blocks.{cell.layer}.hook_resid_post", cell.pos)
            return self._run(cell.layer + 1, x, [])
        if cell.component == "expert":
            assert cell.expert is not None
            delta = self.deltas[cell.layer, cell.expert][:, cell.pos]

            def add(x: Tensor, hook: HookPoint) -> Tensor:
                x = x.clone()
                x[:, cell.pos] += delta.to(x.dtype)
                return x

            return self._run(cell.layer, self.streams[cell.layer], [(f"blocks.{cell.layer}.hook_mlp_out", add)])

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            x = x.clone()
            x[:, cell.pos] = self._clean(hook.name, cell.pos)
            return x

        first = max(0, cell.layer - (self.window - 1) // 2)
        last = min(self.model.cfg.n_layers, cell.layer + self.window // 2 + 1)
        names = [f"blocks.{layer}.{COMPONENTS[cell.component]}" for layer in range(first, last)]
        return self._run(first, self.streams[first], [(names, put)])

    def _run(self, layer: int, x: Tensor, hooks: list[Any]) -> Tensor:
        with told(self.model, *self.inputs):
            end = self.model.run_with_hooks(
                x, attention_mask=self.mask, start_at_layer=layer, stop_at_layer=self.model.cfg.n_layers,
                fwd_hooks=hooks,
            )  # fmt: skip
        return self._score(end, self.n_samples)

    def _score(self, end: Tensor, n_samples: int) -> Tensor:  # [(sample pair) pos d_model] -> [pair]
        metric = self.metric
        read = end[:, metric.column(end.shape[1]), None] if isinstance(metric, TokenMetric) else end
        logits = self.model.unembed(self.model.ln_final(read))
        score = metric if not isinstance(metric, TokenMetric) else _first_position(metric)
        parts = [score_rows(score, part) for part in logits.unflatten(0, (n_samples, -1))]
        return torch.stack(parts).double().mean(0).cpu()

    def _clean(self, name: str, pos: int) -> Tensor:  # [(sample pair) d_model]
        return self.cache[name][:, pos].repeat(self.n_samples, 1)

    def _restored(self, blurred: ActivationCache, layer: int, expert: int) -> Tensor:  # [(sample pair) pos d_model]
        site = Site("expert", layer, expert=expert)
        clean = contribution(self.model, self.cache, site).repeat(self.n_samples, 1, 1)
        return clean - contribution(self.model, blurred, site)

    def _noise(self, shape: torch.Size, subjects: Sequence[tuple[int, int]], scale: float, seed: int) -> Tensor:
        """Noise at the subjects, drawn on the CPU so that devices agree; zero elsewhere."""
        weight = self.model.embed.weight
        generator = torch.Generator().manual_seed(seed)
        drawn = (
            torch.randn(self.n_samples, *shape, weight.shape[1], generator=generator)
            * scale
            * float(weight.float().std())
        )
        inside = torch.zeros(shape, dtype=torch.bool)
        for row, (start, end) in zip(inside, subjects, strict=True):
            row[start:end] = True
        return (drawn * inside[..., None]).flatten(0, 1).to(weight)

    def _frame(self, cell: Cell, values: Tensor) -> pl.DataFrame:
        gap = self.clean - self.blurred
        recovered = torch.where(gap == 0, torch.nan, (values - self.blurred) / gap)
        return pl.DataFrame(
            {"component": cell.component, "layer": cell.layer, "expert": cell.expert, "pos": cell.pos,
             "pair": [str(pair) for pair in range(len(values))], "role": [roles[cell.pos] for roles in self.roles],
             "value": values.numpy(), "indirect": (values - self.blurred).numpy(), "recovered": recovered.numpy()},
            schema_overrides={"expert": pl.Int64},
        ).with_columns(pl.col("recovered").fill_nan(None))  # fmt: skip


def _first_position(metric: TokenMetric) -> Metric:
    return lambda logits: metric.score(logits[:, 0])


def _roles(n_pos: int, span: tuple[int, int], mask: Tensor | None) -> list[str]:
    start, end = span
    roles = ["before"] * start + ["subject"] * (end - start - 1) + ["last_subject"] + ["after"] * (n_pos - end)
    if end < n_pos:
        roles[-1] = "last"
    return roles if mask is None else [r if kept else "padding" for r, kept in zip(roles, mask.tolist(), strict=True)]


def _check(
    model: Llama, tokens: Tensor, mask: Tensor | None, subjects: Sequence[tuple[int, int]], components: Sequence[str],
    experts: Sequence[tuple[int, int]], noise: float, n_samples: int, window: int,
) -> None:  # fmt: skip
    for component in components:
        if component not in COMPONENTS:
            raise ConfigError(f"components: expected some of {', '.join(COMPONENTS)}, got {component!r}.")
    for layer, expert in experts:
        known = 0 <= layer < model.cfg.n_layers and isinstance(model.blocks[layer].mlp, Moe)
        if not known or not 0 <= expert < model.cfg.n_experts:  # type: ignore[union-attr]
            raise ConfigError(f"experts: expected (layer, expert) that this model has, got {(layer, expert)}.")
    if not noise > 0 or n_samples < 1 or window < 1:
        raise ConfigError(f"noise, n_samples, window: expected positive numbers, got {noise}, {n_samples}, {window}.")
    if len(subjects) != len(tokens):
        raise ShapeError(f"subjects: expected one for each of {len(tokens)} prompts, got {len(subjects)}.")
    valid = torch.ones_like(tokens).bool() if mask is None else check_mask(mask, (tokens.shape[0], tokens.shape[1]))
    if not bool(valid[:, -1].all()):
        raise ShapeError("attention_mask: expected padding on the left, got a padded last position.")
    for row, (start, end) in zip(valid, subjects, strict=True):
        if not 0 <= start < end <= tokens.shape[1] or not bool(row[start:end].all()):
            raise ShapeError(
                f"subject: expected columns within the {int(row.sum())} tokens of its prompt, got {start}:{end}."
            )
