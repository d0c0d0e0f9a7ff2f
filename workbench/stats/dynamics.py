"""How routing moves along a text and through the layers: persistence, local consistency, turnover, velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.stats.index import Frame, Ints, check_choices, codes, membership, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, block_jackknife, pair_jackknife, t_interval


def shared_experts(first: np.ndarray, second: np.ndarray) -> Ints:  # [... k] twice -> [...]
    """How many experts two choices have in common."""
    return (first[..., :, None] == second[..., None, :]).any(-1).sum(-1)


def persistence(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    seed: int = 0,
) -> pl.DataFrame:
    """Does the next token go to the same experts? One row per layer.

    Columns layer, overlap (mean share of the k experts that neighbouring tokens of a document have in common), low,
    high (95%, t over groups), first (share whose first expert is the same, arXiv 2401.04088 table 5), load_null
    (sum of f^2 / k: independent draws from the layer's load), word_overlap and word_null, word_gap (their difference,
    mean over groups) with word_gap_low and word_gap_high (t over groups), n_pairs, n_word_pairs, n_groups.

    word_null answers whether the words alone explain it: over pairs of neighbouring tokens whose two token ids also
    follow each other in another group, it compares the first token's experts with those of the second token there;
    word_overlap is the plain overlap of the same pairs. Overlap above word_null is context that persists. Nulls:
    overlap = load_null, word_gap = 0.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).sort("doc_id", "pos").collect()
    layers, ids = token_array(kept, routing)
    check_choices(ids, n_experts)
    left = _neighbours(kept)
    here, after = ids[left], ids[left + 1]  # [pair layer k]
    k = ids.shape[2]
    overlap = shared_experts(here, after) / k  # [pair layer]
    group = codes(kept["group_id"])[left]
    per_group = _group_means(overlap, group)
    low, high = t_interval(per_group)
    matched, partner = _same_words_elsewhere(kept, left, np.random.default_rng(seed))
    swapped = shared_experts(ids[left[matched]], ids[partner + 1]) / k
    gaps = _group_means(overlap[matched] - swapped, group[matched])
    gap_low, gap_high = t_interval(gaps)
    frequency = np.stack([membership(ids[:, place], n_experts).mean(0) for place in range(len(layers))])
    n = len(layers)
    return pl.DataFrame(
        {
            "layer": layers,
            "overlap": _mean(per_group),
            "low": low,
            "high": high,
            "first": _mean((here[..., 0] == after[..., 0]).astype(np.float64)),
            "load_null": (frequency**2).sum(1) / k,
            "word_overlap": _mean(overlap[matched]),
            "word_null": _mean(swapped),
            "word_gap": _mean(gaps),
            "word_gap_low": gap_low,
            "word_gap_high": gap_high,
            "n_pairs": np.full(n, len(left)),
            "n_word_pairs": np.full(n, len(matched)),
            "n_groups": np.full(n, len(per_group)),
        }
    )


def _mean(values: Floats) -> Floats:
    """Over the first axis; NaN, without a warning, where there is nothing."""
    return values.mean(0) if len(values) else np.full(values.shape[1:], np.nan)


def _neighbours(kept: pl.DataFrame) -> Ints:
    """Rows whose next row is the next position of the same document."""
    doc, pos = codes(kept["doc_id"]), kept["pos"].to_numpy()
    return np.flatnonzero((doc[:-1] == doc[1:]) & (pos[:-1] + 1 == pos[1:]))


def _group_means(values: Floats, group: Ints) -> Floats:  # [pair layer] -> [group layer]
    present, row = np.unique(group, return_inverse=True)
    sums = np.zeros((len(present), values.shape[1]))
    np.add.at(sums, row, values)
    return sums / np.bincount(row)[:, None]


