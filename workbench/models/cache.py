"""Keys and values of the positions already seen, so that decoding computes one position at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.config import ModelConfig
from workbench.errors import ShapeError


class KVCache:
    """Room for `n_ctx` positions of a batch, allocated once: 2 · layer · batch · n_ctx · kv_head · d_head values."""

    def __init__(self, cfg: ModelConfig, batch: int, n_ctx: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (cfg.n_layers, batch, n_ctx, cfg.n_kv_heads, cfg.d_head)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.valid = torch.ones(batch, n_ctx, dtype=torch.bool, device=device)  # False at padding
        self.padded = False
        self.n_seen = 0  # positions that every layer holds

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [batch pos kv_head d_head] of a layer; returns all of that layer's, earlier ones included."""
        end = self.n_seen + k.shape[1]
        self.keys[layer, :, self.n_seen : end] = k
        self.values[layer, :, self.n_seen : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def admit(self, batch: int, n_pos: int, valid: Tensor | None) -> None:
        """Make room for `n_pos` positions of `batch` sequences. Raises ShapeError when they do not fit."""
        end = self.n_seen + n_pos
        if batch != self.keys.shape[1]:
            raise ShapeError(f"cache: expected {self.keys.shape[1]} sequences, got {batch}. Make one of that size.")
        if end > self.keys.shape[2]:
            raise ShapeError(
                f"cache: expected at most {self.keys.shape[2]} positions, got {end}. Allocate a longer one."
            )
        # written even without padding: a pass that failed may have left its own here
        self.valid[:, self.n_seen : end] = True if valid is None else valid
        self.padded = not bool(self.valid[:, :end].all()) if valid is not None or self.padded else False

    def advance(self, n_pos: int) -> None:
        """Count `n_pos` positions as seen, once every layer has stored them."""
        self.n_seen += n_pos


class Prefix(KVCache):
    """Keys and values of earlier positions, known for every layer: a pass over what follows may start at any layer.

    keys, values: for each layer [batch pos kv_head d_head]; valid: [batch pos], False at padding, or None. Passes add
    nothing to it, so one prefix serves many.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], valid: Tensor | None) -> None:
        self.known = list(zip(keys, values, strict=True))
        self.before = valid
        self.padded = valid is not None
        self.n_seen = keys[0].shape[1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.known[layer]
        return torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)

    def admit(self, batch: int, n_pos: int, valid: Tensor | None) -> None:
        if self.before is not None:
            now = torch.ones(batch, n_pos, dtype=torch.bool, device=self.before.device) if valid is None else valid
            self.valid = torch.cat([self.before, now], dim=1)

    def advance(self, n_pos: int) -> None:
        """Nothing is kept."""
