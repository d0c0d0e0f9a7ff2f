"""Which experts are chosen together: within a layer over all pairs, across layers, as a graph, as paths.

A token's k experts are a set. The published counters pair only neighbours of the ranked list (7 of the 28 pairs at k =
8) or equal ranks of two layers; here every pair counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from workbench.stats.index import Frame, Ints, check_choices, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, deal_blocks, sums_jackknife

Ends = tuple[np.ndarray, np.ndarray]  # two experts per pair


def coactivation(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    n_draws: int = 0,
    n_rounds: int = 5,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """How often two experts of a layer are chosen for the same token: one row per layer and pair expert < other.

    Columns layer, expert, other, together (N_ij), n_expert (N_i), n_other (N_j), share = N_ij / N_i (arXiv 2409.02060,
    over all pairs) with share_low, share_high, lift = N_ij N / (N_i N_j), n_tokens, n_docs, n_units, n_tests. Because a
    token has k places, independent experts have a lift below 1: read it against the null.

    With n_draws > 0 also expected, log2_lift (observed over expected, half a token added), z and p_adjusted: the null
    keeps the k experts of every token and every expert's number of tokens in every document, and swaps everything else
    (curveball trades, Strona et al. 2014, doi 10.1038/ncomms5114; n_rounds of trades of all tokens between draws).
    p_adjusted: the largest |z| over all pairs and layers of a draw, against that of the data, which count as one draw
    among the others there.

    Intervals: 95%, delete-a-group jackknife over units (of log2_lift with the expected counts of each unit's own
    documents), of single pairs and not adjusted for their number: pairs picked for their lift regress. They held 94 to
    96% of the long-run value at 1 to 60 and more counts per pair. A pair that was never together has none, and whatever
    concerns an expert that was never chosen is null. Without `unit` in the tokens every document is a unit.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, ids = token_array(kept, routing)
    check_choices(ids, n_experts)
    upper = np.triu_indices(n_experts, 1)
    document, (block, n_units) = codes(kept["doc_id"]), _blocks(kept, unit)
    frames, draws = [], []
    rng = np.random.default_rng(seed)
    for place, layer in enumerate(layers):
        pairs = _block_pairs(ids[:, place], ids[:, place], block, n_experts)  # [block expert expert]
        n = np.einsum("bee->be", pairs)
        together, sizes = pairs[:, *upper], n[:, upper[0]]  # [block pair]
        columns = {
            "layer": np.full(len(upper[0]), layer),
            "expert": upper[0],
            "other": upper[1],
            "together": together.sum(0),
            "n_expert": sizes.sum(0),
            "n_other": n[:, upper[1]].sum(0),
            **_share_interval(together, sizes),
        }
        if n_draws:
            found, expected = _null_pairs(ids[:, place], document, block, n_experts, n_draws, n_rounds, rng, upper)
            draws.append(found)
            columns |= _lift_interval(together, expected)
        frames.append(pl.DataFrame(columns))
    frame = pl.concat(frames).with_columns(
        share=pl.col("together") / pl.col("n_expert"),
        lift=pl.col("together") * len(kept) / (pl.col("n_expert") * pl.col("n_other")),
        n_tokens=pl.lit(len(kept)),
        n_docs=pl.lit(kept["doc_id"].n_unique()),
        n_units=pl.lit(n_units),
        n_tests=pl.lit(len(upper[0]) * len(layers)),
    )
    if n_draws:
        frame = frame.with_columns(**_against(frame["together"].to_numpy(), np.concatenate(draws, 1)))
    return _known_only(frame, pl.min_horizontal("n_expert", "n_other"))


def _blocks(kept: pl.DataFrame, unit: str) -> tuple[Ints, int]:
    """(block of every token's unit, number of units)."""
    owner = codes(kept[unit if unit in kept.columns else "doc_id"])
    n_units = int(owner.max()) + 1
    return deal_blocks(n_units)[owner], n_units


def _block_pairs(here: np.ndarray, after: np.ndarray, block: Ints, n_experts: int) -> Ints:
    """Tokens that chose an expert of one choice [token k] and one of the other: [block expert expert]."""
    n_blocks = int(block.max()) + 1
    left = _choices(block[:, None] * n_experts + here, n_blocks * n_experts)
    return np.asarray((left.T @ _choices(after, n_experts)).todense()).reshape(n_blocks, n_experts, n_experts)


def _share_interval(together: Ints, sizes: Ints) -> dict[str, Floats]:
    """share_low, share_high of counts and the sizes that they are shares of, [block pair] each."""
    low, high = _interval(lambda n, size: np.divide(n, size, out=np.zeros(n.shape), where=size > 0), together, sizes)
    return {"share_low": np.maximum(low, 0), "share_high": np.minimum(high, 1)}


def _lift_interval(together: Ints, expected: Floats) -> dict[str, Floats]:
    """log2_lift_low, log2_lift_high of counts and of what the null expects, [block pair] each."""
    low, high = _interval(_log2_lift, together, expected)
    return {"log2_lift_low": low, "log2_lift_high": high}


def _interval(
    statistic: Callable[[Floats, Floats], Floats], together: np.ndarray, other: np.ndarray
) -> tuple[Floats, Floats]:
    """Of a statistic of two sums [block pair]; NaN for pairs that were never together: each block says the same."""
    sums = np.stack([together, other], axis=1).astype(np.float64)  # [block 2 pair]
    low, high = sums_jackknife(lambda part: statistic(part[..., 0, :], part[..., 1, :]), sums)
    seen = together.any(0)
    return np.where(seen, low, np.nan), np.where(seen, high, np.nan)


