"""Which experts are chosen together: within a layer over all pairs, across layers, as a graph, as paths.

A token's k experts are a set. The published counters pair only neighbours of the ranked list (7 of the 28 pairs at k =
8) or equal ranks of two layers; here every pair counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from workbench.stats.index import Frame, Ints, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats


def coactivation(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    n_draws: int = 0,
    n_rounds: int = 5,
    seed: int = 0,
) -> pl.DataFrame:
    """How often two experts of a layer are chosen for the same token: one row per layer and pair expert < other.

    Columns layer, expert, other, together (N_ij), n_expert (N_i), n_other (N_j), share = N_ij / N_i (arXiv 2409.02060,
    over all pairs), lift = N_ij N / (N_i N_j), n_tokens, n_docs, n_tests. Because a token has k places, independent
    experts have a lift below 1: read it against the null.

    With n_draws > 0 also expected, log2_lift (observed over expected, half a token added), z and p_adjusted: the null
    keeps the k experts of every token and every expert's number of tokens in every document, and swaps everything else
    (curveball trades, Strona et al. 2014, doi 10.1038/ncomms5114; n_rounds of trades of all tokens between draws).
    p_adjusted: the largest |z| over all pairs and layers of a draw, against that of the data, which count as one draw
    among the others there.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, ids = token_array(kept, routing)
    upper = np.triu_indices(n_experts, 1)
    document = codes(kept["doc_id"])
    frames, draws = [], []
    rng = np.random.default_rng(seed)
    for place, layer in enumerate(layers):
        pairs = _pair_counts(ids[:, place], n_experts)
        n = pairs.diagonal()
        frames.append(
            pl.DataFrame(
                {
                    "layer": np.full(len(upper[0]), layer),
                    "expert": upper[0],
                    "other": upper[1],
                    "together": pairs[upper],
                    "n_expert": n[upper[0]],
                    "n_other": n[upper[1]],
                }
            )
        )
        if n_draws:
            draws.append(
                _null_pairs(ids[:, place], document, n_experts, n_draws, n_rounds, rng)[:, *upper]
            )  # [draw pair]
    frame = pl.concat(frames).with_columns(
        share=pl.col("together") / pl.col("n_expert"),
        lift=pl.col("together") * len(kept) / (pl.col("n_expert") * pl.col("n_other")),
        n_tokens=pl.lit(len(kept)),
        n_docs=pl.lit(kept["doc_id"].n_unique()),
        n_tests=pl.lit(len(upper[0]) * len(layers)),
    )
    return frame.with_columns(**_against(frame["together"].to_numpy(), np.concatenate(draws, 1))) if n_draws else frame


def _pair_counts(ids: np.ndarray, n_experts: int) -> Ints:  # [token k] -> [expert expert]
    chosen = _choices(ids, n_experts)
    return np.asarray((chosen.T @ chosen).todense())


def _choices(ids: np.ndarray, n_experts: int) -> csr_array:
    """1 where a token chose an expert: sparse [token expert]."""
    n, k = ids.shape
    ones, ends = np.ones(n * k, dtype=np.int64), np.arange(0, n * k + 1, k)
    return csr_array((ones, ids.ravel().astype(np.int64), ends), shape=(n, n_experts))


def _against(observed: Ints, draws: Floats) -> dict[str, Floats]:
    """Observed counts [test] against null draws [draw test]; z by the draws' own mean and deviation.

    For p the data are one draw among the others, in mean and deviation too: measured by the other draws alone they
    would lie further out than any of these does by its own, and with 99 draws and thousands of pairs 5% became 20%.
    """
    n, mean, squares = len(draws), draws.mean(0), draws.var(0) * len(draws)
    apart = observed - mean
    center, spread = mean + apart / (n + 1), np.maximum(np.sqrt((squares + apart**2 * n / (n + 1)) / n), 0.5)
    largest = np.sort(np.array([(np.abs(draw - center) / spread).max() for draw in draws]))
    exceeding = n - np.searchsorted(largest * (1 + 1e-9), np.abs(observed - center) / spread, side="left")
    return {
        "expected": mean,
        "log2_lift": np.log2((observed + 0.5) / (mean + 0.5)),
        "z": apart / np.maximum(np.sqrt(squares / (n - 1)), 0.5),
        "p_adjusted": (1 + exceeding) / (n + 1),
    }


def _null_pairs(
    ids: np.ndarray, document: Ints, n_experts: int, n_draws: int, n_rounds: int, rng: np.random.Generator
) -> Floats:  # [draw expert expert]
    state = ids.copy()
    for _ in range(3 * n_rounds):  # far enough from the data to forget it
        trade(state, document, rng)
    draws = []
    for _ in range(n_draws):
        for _ in range(n_rounds):
            trade(state, document, rng)
        draws.append(_pair_counts(state, n_experts))
    return np.stack(draws).astype(np.float64)


