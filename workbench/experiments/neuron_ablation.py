"""Silencing neurons, of dense MLPs and inside experts: does a language lose more than random neurons would cost it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.capture import pad
from workbench.errors import ConfigError
from workbench.experiments.identity import describe_model
from workbench.experiments.result import Result
from workbench.hooks import HookPoint
from workbench.models import Llama

Places = dict[tuple[int, int | None], list[int]]  # neurons by layer and expert


@torch.no_grad()
def ablate_neurons(
    model: Llama,
    neurons: pl.DataFrame,
    sequences: Sequence[Sequence[int]],
    langs: Sequence[str],
    *,
    n_random: int = 3,
    seed: int = 0,
    batch_size: int = 16,
) -> Result:
    """Loss on each language with these neurons silenced, beside as many random ones of the same layers and experts.

    `neurons` has columns layer, expert (null when dense), neuron. Frame: neurons ("selected", "random 0" ...), pair
    (the sequence), lang, `loss` in nats per token and `change` from the whole model;
    `result.mean("change", by=["neurons"])` of one language's rows has the intervals.
    """
    if neurons.select("layer", "expert", "neuron").is_duplicated().any():
        raise ConfigError("neurons: expected each one once, got some twice. Use frame.unique().")
    if not len(neurons):
        raise ConfigError("neurons: expected at least one, got none. Select some first.")
    plain = _losses(model, sequences, {}, batch_size)
    chosen = _by_layer(neurons)
    generator = torch.Generator().manual_seed(seed)
    sets = {"selected": chosen, **{f"random {n}": _random_like(model, chosen, generator) for n in range(n_random)}}
    rows = []
    for name, places in sets.items():
        losses = _losses(model, sequences, places, batch_size)
        rows += [
            (name, str(pair), lang, loss, loss - base)
            for pair, (lang, loss, base) in enumerate(zip(langs, losses, plain, strict=True))
        ]
    settings = {
        "experiment": "ablate_neurons", **describe_model(model), "n_neurons": len(neurons), "n_random": n_random,
        "n_sequences": len(sequences), "seed": seed,
    }  # fmt: skip
    return Result(pl.DataFrame(rows, schema=["neurons", "pair", "lang", "loss", "change"], orient="row"), settings)


def _by_layer(neurons: pl.DataFrame) -> Places:
    found: Places = {}
    for layer, expert, neuron in neurons.select("layer", "expert", "neuron").rows():
        found.setdefault((layer, expert), []).append(neuron)
    return found


def _random_like(model: Llama, chosen: Places, generator: torch.Generator) -> Places:
    """As many other neurons of the same layers and experts."""
    drawn: Places = {}
    for (layer, expert), neurons in chosen.items():
        size = model.cfg.d_mlp if expert is None else model.cfg.d_expert  # type: ignore[union-attr]
        others = [neuron for neuron in torch.randperm(size, generator=generator).tolist() if neuron not in set(neurons)]
        if len(others) < len(neurons):
            raise ConfigError(
                f"neurons: expected at most half of the {size} of layer {layer}"
                f"{'' if expert is None else f', expert {expert}'}, so that as many others are left to compare with, "
                f"got {len(neurons)}. Select fewer, or pass n_random=0."
            )
        drawn[layer, expert] = others[: len(neurons)]
    return drawn


def _losses(model: Llama, sequences: Sequence[Sequence[int]], silenced: Places, batch_size: int) -> list[float]:
    """Mean next-token loss of each sequence in nats."""
    losses: list[float] = []
    for start in range(0, len(sequences), batch_size):
        tokens, mask = pad(sequences[start : start + batch_size], left=False)
        logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=_silencers(silenced))
        each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2).cpu(), tokens[:, 1:], reduction="none")
        losses += ((each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp(min=1)).tolist()
    return losses


def _silencers(silenced: Places) -> list[tuple[str, Any]]:
    ids: dict[int, Tensor] = {}

    def remember(x: Tensor, hook: HookPoint) -> None:
        ids[hook.layer()] = x

    def silence(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        for (layer, expert), neurons in silenced.items():
            if layer == hook.layer() and expert is None:
                x[..., neurons] = 0
            elif layer == hook.layer():
                mine = ids[layer].eq(-1 if expert is None else expert)[..., None]  # [batch pos k 1]
                x[..., neurons] = x[..., neurons].masked_fill(mine, 0)
        return x

    hooks: list[tuple[str, Any]] = []
    for layer, sparse in sorted({(layer, expert is not None) for layer, expert in silenced}):
        if sparse:
            hooks.append((f"blocks.{layer}.mlp.hook_expert_ids", remember))
        hooks.append((f"blocks.{layer}.mlp.hook_{'expert_post' if sparse else 'post'}", silence))
    return hooks
