"""The computational graph of edges: who writes to the residual stream, who reads it, and what a changed reading does.

Keys and values of grouped-query attention belong to a group of heads: their readers are key-value heads, and a changed
one acts on every query head of its group. The mixture of experts reads the stream twice: the router, which decides, and
the experts, which compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from workbench.activations import ActivationCache
from workbench.errors import ConfigError
from workbench.experiments.attribution_sites import Site, contribution
from workbench.hooks import HookPoint
from workbench.models import Llama
from workbench.models.layers import inverse_rms, wide
from workbench.models.moe import Moe

SENDERS = ("embed", "head", "mlp", "expert")
RECEIVERS = ("q", "k", "v", "mlp", "router", "experts", "logits")
_INDEXED = ("head", "expert", "q", "k", "v")  # written "kind layer.index"; the others "kind layer" or "kind"


@dataclass(frozen=True)
class Node:
    """A sender or a receiver; as text "head 1.2" (layer 1, head 2), "k 3.0", "mlp 2", "embed", "logits"."""

    kind: str
    layer: int | None = None
    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> Node:
        """Raises ConfigError for a text that is no node."""
        kind, _, place = text.partition(" ")
        layer, _, index = place.partition(".")
        known = kind in SENDERS + RECEIVERS
        shape = (bool(layer), bool(index)) == (kind not in ("embed", "logits"), kind in _INDEXED)
        if not known or not shape or not (layer + index or "0").isdigit():
            raise ConfigError(
                f'node: expected "head 1.2", "mlp 2", "embed", "q 3.1", "logits" or the like, got {text!r}.'
            )
        return cls(kind, int(layer) if layer else None, int(index) if index else None)

    def __str__(self) -> str:
        return self.kind + (
            "" if self.layer is None else f" {self.layer}" + ("" if self.index is None else f".{self.index}")
        )

    def time(self, model: Llama) -> int:
        """When it acts: attention of layer l at 2 l, its MLP at 2 l + 1. Edges go from earlier to later."""
        if self.kind == "embed":
            return -1
        if self.kind == "logits":
            return 2 * model.cfg.n_layers
        assert self.layer is not None
        return 2 * self.layer + (self.kind not in ("head", "q", "k", "v"))


def senders(model: Llama, kinds: tuple[str, ...]) -> list[Node]:
    """All senders of these kinds, in order of execution; experts replace the mixture that they make up."""
    found = [Node("embed")] if "embed" in kinds else []
    for layer in range(model.cfg.n_layers):
        if "head" in kinds:
            found += [Node("head", layer, head) for head in range(model.cfg.n_heads)]
        if "expert" in kinds and isinstance(model.blocks[layer].mlp, Moe):
            found += [Node("expert", layer, expert) for expert in range(model.cfg.n_experts)]  # type: ignore[union-attr]
        elif "mlp" in kinds or "expert" in kinds:
            found.append(Node("mlp", layer))
    return found


def receivers(model: Llama, kinds: tuple[str, ...]) -> list[Node]:
    """All receivers of these kinds, in order of execution; "router" and "experts" exist in sparse layers only."""
    found = []
    for layer in range(model.cfg.n_layers):
        for kind, number in (("q", model.cfg.n_heads), ("k", model.cfg.n_kv_heads), ("v", model.cfg.n_kv_heads)):
            found += [Node(kind, layer, index) for index in range(number) if kind in kinds]
        sparse = isinstance(model.blocks[layer].mlp, Moe)
        found += [
            Node(kind, layer) for kind in ("mlp", "router", "experts") if kind in kinds and (sparse or kind == "mlp")
        ]
    return found + ([Node("logits")] if "logits" in kinds else [])


def check_node(model: Llama, node: Node, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError for a node that this model does not have, or of a kind not in `allowed`."""
    everything = senders(model, ("embed", "head", "mlp")) + senders(model, ("expert",)) + receivers(model, RECEIVERS)
    if node.kind not in allowed or node not in everything:
        raise ConfigError(f"node: expected one of kind {', '.join(allowed)} that this model has, got {str(node)!r}.")