def trade(ids: np.ndarray, document: Ints, rng: np.random.Generator) -> None:
    """One round of curveball trades, in place: tokens of a document in random pairs share out anew what only one has.

    ids [token k]. Every token keeps k different experts, every expert its number of tokens in each document.
    """
    k = ids.shape[1]
    order = np.lexsort((rng.random(len(document)), document))
    start = np.flatnonzero(np.diff(document[order], prepend=-1))
    within = np.arange(len(order)) - np.repeat(start, np.diff(np.append(start, len(order))))
    paired = (document[order[:-1]] == document[order[1:]]) & (within[:-1] % 2 == 0)
    first, second = order[:-1][paired], order[1:][paired]
    pool = np.concatenate([ids[first], ids[second]], axis=1)  # [pair 2k]
    same = ids[first][:, :, None] == ids[second][:, None, :]
    # what both have stays: the first's copies sort before everything, the second's behind it
    keys = rng.random(pool.shape)
    keys[:, :k][same.any(2)] = -1
    keys[:, k:][same.any(1)] = 2
    dealt = np.take_along_axis(pool, keys.argsort(1), axis=1)
    ids[first], ids[second] = dealt[:, :k], dealt[:, k:]


def cross_layer(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    n_draws: int = 99,
    seed: int = 0,
) -> pl.DataFrame:
    """How often an expert of one layer is followed by one of the next: one row per pair of neighbouring layers and
    experts.

    Columns layer, next_layer, expert, other, together (all k x k pairs of a token), lift, expected, log2_lift, z,
    p_adjusted, n_tokens, n_docs, n_tests. Null: within each document the routes of the next layer are dealt to its
    tokens at random, which keeps both layers as they are and breaks the tie; p_adjusted as in `coactivation`. A tie
    may come from the token itself, which both layers see: see `information.decompose_routing` for what it explains.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, ids = token_array(kept, routing)
    document = codes(kept["doc_id"])
    rng = np.random.default_rng(seed)
    frames, draws = [], []
    for place in range(len(layers) - 1):
        here, after = (_choices(ids[:, at], n_experts) for at in (place, place + 1))
        together = np.asarray((here.T @ after).todense())
        n_here, n_after = np.asarray(here.sum(0)).ravel(), np.asarray(after.sum(0)).ravel()
        expert, other = np.indices(together.shape).reshape(2, -1)
        frames.append(
            pl.DataFrame(
                {
                    "layer": np.full(together.size, layers[place]),
                    "next_layer": np.full(together.size, layers[place + 1]),
                    "expert": expert,
                    "other": other,
                    "together": together.ravel(),
                    "lift": together.ravel() * len(kept) / np.maximum(n_here[expert] * n_after[other], 1),
                }
            )
        )
        shuffled = (after[_deal(document, rng)] for _ in range(n_draws))
        draws.append(np.stack([np.asarray((here.T @ other).todense()).ravel() for other in shuffled]))
    if not frames:
        return pl.DataFrame()
    frame = pl.concat(frames)
    return frame.with_columns(
        **_against(frame["together"].to_numpy(), np.concatenate(draws, 1).astype(np.float64)),
        n_tokens=pl.lit(len(kept)),
        n_docs=pl.lit(kept["doc_id"].n_unique()),
        n_tests=pl.lit(len(frame)),
    )


def _deal(document: Ints, rng: np.random.Generator) -> Ints:
    """A random order of the tokens within each document."""
    order = np.empty(len(document), dtype=np.int64)
    order[np.argsort(document, kind="stable")] = np.lexsort((rng.random(len(document)), document))
    return order


def expert_graph(
    pairs: pl.DataFrame, alpha: float = 0.05, min_log2_lift: float = 0.5
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(nodes, edges) of pairs chosen together more than the null allows.

    pairs: `coactivation` with n_draws > 0. edges: its rows with p_adjusted <= alpha and log2_lift >= min_log2_lift;
    nodes: layer, expert, n_tokens of it, degree, cluster (connected component within the layer, from 0 by size).
    """
    edges = pairs.filter(pl.col("p_adjusted") <= alpha, pl.col("log2_lift") >= min_log2_lift)
    ends = [pairs.select("layer", expert=end, n=size) for end, size in (("expert", "n_expert"), ("other", "n_other"))]
    nodes = pl.concat(ends).unique(["layer", "expert"]).sort("layer", "expert").with_row_index("node")
    place = nodes.select("layer", "expert", "node")
    linked = edges.join(place, on=["layer", "expert"]).join(
        place.rename({"expert": "other", "node": "other_node"}), on=["layer", "other"]
    )
    a, b = linked["node"].to_numpy(), linked["other_node"].to_numpy()
    graph = csr_array((np.ones(len(a)), (a, b)), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph, directed=False)
    sizes = np.bincount(component)
    by_size = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    degree = np.bincount(np.concatenate([a, b]).astype(np.int64), minlength=len(nodes))
    nodes = nodes.drop("node").rename({"n": "n_slots"})
    return nodes.with_columns(degree=pl.Series(degree), cluster=pl.Series(by_size[component])), edges