def _same_words_elsewhere(kept: pl.DataFrame, left: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """For pairs whose two words occur in this order in another group: (places in `left`, row of the other first)."""
    if "token_id" not in kept.columns or not len(left):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    word, group = codes(kept["token_id"]), codes(kept["group_id"])  # a group's documents say the same thing
    bigram = word[left] * (word.max() + 1) + word[left + 1]
    order = np.lexsort((rng.random(len(left)), bigram))
    # after shuffling, the next pair of the same two words is a random one; it counts if its group is another
    same = (bigram[order[:-1]] == bigram[order[1:]]) & (group[left[order[:-1]]] != group[left[order[1:]]])
    return order[:-1][same], left[order[1:][same]]


def local_consistency(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    lengths: Sequence[int] = (4, 16, 64, 256),
    segments: Sequence[str] = CONTENT_SEGMENTS,
    seed: int = 0,
) -> pl.DataFrame:
    """Segment routing best performance (arXiv 2505.16056): how well a fixed set of experts serves m tokens in a row.

    Stretches of tokens in a row, which neither a gap in pos nor a change of segment_index (where that column is)
    interrupts, are cut into segments of m tokens (what is left over is dropped); c is how many tokens of a segment
    chose an expert. An expert is loaded for a segment if c >= tau; F1(tau) = 2 sum c[c >= tau] / (m #[c >= tau] + sum
    c), SRP = max over tau, one tau per layer. Columns layer, m, srp, low, high, null, tau, n_segments, n_groups.
    Interval: delete-a-group jackknife over groups; null: the same with the tokens of all documents shuffled, which
    keeps the load alone.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).sort("doc_id", "pos").collect()
    layers, ids = token_array(kept, routing)
    if ids.size:
        check_choices(ids, n_experts)
    stretch, group = stretches(kept), codes(kept["group_id"])
    rng = np.random.default_rng(seed)
    rows = []
    for m in lengths:
        blocks = _blocks(stretch, m)  # [segment m]
        if not len(blocks):
            continue
        segment_group = np.unique(group[blocks[:, 0]], return_inverse=True)[1]
        shuffled = rng.permutation(blocks.ravel()).reshape(blocks.shape)
        for place, layer in enumerate(layers):
            sums = _threshold_sums(ids[:, place], blocks, n_experts, segment_group)  # [group 2 tau]
            slots = np.bincount(segment_group) * m * ids.shape[2]  # [group]
            tau = _srp(sums.sum(0), m, slots.sum())[1]
            srp, low, high = block_jackknife(_srp_of(sums, m, slots), len(sums))
            together = _threshold_sums(ids[:, place], shuffled, n_experts, 0 * segment_group)[0]
            null, _ = _srp(together, m, blocks.size * ids.shape[2])
            rows.append((layer, m, float(srp), float(low), float(high), null, tau, len(blocks), len(sums)))
    names = ["layer", "m", "srp", "low", "high", "null", "tau", "n_segments", "n_groups"]
    return pl.DataFrame(rows, schema=names, orient="row")


def stretches(kept: pl.DataFrame) -> Ints:
    """A number for every row, another one wherever the document or its segment changes or positions are missing."""
    keys = [name for name in ("doc_id", "segment_index") if name in kept.columns]
    part, pos = codes(kept.select(keys)), kept["pos"].cast(pl.Int64).to_numpy()
    return np.cumsum((np.diff(part, prepend=-1) != 0) | (np.diff(pos, prepend=-1) != 1))


def _blocks(stretch: Ints, m: int) -> Ints:
    """Rows of the segments of m tokens of every stretch: [segment m]."""
    start = np.flatnonzero(np.diff(stretch, prepend=-1))
    size = np.diff(np.append(start, len(stretch)))
    firsts = [first + np.arange(0, n - m + 1, m) for first, n in zip(start, size, strict=True) if n >= m]
    return np.concatenate(firsts)[:, None] + np.arange(m) if firsts else np.zeros((0, m), dtype=np.int64)


def _threshold_sums(ids: np.ndarray, blocks: Ints, n_experts: int, group: Ints) -> Floats:
    """Per group and threshold tau = 1 .. m: the sum of c over c >= tau, and how many c reach tau: [group 2 m]."""
    n, m = blocks.shape
    keys = np.arange(n)[:, None] * n_experts + ids[blocks].reshape(n, -1)
    count = np.bincount(keys.ravel(), minlength=n * n_experts).reshape(n, n_experts)
    n_groups = int(group.max()) + 1
    histogram = np.bincount(
        (np.repeat(group, n_experts) * (m + 1) + count.ravel()), minlength=n_groups * (m + 1)
    ).reshape(n_groups, m + 1)  # how often each c occurs
    weighted = histogram * np.arange(m + 1)
    reach = [np.cumsum(part[:, ::-1], axis=1)[:, ::-1][:, 1:] for part in (weighted, histogram)]
    return np.stack(reach, axis=1).astype(np.float64)


def _srp_of(sums: Floats, m: int, slots: Ints) -> Callable[[NDArray[np.bool_]], Floats]:
    return lambda kept: np.asarray(_srp(sums[kept].sum(0), m, slots[kept].sum())[0])


def _srp(sums: Floats, m: int, n_slots: float) -> tuple[float, int]:
    f1 = 2 * sums[0] / (m * sums[1] + n_slots)
    return float(f1.max()), int(f1.argmax()) + 1


def layer_consistency(
    tokens: Frame,
    routing: Frame,
    n_pairs: int = 20_000,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    seed: int = 0,
) -> pl.DataFrame:
    """Do two tokens that share experts in one layer share them in another? One row per pair of layers.

    Expert numbers mean nothing across layers, so the similarity of tokens is compared instead: over random pairs of
    tokens of different groups, the correlation of the number of shared experts in layer and other (representational
    similarity analysis, Kriegeskorte et al. 2008). Columns layer, other, correlation, low, high (95%, jackknife
    over the groups of both tokens, `resampling.pair_jackknife`), n_pairs, n_groups. Null: 0, the layers sort
    tokens independently. NaN where a layer gives all pairs as many.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, ids = token_array(kept, routing)
    check_choices(ids)
    group = codes(kept["group_id"])
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, max(len(kept), 1), (2, n_pairs))
    a, b = a[group[a] != group[b]], b[group[a] != group[b]]
    shared = shared_experts(ids[a], ids[b]).astype(np.float64)  # [pair layer]
    n_groups = int(group.max()) + 1
    upper = np.triu_indices(len(layers), 1)
    estimate, low, high = pair_jackknife(lambda some: _correlation(shared[some])[upper], group[a], group[b])
    return pl.DataFrame(
        {
            "layer": np.array(layers)[upper[0]],
            "other": np.array(layers)[upper[1]],
            "correlation": estimate,
            "low": low,
            "high": high,
            "n_pairs": np.full(len(estimate), len(a)),
            "n_groups": np.full(len(estimate), n_groups),
        }
    )


