"""The way that a token takes through the first experts of all layers, against a chain that forgets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.stats.index import Frame, Ints, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, block_jackknife


def paths(
    tokens: Frame, routing: Frame, n: int = 50, segments: Sequence[str] = CONTENT_SEGMENTS, n_draws: int = 99,
    seed: int = 0, unit: str = "group_id",
) -> tuple[pl.DataFrame, pl.DataFrame]:  # fmt: skip
    """(the n most frequent paths of first experts through the layers, one row about all of them).

    paths: path (expert of each layer, joined by "-"), n_tokens, share, n_docs, expected_share (first-order Markov chain
    with the layers' own transitions), log2_lift. about: path_entropy and markov_entropy in bits (a path that depended
    on the previous layer only would have the latter), max_entropy, entropy_rate (per layer), n_paths, n_tokens, n_docs.
    Entropies are plug-in and too low where paths are many: compare equal amounts of text (idea of arXiv 2604.17837).

    path_entropy_low, _high, markov_entropy_low, _high: delete-a-group jackknife over units. Null: a layer's choice
    depends on the layer before alone, so tokens that meet at an expert may exchange what follows; null_entropy,
    null_low, null_high: mean and 2.5% and 97.5% quantiles of the path entropy of `n_draws` such exchanges, which is as
    much too low as the one found and keeps every transition; p: share of exchanges at most as high. Tokens are
    exchanged alone, so what documents repeat counts as structure.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    _, ids = token_array(kept, routing)
    first = ids[:, :, 0].astype(np.int64)  # [token layer]
    _, where, inverse, counts = np.unique(
        _path_codes(first), return_index=True, return_inverse=True, return_counts=True
    )
    unique = first[where]
    share = counts / len(first)
    expected = _markov_share(first, unique)
    docs = pl.DataFrame({"path": inverse.ravel(), "doc": codes(kept["doc_id"])}).group_by("path").agg(
        n_docs=pl.col("doc").n_unique()
    )  # fmt: skip
    table = pl.DataFrame(
        {
            "path": ["-".join(map(str, path)) for path in unique],
            "n_tokens": counts,
            "share": share,
            "n_docs": docs.sort("path")["n_docs"],
            "expected_share": expected,
            "log2_lift": np.log2(share / expected),
        }
    )
    unit_code = codes(kept[unit])
    numbers = block_jackknife(
        lambda units: _path_entropies(first[units[unit_code]]), int(unit_code.max(initial=-1)) + 1
    )
    entropies = dict(zip(("path_entropy", "markov_entropy"), np.stack(numbers, 1).tolist(), strict=True))
    drawn = _shuffled_entropies(first, n_draws, np.random.default_rng(seed))
    facts: dict[str, float] = {}
    for name, (value, low, high) in entropies.items():
        facts |= {name: value, f"{name}_low": low, f"{name}_high": high}
    facts |= {
        "null_entropy": float(drawn.mean()),
        "null_low": float(np.quantile(drawn, 0.025)),
        "null_high": float(np.quantile(drawn, 0.975)),
        "p": (1 + int((drawn <= facts["path_entropy"]).sum())) / (1 + n_draws),
        "max_entropy": float(np.log2(len(first))),
        "entropy_rate": facts["path_entropy"] / first.shape[1],
    }
    about = pl.DataFrame([facts]).with_columns(
        n_paths=pl.lit(len(unique)), n_tokens=pl.lit(len(first)), n_docs=pl.lit(kept["doc_id"].n_unique())
    )
    return table.sort("n_tokens", "path", descending=[True, False]).head(n), about


def _path_entropies(first: Ints) -> Floats:  # [token layer] -> path entropy and Markov entropy, bits
    counts, where = np.unique(_path_codes(first), return_index=True, return_counts=True)[1:][::-1]
    share = counts / len(first)
    return np.array([_bits(share), -(share * np.log2(_markov_share(first, first[where]))).sum()])


def _shuffled_entropies(first: Ints, n_draws: int, rng: np.random.Generator) -> Floats:
    """Path entropies when the tokens that meet at an expert exchange what comes after it, at every layer between."""
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
    n_experts = int(first.max(initial=0)) + 1
    probability = np.bincount(first[:, 0], minlength=n_experts)[unique[:, 0]] / len(first)
    for layer in range(first.shape[1] - 1):
        step = np.zeros((n_experts, n_experts))
        np.add.at(step, (first[:, layer], first[:, layer + 1]), 1)
        step /= np.maximum(step.sum(1, keepdims=True), 1)
        probability = probability * step[unique[:, layer], unique[:, layer + 1]]
    return probability