def needed(model: Llama, with_experts: bool) -> list[str]:
    """The hook points whose activations edges are computed from."""
    names = ["hook_embed", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    for layer in range(model.cfg.n_layers):
        leaves = ["hook_resid_pre", "hook_resid_mid", "attn.hook_z", "hook_mlp_out"]
        if isinstance(model.blocks[layer].mlp, Moe):
            leaves.append("mlp.hook_router_logits")
            if with_experts:
                leaves += ["mlp.hook_expert_out", "mlp.hook_expert_ids", "mlp.hook_routing_weights"]
        names += [f"blocks.{layer}.{leaf}" for leaf in leaves]
    return names


def written(model: Llama, cache: ActivationCache, node: Node) -> Tensor:  # [pair pos d_model]
    """What a node added to the stream in a cached run; for q, k, v the heads that they belong to."""
    if node.kind == "embed":
        return wide(cache["hook_embed"])
    assert node.layer is not None
    if node.kind == "expert":
        return contribution(model, cache, Site("expert", node.layer, expert=node.index))
    if node.kind in ("mlp", "router", "experts"):
        return wide(cache["mlp_out", node.layer])
    block: Any = model.blocks[node.layer]
    heads = group(model, node)
    weight = wide(block.attn.o_proj.weight).unflatten(1, (-1, model.cfg.d_head))[:, heads]  # [d_model head d_head]
    return torch.einsum("bphd,mhd->bpm", wide(cache["z", node.layer][:, :, heads]), weight)


def group(model: Llama, node: Node) -> list[int]:
    """The query heads of a head, or of a key-value head's group."""
    assert node.index is not None
    size = model.cfg.n_heads // model.cfg.n_kv_heads
    return list(range(node.index * size, (node.index + 1) * size)) if node.kind in ("k", "v") else [node.index]


def stream(model: Llama, cache: ActivationCache, node: Node) -> Tensor:  # [pair pos d_model]
    """The residual stream that a receiver reads."""
    if node.kind == "logits":
        return cache["resid_post", model.cfg.n_layers - 1]
    assert node.layer is not None
    return cache["resid_pre" if node.kind in ("q", "k", "v") else "resid_mid", node.layer]


def projection(model: Llama, node: Node) -> tuple[str, Tensor]:
    """A q, k, v or router reader's hook point, and the matrix [out d_model] it applies to the normalised stream."""
    block: Any = model.blocks[node.layer or 0]
    if node.kind == "router":
        return f"blocks.{node.layer}.mlp.hook_router_logits", block.mlp.router.weight * block.ln2.weight
    weight = getattr(block.attn, f"{node.kind}_proj").weight.unflatten(0, (-1, model.cfg.d_head))[node.index]
    return f"blocks.{node.layer}.attn.hook_{node.kind}", weight * block.ln1.weight


def reading_point(model: Llama, node: Node) -> str:
    """The hook point where what a receiver reads is changed for it alone."""
    if node.kind == "logits":
        return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    return f"blocks.{node.layer}.ln2.hook_normalized" if node.kind in ("mlp", "experts") else projection(model, node)[0]


def patched_readings(
    model: Llama, corrupt: ActivationCache, cells: Sequence[tuple[Node, Tensor]]
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks for copies of the corrupt prompts, one for each cell, copy after copy.

    In its copy a cell's node, and nothing else, reads the corrupt run's stream plus the cell's delta [pair pos
    d_model]. Interventions on what it reads act on the changed reading as they did on the other.
    """
    by_point: dict[str, dict[int, tuple[Node, Tensor]]] = {}
    for number, (node, delta) in enumerate(cells):
        by_point.setdefault(reading_point(model, node), {})[number] = node, delta
    hooks = [(name, _reader(model, corrupt, mine, len(cells))) for name, mine in by_point.items()]
    for number, (node, delta) in enumerate(cells):
        if node.kind == "experts":  # the router keeps what it read
            hooks.append((f"blocks.{node.layer}.mlp.hook_router_logits", _keeper(corrupt, number, len(delta))))
    return hooks


def _reader(
    model: Llama, corrupt: ActivationCache, mine: Mapping[int, tuple[Node, Tensor]], n_cells: int
) -> Callable[..., Tensor]:
    """A hook that changes one point in the copies of the cells that read there."""

    def put(old: Tensor, hook: HookPoint) -> Tensor:  # [(cell pair) pos ...]
        n_pairs, first = len(old) // n_cells, next(iter(mine.values()))[0]
        own = [(slice(cell * n_pairs, (cell + 1) * n_pairs), *reader) for cell, reader in mine.items()]
        x = old if first.kind == "logits" else wide(stream(model, corrupt, first)).repeat(n_cells, 1, 1)
        x = x.clone()
        for rows, _, delta in own:
            x[rows] += delta.to(x.dtype)
        changed, new = reading(model, hook, old, x, [(rows, node) for rows, node, _ in own]), old.clone()
        for rows, node, _ in own:
            new[part(rows, node)] = changed[part(rows, node)].to(old.dtype)
        return new

    return put


def _keeper(corrupt: ActivationCache, number: int, n_pairs: int) -> Callable[..., Tensor]:
    def keep(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[number * n_pairs : (number + 1) * n_pairs] = corrupt[hook.name]
        return x

    return keep


def part(rows: slice, node: Node) -> tuple[Any, ...]:
    """Where a node's reading lies in the tensor of its point."""
    return (rows, slice(None), node.index) if node.kind in ("q", "k", "v") else (rows,)


def reading(
    model: Llama, hook: HookPoint, old: Tensor, x: Tensor, readers: Sequence[tuple[slice, Node]]
) -> Tensor:  # like old
    """What a point holds in the pass that is running when readers, (rows, node), read the stream x [batch pos d_model].

    Only their parts are meant; old [batch pos ...] is what the point holds.
    """
    node = readers[0][1]
    if node.kind == "logits":
        return x
    block = cast(Any, model.blocks[node.layer or 0])
    normalized = _normalized(model, block.ln1 if node.kind in ("q", "k", "v") else block.ln2, x)
    if node.kind in ("mlp", "experts"):
        return normalized
    if node.kind == "router":
        return _intervened(model, hook, (normalized @ wide(projection(model, node)[1]).T).to(old.dtype))
    changed = old.clone()  # [batch pos head d_head]
    for rows, node in readers:
        changed[part(rows, node)] = (normalized[rows] @ wide(projection(model, node)[1]).T).to(old.dtype)
    return _intervened(model, hook, changed)


def _normalized(model: Llama, norm: Any, x: Tensor) -> Tensor:  # [pair pos d_model]
    """The stream x divided by its scale, before the norm's weight."""
    inverse = inverse_rms(x, model.cfg.norm_eps)
    scale = 1 / inverse
    changed = _intervened(model, norm.hook_scale, scale)
    return _intervened(model, norm.hook_normalized, x * (inverse if changed is scale else 1 / changed))


def _intervened(model: Llama, point: HookPoint, x: Tensor) -> Tensor:
    """What the attached interventions make of x at a point, in the pass that is running."""
    for edit in (edit for batch in model.batches for edit in batch.edits if edit.point is point):
        x = edit(x, point)
    return x