def _correlation(values: Floats) -> Floats:  # [pair layer] -> [layer layer]
    if not len(values):
        return np.full((values.shape[1],) * 2, np.nan)
    centred = values - values.mean(0)
    scale = np.sqrt((centred**2).sum(0))
    varies = np.outer(scale, scale) > 1e-12
    return np.divide(centred.T @ centred, np.outer(scale, scale), out=np.full(varies.shape, np.nan), where=varies)


def token_motion(tokens: Frame, routing: Frame, n_experts: int, window: int | None = 16) -> pl.DataFrame:
    """How fast routing moves at every token: columns doc_id, pos, layer, turnover, velocity.

    turnover = 1 - |T_t & T_t+1| / k between this token and the next. velocity = total variation between the expert use
    of the `window` tokens before this one and of the `window` tokens from it on, in [0, 1], of which sampling alone
    makes a good part: compare places, not sizes. A series for `events`, whose averages have intervals and nulls, after
    arXiv 2505.16056. Both null where the document has no such tokens. All segments count. Without a window there is
    no column velocity, which takes most of the time.
    """
    kept = tokens.lazy().sort("doc_id", "pos").collect()
    layers, ids = token_array(kept, routing)
    if ids.size:
        check_choices(ids, n_experts)
    n, n_layers, k = ids.shape
    turnover, left = np.full((n, n_layers), np.nan), _neighbours(kept)
    turnover[left] = 1 - shared_experts(ids[left], ids[left + 1]) / k
    numbers = {"turnover": turnover}
    if window is not None:
        numbers["velocity"] = _velocity(ids, codes(kept["doc_id"]), n_experts, window)
    rows = kept.select("doc_id", "pos")[np.repeat(np.arange(n), n_layers)]
    return rows.with_columns(
        layer=pl.Series(np.tile(np.array(layers, dtype=np.int64), n)),
        **{name: pl.Series(values.ravel(), nan_to_null=True) for name, values in numbers.items()},
    )


def _velocity(ids: np.ndarray, doc: Ints, n_experts: int, window: int) -> Floats:  # [token layer k] -> [token layer]
    n, n_layers, k = ids.shape
    velocity = np.full((n, n_layers), np.nan)
    inside = np.arange(window, n - window + 1)
    inside = inside[doc[inside - window] == doc[np.minimum(inside + window - 1, n - 1)]]
    for place in range(n_layers):
        total = np.cumsum(np.pad(membership(ids[:, place], n_experts).astype(np.int32), ((1, 0), (0, 0))), axis=0)
        before, after = total[inside] - total[inside - window], total[inside + window] - total[inside]
        velocity[inside, place] = np.abs(after - before).sum(1) / (2 * window * k)
    return velocity