def _log2_lift(observed: np.ndarray, expected: np.ndarray) -> Floats:
    return np.log2((np.maximum(observed, 0) + 0.5) / (np.maximum(expected, 0) + 0.5))


def _known_only(frame: pl.DataFrame, least: pl.Expr) -> pl.DataFrame:
    """Null instead of NaN, and where one of the two was never chosen."""
    shares, lifts = ("share", "share_low", "share_high", "lift"), ("log2_lift", "log2_lift_low", "log2_lift_high")
    numbers = [name for name in (*shares, *lifts, "z", "p_adjusted") if name in frame.columns]
    return frame.with_columns(pl.when(least > 0).then(pl.col(numbers).fill_nan(None)))


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
    largest = np.sort(np.array([(np.abs(draw - center) / spread).max(initial=0) for draw in draws]))
    exceeding = n - np.searchsorted(largest * (1 + 1e-9), np.abs(observed - center) / spread, side="left")
    return {
        "expected": mean,
        "log2_lift": _log2_lift(observed, mean),
        "z": apart / np.maximum(np.sqrt(squares / (n - 1)), 0.5),
        "p_adjusted": (1 + exceeding) / (n + 1),
    }


def _null_pairs(
    ids: np.ndarray, document: Ints, block: Ints, n_experts: int, n_draws: int, n_rounds: int,
    rng: np.random.Generator, upper: Ends,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Counts of every draw [draw pair], and their mean by block [block pair]."""
    state = ids.copy()
    for _ in range(3 * n_rounds):  # far enough from the data to forget it
        trade(state, document, rng)
    draws, expected = np.empty((n_draws, len(upper[0]))), np.zeros((int(block.max()) + 1, len(upper[0])))
    for draw in range(n_draws):
        for _ in range(n_rounds):
            trade(state, document, rng)
        pairs = _block_pairs(state, state, block, n_experts)[:, *upper]
        draws[draw] = pairs.sum(0)
        expected += pairs / n_draws
    return draws, expected


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
    unit: str = "group_id",
) -> pl.DataFrame:
    """How often an expert of one layer is followed by one of the next: one row per pair of neighbouring layers and
    experts.

    Columns layer, next_layer, expert, other, together (all k x k pairs of a token, where arXiv 2409.02060's counter
    pairs equal ranks), lift, expected, log2_lift with log2_lift_low and log2_lift_high, z, p_adjusted, n_tokens,
    n_docs, n_units, n_tests. Null: within each document the routes of the next layer are dealt to its tokens at random,
    which keeps both layers as they are and breaks the tie; p_adjusted and intervals as in `coactivation`. A tie may
    come from the token itself, which both layers see: see `information.decompose_routing` for what it explains. Empty
    for one layer.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, ids = token_array(kept, routing)
    check_choices(ids, n_experts)
    document, (block, n_units) = codes(kept["doc_id"]), _blocks(kept, unit)
    rng = np.random.default_rng(seed)
    frames, draws = [], []
    for place in range(len(layers) - 1):
        here, after = ids[:, place], ids[:, place + 1]
        pairs = _block_pairs(here, after, block, n_experts).reshape(-1, n_experts**2)  # [block pair]
        together = pairs.sum(0)
        found, expected = np.empty((n_draws, together.size)), np.zeros(pairs.shape)
        for draw in range(n_draws):
            dealt = _block_pairs(here, after[_deal(document, rng)], block, n_experts).reshape(pairs.shape)
            found[draw] = dealt.sum(0)
            expected += dealt / n_draws
        draws.append(found)
        expert, other = np.indices((n_experts, n_experts)).reshape(2, -1)
        n_here, n_after = (np.bincount(part.ravel(), minlength=n_experts) for part in (here, after))
        most = np.minimum(n_here[expert], n_after[other])
        frames.append(
            pl.DataFrame(
                {
                    "layer": np.full(together.size, layers[place]),
                    "next_layer": np.full(together.size, layers[place + 1]),
                    "expert": expert,
                    "other": other,
                    "together": together,
                    "lift": together * len(kept) / np.maximum(n_here[expert] * n_after[other], 1),
                    "least": most,
                    **_lift_interval(pairs, expected),
                }
            )
        )
    if not frames:
        return pl.DataFrame()
    frame = pl.concat(frames)
    frame = frame.with_columns(
        **_against(frame["together"].to_numpy(), np.concatenate(draws, 1)),
        n_tokens=pl.lit(len(kept)),
        n_docs=pl.lit(kept["doc_id"].n_unique()),
        n_units=pl.lit(n_units),
        n_tests=pl.lit(len(frame)),
    )
    return _known_only(frame, pl.col("least")).drop("least")


def _deal(document: Ints, rng: np.random.Generator) -> Ints:
    """A random order of the tokens within each document."""
    order = np.empty(len(document), dtype=np.int64)
    order[np.argsort(document, kind="stable")] = np.lexsort((rng.random(len(document)), document))
    return order


def expert_graph(
    pairs: pl.DataFrame, alpha: float = 0.05, min_log2_lift: float = 0.5
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(nodes, edges) of pairs chosen together more than the null allows (graph of pairs as in arXiv 2409.02060).

    pairs: `coactivation` with n_draws > 0. edges: its rows, intervals included, with p_adjusted <= alpha and log2_lift
    >= min_log2_lift; nodes: layer, expert, n_tokens of it, degree, cluster (connected component within the layer, from
    0 by size).
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
