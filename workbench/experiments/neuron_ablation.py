"""Silencing neurons, of dense MLPs and inside experts: does a language lose more than random neurons would cost it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.capture import pad
from workbench.errors import ConfigError, ShapeError
from workbench.experiments.identity import describe_model, digest, sequences_digest
from workbench.experiments.result import Result
from workbench.experiments.sweeps import staged, sweep_variants
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
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Loss on each language with these neurons silenced, beside as many random ones of the same layers and experts.

    `neurons` has columns layer, expert (null when dense), neuron. Frame: neurons ("selected", "random 0" ...), pair
    (the sequence), lang, `loss` in nats per token and `change` from the whole model;
    `result.mean("change", by=["neurons"])` of one language's rows has the intervals. out: a directory that a
    killed call continues from.
    """
    if neurons.select("layer", "expert", "neuron").is_duplicated().any():
        raise ConfigError("neurons: expected each one once, got some twice. Use frame.unique().")
    if not len(neurons):
        raise ConfigError("neurons: expected at least one, got none. Select some first.")
    if len(langs) != len(sequences):
        raise ShapeError(f"langs: expected one for each of {len(sequences)} sequences, got {len(langs)}.")
    chosen = _by_layer(neurons)
    generator = torch.Generator().manual_seed(seed)
    sets = {"selected": chosen, **{f"random {n}": _random_like(model, chosen, generator) for n in range(n_random)}}
    silenced = [{}, *sets.values()]
    settings = {
        "experiment": "ablate_neurons", **describe_model(model), "n_neurons": len(neurons),
        "neurons": digest(neurons.select(pl.col("layer", "expert", "neuron").cast(pl.Int64).fill_null(-1)).to_torch()),
        "n_random": n_random, "n_sequences": len(sequences), "sequences": sequences_digest(sequences),
        "langs": list(langs), "seed": seed, "batch_size": batch_size,
    }  # fmt: skip

    def run(at: Callable[[str], Path | None]) -> Result:
        frame = sweep_variants(
            len(silenced), len(sequences), lambda number, part: _losses(model, sequences[part], silenced[number]),
            settings, batch_size=batch_size, out=at("losses"), name="neurons", progress=progress,
        )  # fmt: skip
        names = pl.DataFrame({"neurons": list(sets), "variant": range(1, len(silenced))})
        found = names.join(frame, on="variant", maintain_order="left_right").with_columns(
            pl.col("pair").cast(pl.String), lang=pl.Series(list(langs) * len(sets)), loss="value"
        )
        return Result(found.select("neurons", "pair", "lang", "loss", "change"), settings)

    return staged(run, settings, out)


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


def _losses(model: Llama, sequences: Sequence[Sequence[int]], silenced: Places) -> list[float]:
    """Mean next-token loss of each sequence in nats."""
    tokens, mask = pad(sequences, left=False)
    logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=_silencers(silenced))
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2).cpu(), tokens[:, 1:], reduction="none")
    means: list[float] = ((each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp(min=1)).tolist()
    return means


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
