"""The way that a token takes through the first experts of all layers, against a chain that forgets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.stats.index import Frame, Ints, check_choices, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, block_jackknife


def paths(
    tokens: Frame, routing: Frame, n: int = 50, segments: Sequence[str] = CONTENT_SEGMENTS, n_draws: int = 99,
    seed: int = 0, unit: str = "group_id",
) -> tuple[pl.DataFrame, pl.DataFrame]:  # fmt: skip
    """(the n most frequent paths of first experts through the layers, one row about all of them).

    paths: path (expert of each layer, joined by "-"), n_tokens, share, n_docs, expected_share (first-order Markov chain
    with the layers' own transitions: the null), log2_lift; share_low, share_high, log2_lift_low, log2_lift_high: 95%,
    delete-a-group jackknife over units, for the lift with half a token added to both counts. Intervals are of single
    paths: those that chance brought to the top of the list would come out lower in other text.

    about: one row. Tokens of a text are no independent draws: a word that comes again takes its path again. So every
    path counts once per unit in all entropies and exchanges, n_distinct in sum (in other units it counts again).
    path_entropy and markov_entropy in bits (a path that depended on the previous layer only would have the latter),
    max_entropy (log2 n_distinct), entropy_rate (per layer), n_paths, n_distinct, n_tokens, n_docs. Entropies are
    plug-in and too low where paths are many, by an amount that leaving out units does not show: they have no interval;
    compare equal amounts of text (idea of arXiv 2604.17837). Null: a layer's choice depends on the layer before alone,
    so paths that meet at an expert may exchange what follows; null_entropy, null_low, null_high: mean and 2.5% and
    97.5% quantiles of the path entropy of `n_draws` such exchanges, which keep every transition; p: share of exchanges
    at most as high. excess = null_entropy - path_entropy, in bits: what the layer before does not explain, since the
    bias of many paths is in both. An exchange may give a unit a path twice, which lowers the null where a unit has most
    of its possible paths: there excess may be below 0, and p errs towards 1.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    _, ids = token_array(kept, routing)
    check_choices(ids)
    first = ids[:, :, 0].astype(np.int64)  # [token layer]
    owner = codes(kept[unit])
    table = _table(first, codes(kept["doc_id"]), owner, n)
    once = _once(first, owner)
    about = _about(once, n_draws, seed).with_columns(
        n_paths=pl.lit(len(np.unique(_path_codes(first)))), n_distinct=pl.lit(len(once)), n_tokens=pl.lit(len(first)),
        n_docs=pl.lit(kept["doc_id"].n_unique()),
    )  # fmt: skip
    return table, about


def _table(first: Ints, document: Ints, owner: Ints, n: int) -> pl.DataFrame:
    code = _path_codes(first)
    where, counts = np.unique(code, return_index=True, return_counts=True)[1:]
    names = ["-".join(map(str, path)) for path in first[where]]
    n_docs = pl.DataFrame({"code": code, "doc": document}).group_by("code").agg(n_docs=pl.col("doc").n_unique())
    every = pl.DataFrame({"path": names, "n_tokens": counts, "code": np.arange(len(names))})
    top = every.sort("n_tokens", "path", descending=[True, False]).head(n)
    unique = first[where[top["code"].to_numpy()]]  # [path layer]

    def measures(units: NDArray[np.bool_]) -> Floats:  # [2 path]: share, log2 lift
        at = units[owner]
        found, total = np.bincount(code[at], minlength=len(names))[top["code"].to_numpy()], int(at.sum())
        expected = _markov_share(first[at], unique) * total
        return np.stack([found / total, np.log2((found + 0.5) / (expected + 0.5))])

    _, low, high = block_jackknife(measures, int(owner.max()) + 1)
    share, expected = top["n_tokens"].to_numpy() / len(first), _markov_share(first, unique)
    lift, around = np.log2(share / expected), (high[1] - low[1]) / 2
    columns = {
        "expected_share": expected, "log2_lift": lift, "share_low": np.maximum(low[0], 0),
        "share_high": np.minimum(high[0], 1), "log2_lift_low": lift - around, "log2_lift_high": lift + around,
    }  # fmt: skip
    numbered = top.join(n_docs, on="code", maintain_order="left")
    return numbered.select("path", "n_tokens", pl.Series("share", share), "n_docs").with_columns(
        **{name: pl.Series(values, nan_to_null=True) for name, values in columns.items()}
    )


def _once(first: Ints, owner: Ints) -> Ints:
    """Every path of a unit once: [token layer] -> [distinct layer]."""
    return first[np.sort(np.unique(np.stack([owner, _path_codes(first)], axis=1), axis=0, return_index=True)[1])]


def _about(once: Ints, n_draws: int, seed: int) -> pl.DataFrame:
    entropy, markov = _path_entropies(once)
    drawn = _shuffled_entropies(once, n_draws, np.random.default_rng(seed))
    facts = {
        "path_entropy": float(entropy),
        "markov_entropy": float(markov),
        "null_entropy": float(drawn.mean()),
        "null_low": float(np.quantile(drawn, 0.025)),
        "null_high": float(np.quantile(drawn, 0.975)),
        "excess": float(drawn.mean() - entropy),
        "p": (1 + int((drawn <= entropy).sum())) / (1 + n_draws),
        "max_entropy": float(np.log2(len(once))),
        "entropy_rate": float(entropy) / once.shape[1],
    }
    return pl.DataFrame([facts]).with_columns(pl.col(pl.Float64).fill_nan(None))


def _path_entropies(first: Ints) -> Floats:  # [path layer] -> path entropy and Markov entropy, bits
    counts, where = np.unique(_path_codes(first), return_index=True, return_counts=True)[1:][::-1]
    share = counts / len(first)
    return np.array([_bits(share), -(share * np.log2(_markov_share(first, first[where]))).sum()])


def _shuffled_entropies(first: Ints, n_draws: int, rng: np.random.Generator) -> Floats:
    """Path entropies when the paths that meet at an expert exchange what comes after it, at every layer between."""
    found = np.empty(n_draws)
    for draw in range(n_draws):
        path = first.copy()
        for layer in range(1, first.shape[1] - 1):
            order = np.argsort(path[:, layer], kind="stable")
            mixed = np.argsort(path[:, layer] + rng.random(len(path)))
            path[order, layer + 1 :] = path[mixed, layer + 1 :]
        found[draw] = _bits(np.unique(_path_codes(path), return_counts=True)[1] / len(path))
    return found


def _path_codes(first: Ints) -> Ints:
    """Equal paths get equal numbers; renumbered from 0 layer by layer, so that long paths do not overflow."""
    n_experts, code = int(first.max(initial=0)) + 1, first[:, 0]
    for layer in range(1, first.shape[1]):
        code = np.unique(code * n_experts + first[:, layer], return_inverse=True)[1].ravel()
    return code


def _bits(share: Floats) -> float:
    return float(-(share * np.log2(share)).sum())


def _markov_share(first: Ints, unique: Ints) -> Floats:
    """Probability of each path when every layer depends on the one before only."""
    n_experts = int(max(first.max(initial=0), unique.max(initial=0))) + 1
    probability = np.bincount(first[:, 0], minlength=n_experts)[unique[:, 0]] / len(first)
    for layer in range(first.shape[1] - 1):
        step = np.zeros((n_experts, n_experts))
        np.add.at(step, (first[:, layer], first[:, layer + 1]), 1)
        step /= np.maximum(step.sum(1, keepdims=True), 1)
        probability = probability * step[unique[:, layer], unique[:, layer + 1]]
    return probability
