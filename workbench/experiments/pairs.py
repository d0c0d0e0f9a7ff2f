"""Prompts in two versions, and the clean and the corrupt run that patching moves activations between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import torch
from torch import Tensor

from workbench.errors import ShapeError
from workbench.experiments.identity import (
    describe_metric,
    describe_model,
    digest,
    mask_digest,
)
from workbench.experiments.metrics import Metric, TokenMetric, score_rows
from workbench.interventions.where import told
from workbench.models import Llama
from workbench.models.cache import Prefix
from workbench.models.layers import check_mask, check_tokens

DIRECTIONS = ("denoise", "noise")
_KEYS = ("attn.hook_rot_k", "attn.hook_v")  # what later positions read of the target's earlier ones


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts in two versions, [pair pos] token ids each, aligned position by position.

    attention_mask: of both versions, padding on the left; corrupt_mask: of the corrupt one where it differs, as between
    languages, whose prompts differ in length. positions: what to patch, each a label and for every pair the position,
    or (position in clean, position in corrupt) where the versions are not aligned, as `alignment.common_positions`
    gives them; counted over tokens, negative from the end. Without it every position is patched, which needs prompts of
    one length. names: one per pair.
    """

    clean: Tensor
    corrupt: Tensor
    attention_mask: Tensor | None = None
    positions: Mapping[Any, Sequence[int | tuple[int, int]]] | None = None
    names: Sequence[str] | None = None
    corrupt_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupt.shape or self.clean.ndim != 2:
            raise ShapeError(
                f"pairs: expected clean and corrupt tokens of one shape [pair pos], got {tuple(self.clean.shape)} and "
                f"{tuple(self.corrupt.shape)}. Pad the shorter on the left and pass attention_mask."
            )
        for mask in self.masks:
            valid = torch.ones(1, 1).bool() if mask is None else check_mask(mask, (self.n_pairs, self.n_pos))
            if not bool(valid[:, -1].all()):
                raise ShapeError("attention_mask: expected padding on the left, got a padded last position.")
            if self.positions is None and not bool(valid.all()):
                raise ShapeError("pairs: expected named positions for prompts of several lengths, got none.")
        if self.names is not None and len(self.names) != self.n_pairs:
            raise ShapeError(f"names: expected one for each of {self.n_pairs} pairs, got {len(self.names)}.")
        if len({isinstance(label, str) for label in self.positions or ()}) > 1:
            raise ShapeError("positions: expected labels that are all text or all numbers, got both.")
        for label, places in (self.positions or {}).items():
            if len(places) != self.n_pairs:
                raise ShapeError(
                    f"position {label!r}: expected one for each of {self.n_pairs} pairs, got {len(places)}."
                )

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the clean and of the corrupt version."""
        return self.attention_mask, self.attention_mask if self.corrupt_mask is None else self.corrupt_mask

    @property
    def n_pairs(self) -> int:
        return self.clean.shape[0]

    @property
    def n_pos(self) -> int:
        return self.clean.shape[1]

    def columns(self) -> dict[str | int, tuple[Tensor, Tensor]]:
        """For each position to patch its columns [pair] in the clean and in the corrupt version."""
        if self.positions is None:
            same = {pos: torch.full((self.n_pairs,), pos) for pos in range(self.n_pos)}
            return {pos: (column, column) for pos, column in same.items()}
        return {label: self._columns(label, places) for label, places in self.positions.items()}

    def only(self, pos: str | int) -> Pairs:
        """The same pairs with one of their positions. Raises ShapeError when there is no such position."""
        if pos not in self.columns():
            raise ShapeError(f"pos: expected one of {', '.join(map(str, self.columns()))}, got {pos!r}.")
        places: Any = [pos] * self.n_pairs if self.positions is None else self.positions[pos]
        return replace(self, positions={pos: places})

    def _columns(self, label: str, places: Sequence[int | tuple[int, int]]) -> tuple[Tensor, Tensor]:
        both = torch.tensor([(p, p) if isinstance(p, int) else tuple(p) for p in places])  # [pair version]
        n_pad = torch.zeros_like(both)
        for version, mask in enumerate(self.masks):
            if mask is not None:
                n_pad[:, version] = self.n_pos - mask.cpu().long().sum(1)
        columns = torch.where(both < 0, both + self.n_pos, both + n_pad)
        if bool((columns < n_pad).any()) or bool((columns >= self.n_pos).any()):
            raise ShapeError(f"position {label!r}: expected places inside the prompts, got {list(places)}.")
        return columns[:, 0], columns[:, 1]

    def unit_names(self) -> list[str]:
        return list(self.names) if self.names is not None else [str(pair) for pair in range(self.n_pairs)]

    def describe(self) -> dict[str, Any]:
        """Tokens and masks by their digests; names, and the columns each label stands for, in full."""
        named = {} if self.positions is None else self.columns()
        return {
            "n_pairs": self.n_pairs,
            "n_pos": self.n_pos,
            "tokens": digest(self.clean.long(), self.corrupt.long()),
            "masks": [mask_digest(mask) for mask in self.masks],
            "names": self.unit_names(),
            "columns": [[label, clean.tolist(), corrupt.tolist()] for label, (clean, corrupt) in named.items()],
        }


class Runs:
    """The clean and the corrupt run, computed once, and the metric on either.

    The run that is patched is the target, the other the source. `resid` [layer pair pos d_model] is what enters each
    layer of the target, then what leaves the last. `source` and `target` are caches of the points asked for.
    """

    def __init__(
        self, model: Llama, pairs: Pairs, metric: Metric, points: set[str], direction: str, both: bool = False
    ) -> None:
        if direction not in DIRECTIONS:
            raise ShapeError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}.")
        for tokens in (pairs.clean, pairs.corrupt):
            check_tokens(tokens, model.cfg)
        if isinstance(metric, TokenMetric):
            metric.column(pairs.n_pos)
        self.model, self.pairs, self.metric, self.direction = model, pairs, metric, direction
        versions = list(zip((pairs.clean, pairs.corrupt), pairs.masks, strict=True))
        source, target = versions if direction == "denoise" else versions[::-1]
        self.inputs = {"source": source, "target": target}  # tokens and mask of each run
        self.mask = target[1]  # of the run that is patched
        self.source, source_end = self._run(*source, points)
        self.target, target_end = self._run(*target, {"hook_resid_pre", *_KEYS, *(points if both else ())})
        self.resid = [self.target[f"blocks.{layer}.hook_resid_pre"] for layer in range(model.cfg.n_layers)]
        self.resid.append(target_end)
        scores = [self.score(end)[0] for end in (source_end, target_end)]
        self.clean, self.corrupt = scores if direction == "denoise" else scores[::-1]  # [pair] each
        if bool((self.clean == self.corrupt).any()):
            which = [n for n, same in zip(pairs.unit_names(), self.clean == self.corrupt, strict=True) if same]
            raise ShapeError(f"metric: expected clean and corrupt to differ, got equal values for {', '.join(which)}.")

    def _run(self, tokens: Tensor, mask: Tensor | None, points: set[str]) -> tuple[dict[str, Tensor], Tensor]:
        names = [name for name in self.model.hook_dict if name.split(".", 2)[-1] in points]
        end, cache = self.model.run_with_cache(
            tokens, attention_mask=mask, names_filter=names, stop_at_layer=self.model.cfg.n_layers
        )
        return cache, end

    def columns(self, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(source, target) from (clean, corrupt)."""
        clean, corrupt = (place.to(self.model.device) for place in places)
        return (clean, corrupt) if self.direction == "denoise" else (corrupt, clean)

    def positions(self, run: str) -> tuple[Tensor, Tensor | None]:
        """Of "source" or "target": the position of each token [pair pos], counted over tokens, and its mask."""
        tokens, mask = self.inputs[run]
        valid = torch.ones_like(tokens) if mask is None else mask
        positions = (valid.long().cumsum(1) - 1).clamp(min=0).to(self.model.device)
        return positions, None if mask is None else mask.bool().to(self.model.device)

    def start(self, columns: Tensor) -> int:
        """The first column that a pass must compute when nothing before `columns` is patched: earlier ones are causal.

        A metric that may look anywhere gets all columns.
        """
        if not isinstance(self.metric, TokenMetric):
            return 0
        return min(int(columns.min()), self.metric.column(self.pairs.n_pos))

    def continue_from(self, layer: int, x: Tensor, first: int = 0, hooks: Sequence[tuple[str, Any]] = ()) -> Tensor:
        """Run x [(cell pair) pos d_model], columns `first` and later, from `layer` on; the metric [cell pair]."""
        n_cells, mask = x.shape[0] // self.pairs.n_pairs, self.mask
        prefix = self._prefix(first, n_cells) if first else None
        with told(self.model, *self.inputs["target"]):
            end = self.model.run_with_hooks(
            x, attention_mask=None if mask is None else mask[:, first:].repeat(n_cells, 1), cache=prefix,
            start_at_layer=layer, stop_at_layer=self.model.cfg.n_layers, fwd_hooks=hooks,
        )  # fmt: skip
        return self.score(end, first)

    def _prefix(self, first: int, n_cells: int) -> Prefix:
        keys, values = (
            [
                self.target[f"blocks.{layer}.{point}"][:, :first].repeat(n_cells, 1, 1, 1)
                for layer in range(self.model.cfg.n_layers)
            ]
            for point in _KEYS
        )
        mask = self.mask
        valid = None if mask is None else mask[:, :first].bool().repeat(n_cells, 1).to(self.model.device)
        return Prefix(keys, values, valid)

    def score(self, end: Tensor, first: int = 0) -> Tensor:  # [(cell pair) pos d_model] -> [cell pair]
        """The metric, which sees the pairs of one cell at a time; only the positions it reads are unembedded."""
        metric = self.metric
        if isinstance(metric, TokenMetric):
            read, score = end[:, metric.column(self.pairs.n_pos) - first, None], lambda x: metric.score(x[:, 0])
        else:
            read, score = end, metric
        logits = self.model.unembed(self.model.ln_final(read))
        return torch.stack([score_rows(score, part) for part in logits.split(self.pairs.n_pairs)]).float().cpu()

    def frame(self, cells: Sequence[Any], values: Tensor) -> pl.DataFrame:  # [cell pair]
        """One row per cell and pair."""
        names, n = self.pairs.unit_names(), self.pairs.n_pairs
        recovered = (values - self.corrupt) / (self.clean - self.corrupt)
        axes = {
            axis: [value for value in column for _ in range(n)]
            for axis, column in zip(cells[0]._fields, zip(*cells, strict=True), strict=True)
        }
        schema: dict[str, Any] = {axis: pl.Int64 for axis in ("layer", "head", "expert") if axis in axes}
        return pl.DataFrame(
            {**axes, "pair": names * len(cells), "value": values.flatten().numpy(),
             "recovered": recovered.flatten().numpy()}, schema_overrides=schema,
        )  # fmt: skip

    def per_pass(self, rows: int | None) -> int:
        return cells_per_pass(self.model, self.pairs, rows)

    def describe(self) -> dict[str, Any]:
        """What decides the result besides the cells. A caller's own metric is known by its name and exact values."""
        return {
            "direction": self.direction,
            **describe_metric(self.metric),
            **describe_model(self.model),
            "pairs": self.pairs.describe(),
            "clean": self.clean.tolist(),
            "corrupt": self.corrupt.tolist(),
        }


def cells_per_pass(model: Llama, pairs: Pairs, rows: int | None) -> int:
    """How many cells run together: `rows` sequences' worth, by default what keeps the device busy and no more."""
    if rows is not None and rows < 1:
        raise ShapeError(f"rows: expected at least 1, got {rows}.")
    if rows is None:
        n_tokens = 2048 if model.device.type == "cpu" else 32768
        rows = n_tokens // pairs.n_pos
    return max(1, rows // pairs.n_pairs)
