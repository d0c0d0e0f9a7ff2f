"""Keys and values of the positions already seen, so that decoding computes one position at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.config import ModelConfig
from workbench.errors import ShapeError

FIRST_ROOM = 128  # positions a growing cache begins with


class KVCache:
    """Room for `n_ctx` positions of a batch: 2 · layer · batch · n_ctx · kv_head · d_head values.

    A static cache allocates all of it at once. A growing one begins small and doubles, so that a generous `n_ctx` costs
    nothing until it is used; while it doubles, old and new lie side by side, one layer at a time.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        batch: int,
        n_ctx: int,
        dtype: torch.dtype,
        device: torch.device,
        growing: bool = False,
    ) -> None:
        self.batch, self.n_ctx = batch, n_ctx
        self.room = min(n_ctx, FIRST_ROOM) if growing else n_ctx
        shape = (batch, cfg.n_kv_heads, self.room, cfg.d_head)  # heads outside: a head's keys lie together
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(cfg.n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(cfg.n_layers)]
        self.valid = torch.ones(batch, n_ctx, dtype=torch.bool, device=device)  # False at padding
        self.padded = False
        self.n_seen = 0  # positions that every layer holds

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [batch pos kv_head d_head] of a layer; returns all of that layer's, earlier ones included."""
        n_new = k.shape[1]
        return self._store(self.keys[layer], k, n_new), self._store(self.values[layer], v, n_new)

    def of_row(self, row: int) -> KVCache | None:
        """The cache that holds this row's sequence."""
        return self

    def admit(self, batch: int, n_pos: int, valid: Tensor | None) -> None:
        """Make room for `n_pos` positions of `batch` sequences. Raises ShapeError when they do not fit."""
        end = self.n_seen + n_pos
        if batch != self.batch:
            raise ShapeError(f"cache: expected {self.batch} sequences, got {batch}. Make one of that size.")
        if end > self.n_ctx:
            raise ShapeError(f"cache: expected at most {self.n_ctx} positions, got {end}. Allocate a longer one.")
        if end > self.room:
            self._grow(min(self.n_ctx, max(end, 2 * self.room)))
        # written even without padding: a pass that failed may have left its own here
        self.valid[:, self.n_seen : end] = True if valid is None else valid
        self.padded = not bool(self.valid[:, :end].all()) if valid is not None or self.padded else False

    def advance(self, n_pos: int) -> None:
        """Count `n_pos` positions as seen, once every layer has stored them."""
        self.n_seen += n_pos

    def _store(self, held: Tensor, new: Tensor, n_new: int) -> Tensor:  # [batch pos kv_head d_head]
        held.narrow(2, self.n_seen, n_new).copy_(new.transpose(1, 2))
        return held.narrow(2, 0, self.n_seen + n_new).transpose(1, 2)

    def _grow(self, room: int) -> None:
        for layers in (self.keys, self.values):
            for layer, held in enumerate(layers):
                layers[layer] = held.new_empty(*held.shape[:2], room, held.shape[3])
                layers[layer].narrow(2, 0, self.n_seen).copy_(held.narrow(2, 0, self.n_seen))
        self.room = room


class CacheRows(KVCache):
    """Sequences of different lengths that decode one position together, each from a cache of its own.

    caches: one of batch 1 for each row; None is a row without a sequence, whose token sees itself alone and leaves
    nothing behind. Every row attends in an operation of its own length, whatever the others are.
    """

    def __init__(self, caches: Sequence[KVCache | None]) -> None:
        self.caches = list(caches)
        self.batch, self.padded = len(self.caches), False
        self.n_seen = max((cache.n_seen for cache in self.caches if cache is not None), default=0)

    def of_row(self, row: int) -> KVCache | None:
        return self.caches[row]

    def positions(self, device: torch.device) -> Tensor:  # int64 [batch 1]
        return torch.tensor([[0 if cache is None else cache.n_seen] for cache in self.caches], device=device)

    def real(self, device: torch.device) -> Tensor | None:  # bool [batch 1], or None: every row has a sequence
        if None not in self.caches:
            return None
        return torch.tensor([[cache is not None] for cache in self.caches], device=device)

    def mask(self) -> Tensor | None:
        return None

    def admit(self, batch: int, n_pos: int, valid: Tensor | None) -> None:
        if (batch, n_pos) != (self.batch, 1) or valid is not None:
            raise ShapeError(
                f"cache: expected one position of {self.batch} rows without a mask, got {n_pos} of {batch}."
            )
        for cache in self.caches:
            if cache is not None:
                cache.admit(1, 1, None)

    def extend_rows(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Append row by row; returns each row's keys and values [1 pos kv_head d_head], earlier ones included."""
        news = zip(self.caches, k.split(1), v.split(1), strict=True)
        found = [(k, v) if cache is None else cache.extend(layer, k, v) for cache, k, v in news]
        return [keys for keys, _ in found], [values for _, values in found]

    def advance(self, n_pos: int) -> None:
        for cache in self.caches:
            if cache is not None:
                cache.advance(n_pos)


class FixedCache(KVCache):
    """Takes over a filled static cache for steps of one position that all are the same step to the device.

    Where the next position goes is a number on the device, and attention goes over the whole room under a mask.
    kept: bool [batch 1], to be written before each step; False where its token is padding. What counts steps on the
    host, `n_seen`, is for the caller to move on.
    """

    def __init__(self, filled: KVCache) -> None:
        n_seen, device = filled.n_seen, filled.valid.device
        self.batch, self.n_ctx, self.n_seen, self.padded = filled.batch, filled.n_ctx, n_seen, True
        self.keys, self.values = filled.keys, filled.values
        for held in (*self.keys, *self.values):
            held[:, :, n_seen:] = 0  # what is masked must be a number all the same
        self.columns = torch.arange(self.n_ctx, device=device)
        self.valid = filled.valid & (self.columns < n_seen)  # [batch n_ctx]
        self.place = torch.full((1,), n_seen, device=device)
        self.held = self.valid.sum(1, keepdim=True)  # int64 [batch 1], tokens of each row
        self.kept = torch.ones(self.batch, 1, dtype=torch.bool, device=device)

    def positions(self, device: torch.device) -> Tensor:  # int64 [batch 1]
        return (self.held - 1).clamp(min=0)

    def real(self, device: torch.device) -> Tensor | None:  # bool [batch 1]
        return self.kept

    def mask(self) -> Tensor:  # bool [batch 1 1 n_ctx]; a padded query sees itself, as in `attend_mask`
        return (self.valid | (self.columns == self.place))[:, None, None]

    def admit(self, batch: int, n_pos: int, valid: Tensor | None) -> None:
        if (batch, n_pos) != (self.batch, 1) or valid is not None or self.n_seen == self.n_ctx:
            raise ShapeError(
                f"cache: expected one position of {self.batch} rows in a room of {self.n_ctx}, got {n_pos} of {batch} "
                f"after {self.n_seen}. Say in `kept` what is padding."
            )
        self.valid.index_copy_(1, self.place, self.kept)
        self.held += self.kept

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for held, new in ((self.keys[layer], k), (self.values[layer], v)):
            held.index_copy_(2, self.place, new.transpose(1, 2))
        return self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)

    def advance(self, n_pos: int) -> None:
        self.place += n_pos


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
