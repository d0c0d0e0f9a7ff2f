"""The sites of attribution patching, and patching one of them for real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.errors import ShapeError
from workbench.experiments.metrics import Metric, score_rows
from workbench.experiments.pairs import Pairs
from workbench.hooks import HookPoint
from workbench.interventions.where import told
from workbench.models import Llama
from workbench.models.moe import Moe

KINDS = ("node", "head", "neuron", "expert", "router")


class Versions(NamedTuple):
    """Both versions of the prompts and their masks; places: the columns [pair place] of clean and corrupt that belong
    together, where these are not the same ones throughout.
    """

    clean: Tensor  # [pair pos]
    corrupt: Tensor
    clean_mask: Tensor | None
    mask: Tensor | None  # of the corrupt one
    places: tuple[Tensor, Tensor] | None

    def carried(self, clean: ActivationCache, corrupt: ActivationCache) -> ActivationCache:
        """The clean activations at the corrupt version's columns; where nothing corresponds, the corrupt ones."""
        if self.places is None:
            return clean
        pair = torch.arange(len(self.clean))[:, None]
        there, here = self.places
        found = {name: x.clone() for name, x in corrupt.items()}
        for name, x in found.items():
            x[pair, here] = clean[name][pair, there]
        return ActivationCache(found)


def aligned(pairs: Pairs) -> Versions:
    """What attributions run on. Named positions that lie in different columns, as those of `alignment` do between
    languages, are the only ones that correspond. Raises ShapeError when one corrupt position has two clean ones.
    """
    masks = pairs.masks
    if not pairs.columns():
        raise ShapeError("positions: expected at least one, got none. Leave them out to use every column.")
    clean, corrupt = (torch.stack(side, 1) for side in zip(*pairs.columns().values(), strict=True))  # [pair place]
    if pairs.corrupt_mask is None and torch.equal(clean, corrupt):
        return Versions(pairs.clean, pairs.corrupt, *masks, None)
    for there, here in zip(clean.tolist(), corrupt.tolist(), strict=True):
        together = set(zip(there, here, strict=True))
        if len({column for _, column in together}) < len(together):
            raise ShapeError("positions: expected one clean position for a corrupt one, got several. Name fewer.")
    return Versions(pairs.clean, pairs.corrupt, *masks, (clean, corrupt))


def named(frame: pl.DataFrame, pairs: Pairs) -> pl.DataFrame:
    """The frame with the names of the pairs in place of their numbers."""
    names = dict(enumerate(pairs.unit_names()))
    return frame.with_columns(pl.col("pair").replace_strict(names, return_dtype=pl.String))


@dataclass(frozen=True)
class Site:
    """One place to patch; `kind` is "attn" or "mlp" for a node, else one of KINDS. None: does not apply."""

    kind: str
    layer: int
    pos: int | None = None
    head: int | None = None
    expert: int | None = None
    neuron: int | None = None


@dataclass(frozen=True, eq=False)
class Pair:
    """A clean and a corrupt run of the same prompts: activations of both, the corrupt one's metric and gradients."""

    tokens: Tensor  # of the corrupt run [pair pos]
    mask: Tensor | None
    metric: Metric
    value: Tensor  # the metric of the corrupt run [pair]
    clean: ActivationCache
    corrupt: ActivationCache
    gradient: ActivationCache

    def first_order(self, leaf: str, layer: int) -> Tensor:
        """(clean - corrupt) * gradient at one point, not yet summed over any axis."""
        return (self.clean[leaf, layer] - self.corrupt[leaf, layer]).float() * self.gradient[leaf, layer].float()


@torch.no_grad()
def patched_metrics(model: Llama, pair: Pair, sites: Sequence[Site]) -> Tensor:  # [site pair]
    """The metric of the corrupt run with one site at a time taken from the clean run; all sites run together."""
    n_pairs = len(pair.tokens)
    by_name: dict[str, list[tuple[slice, Any]]] = {}
    for number, site in enumerate(sites):
        name, change = _change(model, pair, site)
        by_name.setdefault(name, []).append((slice(number * n_pairs, (number + 1) * n_pairs), change))

    def patch(x: Tensor, hook: HookPoint) -> Tensor:  # [(site pair) pos ...]
        x = x.clone()
        for rows, change in by_name[hook.name]:
            change(x[rows])
        return x

    mask = None if pair.mask is None else pair.mask.repeat(len(sites), 1)
    with told(model, pair.tokens, pair.mask):
        logits = model.run_with_hooks(
            pair.tokens.repeat(len(sites), 1), attention_mask=mask, fwd_hooks=[(list(by_name), patch)]
        )
    return torch.stack([score_rows(pair.metric, part) for part in logits.split(n_pairs)])


def _change(model: Llama, pair: Pair, site: Site) -> tuple[str, Any]:
    """The hook point of a site, and a function that edits its tensor in place."""
    block, pos = f"blocks.{site.layer}", site.pos
    sparse = isinstance(model.blocks[site.layer].mlp, Moe)
    if site.kind == "expert" or (site.kind == "neuron" and sparse):
        delta = contribution(model, pair.clean, site) - contribution(model, pair.corrupt, site)  # [pair pos d_model]
        places = slice(None) if pos is None else slice(pos, pos + 1)
        return f"{block}.hook_mlp_out", lambda x: x[:, places].add_(delta[:, places].to(x.dtype))
    name, index = {
        "attn": ("hook_attn_out", (slice(None), pos)),
        "mlp": ("hook_mlp_out", (slice(None), pos)),
        "head": ("attn.hook_z", (slice(None), pos, site.head)),
        "router": ("mlp.hook_router_logits", (slice(None), pos, site.expert)),
        "neuron": ("mlp.hook_post", (slice(None), slice(None), site.neuron)),
    }[site.kind]
    replacement = pair.clean[f"{block}.{name}"][index]
    return f"{block}.{name}", lambda x: x.__setitem__(index, replacement)


def contribution(model: Llama, cache: ActivationCache, site: Site) -> Tensor:  # [pair pos d_model]
    """What the site's expert, or one neuron of it, added to the stream: zero where the expert did not run."""
    mlp: Any = model.blocks[site.layer].mlp
    mine = cache["expert_ids", site.layer].eq(-1 if site.expert is None else site.expert)  # [pair pos k]
    weights = cache["routing_weights", site.layer].float() * mine
    if site.kind == "expert":
        return torch.einsum("bpk,bpkm->bpm", weights, cache["expert_out", site.layer].float())
    activation = (weights * cache["expert_post", site.layer][..., site.neuron].float()).sum(-1)  # [pair pos]
    return activation[..., None] * mlp.down[site.expert, :, site.neuron].float()
