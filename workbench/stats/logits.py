"""Router logits, centred: the push towards an expert before experts compete for k places.

Selection is closed: the frequencies of a layer always sum to k, so that one expert's gain shows as a loss of others
that did not change at all. Centred logits zc = z - median over experts are free of that (shown on planted models).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_array

from workbench.stats.index import Frame, Ints, locate, unit_index
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats

# (tokens frame with doc_id and pos, its layers, logits [token layer expert]); io.runs.Run.router_logits() gives these
Shard = tuple[pl.DataFrame, Sequence[int], NDArray[np.floating]]


def centred(logits: NDArray[np.floating]) -> Floats:  # [... expert] -> [... expert]
    """Logits less their median over experts, so that a constant added to all, which changes no choice, is gone."""
    return (logits - np.median(logits, axis=-1, keepdims=True)).astype(np.float64)


def logit_cells(
    shards: Iterable[Shard], tokens: Frame, by: Sequence[str], segments: Sequence[str] = CONTENT_SEGMENTS
) -> pl.DataFrame:
    """Mean centred logit and mean probability of every unit, layer and expert.

    Columns *by, layer, expert, logit, logit_square, prob, n_tokens: means over the unit's tokens of zc, zc^2 and of the
    softmax over all experts (pi, which sums to 1 over experts). `tokens` chooses and weighs tokens as in
    `load.slot_counts`; those without logits in any shard count nowhere.
    """
    keys = list(by)
    units, where = unit_index(tokens.lazy().filter(pl.col("segment").is_in(segments)), keys)
    totals: Floats | None = None
    layers: list[int] = []
    for frame, layers_here, logits in shards:
        layers = list(layers_here)
        found = _unit_sums(logits, locate(where, frame), where, len(units))
        totals = found if totals is None else totals + found
    if totals is None:
        totals, layers = np.zeros((4, len(units), 0, 0)), []
    return _cells_frame(units, keys, layers, totals)


def _unit_sums(logits: NDArray[np.floating], place: Ints, where: pl.DataFrame, n_units: int) -> Floats:
    """Weighted sums over the tokens of each unit, of zc, zc^2, probability and 1: [4 unit layer expert]."""
    known = place >= 0
    unit, weight = where["unit"].to_numpy()[place[known]], where["weight"].to_numpy()[place[known]]
    gather = csr_array((weight, (unit, np.arange(len(unit)))), shape=(n_units, len(unit)))  # [unit token]
    kept = logits[known].astype(np.float64)  # [token layer expert]
    zc = centred(kept)
    probs = np.exp(kept - kept.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    n_cells = logits.shape[1] * logits.shape[2]
    parts = (zc, zc**2, probs, np.ones_like(zc))
    sums = [(gather @ part.reshape(len(unit), n_cells)).reshape(n_units, *logits.shape[1:]) for part in parts]
    return np.stack(sums)


def _cells_frame(units: pl.DataFrame, keys: list[str], layers: list[int], totals: Floats) -> pl.DataFrame:
    """One row per unit, layer and expert; units without a token in the shards are left out."""
    seen = totals[3].any(axis=(1, 2)) if totals[3].size else np.zeros(len(units), dtype=bool)
    n_layers, n_experts = totals.shape[2:]
    means = totals[:3, seen] / np.maximum(totals[3:, seen], 1e-300)
    n_units = int(seen.sum())
    columns = {
        "layer": np.tile(np.repeat(np.array(layers, dtype=np.int64), n_experts), n_units),
        "expert": np.tile(np.arange(n_experts), n_units * n_layers),
        "logit": means[0].ravel(),
        "logit_square": means[1].ravel(),
        "prob": means[2].ravel(),
    }
    repeated = units.filter(pl.Series(seen)).select(pl.col(*keys, "n_tokens").repeat_by(n_layers * n_experts).explode())
    return repeated.hstack(pl.DataFrame(columns)).select(
        *keys, "layer", "expert", "logit", "logit_square", "prob", "n_tokens"
    )
