"""What a run with a cache returns: activations by the name of their hook point."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor

from workbench.errors import HookError

_KEPT = (
    "A point with a cost, such as pattern, is kept only if names_filter names it, "
    "any point only if the pass reached it (start_at_layer, stop_at_layer)."
)


class ActivationCache(dict[str, Tensor]):
    """Activations by hook name; `cache["resid_pre", 3]` is short for `cache["blocks.3.hook_resid_pre"]`.

    What both norms of a block have is told apart as "ln1.normalized" and "ln2.normalized".
    """

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        if not isinstance(key, str) and not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str)):
            raise HookError(f'cache: expected a name or a pair such as ("resid_pre", 3), got {key!r}.')
        if isinstance(key, str):
            if key not in self:
                raise HookError(f"{unknown_name(key, self, 'cached activation')} {_KEPT}")
            return super().__getitem__(key)
        leaf, layer = key
        if isinstance(layer, int) and layer < 0:  # a cache may hold some layers only: "the last one" has no meaning
            raise HookError(f"layer: expected one from 0 on, got {layer}. Use model.cfg.n_layers - {-layer}.")
        names = [name for name in _leaf_names(leaf, layer) if name in self]
        if len(names) > 1:
            raise HookError(
                f"{leaf}: expected one activation of layer {layer}, got {', '.join(names)}. Use a full name."
            )
        if not names:
            near = unknown_name(f"blocks.{layer}.hook_{leaf}", self, f"{leaf} of layer {layer} in the cache")
            raise HookError(f"{near} {_KEPT}")
        return self[names[0]]

    def stack(self, leaf: str) -> Tensor:
        """One leaf, such as "router_logits", over all layers that were cached: [layer ...] in ascending order."""
        layers = sorted({int(name.split(".")[1]) for name in self if name.startswith("blocks.")})
        found = [self[leaf, layer] for layer in layers if any(name in self for name in _leaf_names(leaf, layer))]
        if not found:
            raise HookError(f"{unknown_name(f'hook_{leaf}', self, 'cached activation')} {_KEPT}")
        return torch.stack(found)


def _leaf_names(leaf: str, layer: int) -> list[str]:
    """Where a leaf may be in a block; "ln1.normalized" tells the two norms apart."""
    part, _, name = leaf.rpartition(".")
    return [f"blocks.{layer}.{p}hook_{name}" for p in ([f"{part}."] if part else ("", "attn.", "mlp.", "ln1.", "ln2."))]


def unknown_name(name: str, known: Iterable[str], what: str = "hook name") -> str:
    """The error text for a name that is not among `known`, with the closest ones."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4) if isinstance(name, str) else []
    hint = f"Did you mean {', '.join(close)}?" if close else "See model.hook_table()."
    return f"{what}: expected a known one, got {name!r}. {hint}"
