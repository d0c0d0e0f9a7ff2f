"""Decoding in blocks of a fixed number of rows, so that a row's bits do not depend on who shares its pass.

A matrix product on a CPU may add in another order for another number of rows. A block always has the same number:
places without a sequence are filled. Then every product of the dense parts has one shape, every expert that is hit gets
as many rows as the block has, and attention runs row by row at each row's own length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from workbench.errors import ConfigError
from workbench.models.cache import CacheRows, KVCache
from workbench.models.llama import Llama
from workbench.models.moe import Moe

FILLER = 4  # <|pad|>; what stands at a place without a sequence


def decode_block(model: Llama, ids: Sequence[int], caches: Sequence[KVCache], n_rows: int) -> Tensor:
    """Logits [row d_vocab] after one more token of each sequence, in a block of `n_rows`; each cache takes it in.

    Raises ShapeError when a cache is full.
    """
    n_free = n_rows - len(caches)
    tokens = torch.tensor([*ids, *[FILLER] * n_free])[:, None]  # [n_rows 1]
    n_seen = [cache.n_seen for cache in caches]
    with ExitStack() as undo:
        undo.callback(_take_back, caches, n_seen)  # whatever stops it, it may be tried again
        with _rows_per_expert(model, n_rows):
            cache = CacheRows([*caches, *[None] * n_free])
            normalized = model.ln_final(model(tokens, cache=cache, stop_at_layer=model.cfg.n_layers))
        logits = unembed(model, normalized)[: len(caches), 0]
        undo.pop_all()
    return logits


def _take_back(caches: Sequence[KVCache], n_seen: Sequence[int]) -> None:
    for cache, n in zip(caches, n_seen, strict=True):
        cache.n_seen = n


def unembed(model: Llama, normalized: Tensor) -> Tensor:  # [batch pos d_model] -> float32 [... d_vocab], on the CPU
    return model.unembed(normalized).float().cpu()


@contextmanager
def _rows_per_expert(model: Llama, n_rows: int) -> Iterator[None]:
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, Moe)]
    for layer in layers:
        layer.rows_per_expert = n_rows if n_rows > 1 else None
    try:
        yield
    finally:
        for layer in layers:
            layer.rows_per_expert = None


@torch.inference_mode()
def check_block(model: Llama, n_rows: int, seed: int = 0) -> None:
    """Raises ConfigError unless a sequence decodes to the same bits at every place of a block, whoever its neighbours.

    Measured on this model and machine, with neighbours drawn at random.
    """
    draw = torch.Generator().manual_seed(seed)

    def prompt() -> Tensor:  # [1 pos]
        n_pos = int(torch.randint(2, 8, (), generator=draw))
        return torch.randint(0, model.cfg.d_vocab, (1, n_pos), generator=draw)

    def filled(tokens: Tensor) -> KVCache:
        cache = model.new_cache(1, tokens.shape[1] + 1)
        model(tokens, cache=cache, stop_at_layer=model.cfg.n_layers)
        return cache

    mine = prompt()
    alone = decode_block(model, [5], [filled(mine)], n_rows)[0]
    for place in range(n_rows):
        caches = [filled(mine if row == place else prompt()) for row in range(n_rows)]
        ids = [
            5 if row == place else int(torch.randint(0, model.cfg.d_vocab, (), generator=draw)) for row in range(n_rows)
        ]
        if not torch.equal(decode_block(model, ids, caches, n_rows)[place], alone):
            raise ConfigError(
                f"rows: expected a block of {n_rows} in which a sequence decodes to the same bits anywhere, got others "
                f"at place {place} on this machine. Use another number; 1 always holds."
            )
