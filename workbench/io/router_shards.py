"""All router logits of a run: one safetensors file per batch, tokens in the order of tokens.parquet.

Stored in float16, which rounds a logit by at most 1 part in 2048; margins and entropies of the routing frame were
computed before that, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from workbench.errors import RunError
from workbench.io.permissions import as_any_new_file, check_readable
from workbench.io.run_checks import check_hash

LARGEST = float(np.finfo(np.float16).max)


class RouterShards:
    """Iterating gives (tokens frame, layers, float32 logits [token layer expert]) for each shard, in order.

    `hashes`: those of the run's manifest; a shard is checked against them when it is first read, which raises RunError.
    `checked`: names of shards that were, shared by all readers of a run.
    """

    def __init__(
        self,
        folder: Path,
        tokens: pl.LazyFrame,
        hashes: Mapping[str, str] | None = None,
        checked: set[str] | None = None,
    ) -> None:
        self.folder, self.tokens, self.hashes = folder, tokens, hashes
        self.checked = set() if checked is None else checked

    def __iter__(self) -> Iterator[tuple[pl.DataFrame, list[int], np.ndarray]]:
        start = 0
        for file in self._files():
            if self.hashes is not None and file.name not in self.checked:
                check_hash(self.folder.parent, f"{self.folder.name}/{file.name}", self.hashes)
                self.checked.add(file.name)
            with safe_open(file, "numpy") as stored:
                logits = stored.get_tensor("router_logits").astype(np.float32)
                layers = json.loads(stored.metadata()["layers"])
            yield self.tokens.slice(start, len(logits)).collect(), layers, logits
            start += len(logits)

    def check(self, n_tokens: int, n_layers: int, n_experts: int) -> None:
        """Raises RunError unless the shards hold exactly that many tokens, layers and experts."""
        found = 0
        for file in self._files():
            try:
                check_readable(file)
                with safe_open(file, "numpy") as stored:
                    shape = stored.get_slice("router_logits").get_shape()
                    layers = json.loads(stored.metadata()["layers"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise RunError(f"{file}: expected router logits, got {error}. Run the study again.") from None
            if (shape[1:], len(layers)) != ([n_layers, n_experts], n_layers):
                raise RunError(
                    f"{file}: expected router logits of {n_layers} layers and {n_experts} experts, got {shape[1:]}. "
                    "Run the study again in a new directory."
                )
            found += shape[0]
        if found != n_tokens:
            raise RunError(
                f"{self.folder}: expected the router logits of {n_tokens} tokens, got {found}. "
                "A shard is missing or foreign: run the study again in a new directory."
            )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def write_shard(file: Path, logits: np.ndarray, layers: Sequence[int]) -> None:
    """Write logits [token layer expert] as float16; raises RunError when one is too large for that."""
    largest = float(np.abs(logits).max(initial=0))
    if not largest <= LARGEST:
        raise RunError(
            f"router logits: expected finite values up to {LARGEST:.0f}, got {largest}. Run without --router-logits."
        )
    save_file({"router_logits": logits.astype(np.float16)}, file, metadata={"layers": json.dumps(list(layers))})
    as_any_new_file(file)
