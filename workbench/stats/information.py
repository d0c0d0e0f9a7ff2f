"""What routing depends on, in bits: mutual information and its decomposition, with what chance gives subtracted.

Per slot: draw a token and one of its k experts. Plug-in estimates are far too high where a label has many values, so
each is repeated with labels shuffled, at the level at which they would be exchangeable if they did not matter: between
groups for what a group has one of (topic), documents for what these have one of (language), between tokens for the rest
(token id, segment).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.stats.index import Frame, Ints, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS
from workbench.stats.resampling import Floats, block_jackknife

DENSE = 20_000_000  # cells of a count table


def mutual_information(
    tokens: Frame,
    routing: Frame,
    label: str,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    n_shuffles: int = 20,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """I(label; expert) per slot and layer: columns layer, factor, bits, shuffled, excess, low, high, share, p, ...

    bits: plug-in; shuffled: mean over label shuffles; excess = bits - shuffled, with its 95% interval (delete-a-group
    jackknife over `unit`); share: excess / H(expert); p: share of shuffles that reach bits. Null: excess 0. Also
    entropy (H of the expert in bits), n_labels, n_units, n_tokens, n_tests. A load-corrected answer to "does it have
    its own experts": where a few experts take everything, vocabulary looks specialised at 0 bits (arXiv 2409.02060's
    measure on the models of 2502.19261).
    """
    return decompose_routing(tokens, routing, (label,), segments, n_shuffles, seed, unit).filter(
        pl.col("factor") == label
    )


def decompose_routing(
    tokens: Frame,
    routing: Frame,
    factors: Sequence[str] = ("token_id", "lang", "segment", "topic"),
    segments: Sequence[str] = CONTENT_SEGMENTS,
    n_shuffles: int = 20,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """H(expert) taken apart by the chain rule: one row per layer and factor, in the order given, and one "residual".

    bits of factor j = I(expert; factor j | factors before it) per slot; its shuffled value keeps the factors before and
    shuffles factor j among tokens alike in them (for later factors p is approximate: read the interval); the rest as in
    `mutual_information`. Order matters: what two factors share goes to the first, so put token identity first and ask
    what the others add (design of arXiv 2604.17182, in bits). residual = H(expert) - sum of excesses: what the factors
    leave open, context and noise. Null: a factor adds nothing, excess 0.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    layers, ids = token_array(kept, routing)
    columns = [codes(kept[factor]) for factor in factors]
    document, groups = codes(kept["doc_id"]), codes(kept[unit])
    n_units = int(groups.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    shuffles, before = [], np.zeros(len(kept), dtype=np.int64)
    for column in columns:
        shuffles.append([_shuffled(column, before, groups, document, rng) for _ in range(n_shuffles)])
        before = _join(before, column)

    def terms(units: np.ndarray, n: int) -> tuple[Floats, Floats]:  # [factor layer], [factor shuffle layer]
        at = units[groups]
        return _chain([c[at] for c in columns], [[s[at] for s in shuffled[:n]] for shuffled in shuffles], ids[at])

    bits, chance = terms(np.ones(n_units, dtype=bool), n_shuffles)
    _, low, high = block_jackknife(lambda units: _excess(*terms(units, 3)), n_units, n_blocks=10)
    center = (low + high) / 2
    excess = bits - chance.mean(1)
    entropy = _conditional_entropy(np.zeros(len(kept), dtype=np.int64), ids)
    numbers = {
        "bits": bits,
        "shuffled": chance.mean(1),
        "excess": excess,
        "low": low - center + excess,
        "high": high - center + excess,
        "share": _share(excess, entropy),
        "p": (1 + (chance >= bits[:, None] - 1e-12).sum(1)) / (n_shuffles + 1),
    }
    frame = pl.DataFrame(
        {
            "layer": layers * len(factors),
            "factor": np.repeat(list(factors), len(layers)),
            **{name: values.ravel() for name, values in numbers.items()},
            "n_labels": np.repeat([int(column.max(initial=-1)) + 1 for column in columns], len(layers)),
        }
    )
    rest = entropy - excess.sum(0)
    residual = pl.DataFrame({"layer": layers, "factor": "residual", "bits": rest, "share": _share(rest, entropy)})
    return pl.concat([frame, residual], how="diagonal").with_columns(
        pl.col("share").fill_nan(None),
        entropy=pl.Series(np.tile(entropy, len(factors) + 1)),
        n_units=pl.lit(n_units),
        n_tokens=pl.lit(len(kept)),
        n_tests=pl.lit(len(layers) * len(factors)),
    )


def _share(part: Floats, entropy: Floats) -> Floats:  # [... layer], [layer]; NaN where all tokens go the same way
    entropy = np.broadcast_to(entropy, part.shape)
    return np.divide(part, entropy, out=np.full(part.shape, np.nan), where=entropy > 1e-12)


def _excess(bits: Floats, chance: Floats) -> Floats:
    return bits - chance.mean(1)


def _shuffled(column: Ints, before: Ints, group: Ints, document: Ints, rng: np.random.Generator) -> Ints:
    """Labels shuffled among what is alike in the factors before it, so that words of one language keep their language.

    What a whole group has in common (topic) moves with the group, what a document has (language) with the document; the
    rest moves token by token, as the first factor within its document.
    """
    for owner in (group, document):
        first = np.unique(owner, return_index=True)[1]
        if (column == column[first][owner]).all():
            start, place = np.unique(_join(before, owner), return_index=True, return_inverse=True)[1:]
            return mixed(column[start], before[start], rng)[place]
    return mixed(column, before if before.any() else document, rng)


def mixed(values: Ints, stratum: Ints, rng: np.random.Generator) -> Ints:
    """The values in a random order within each stratum."""
    mixed = np.empty_like(values)
    mixed[np.lexsort((rng.random(len(values)), stratum))] = values[np.argsort(stratum, kind="stable")]
    return mixed


def _chain(columns: list[Ints], shuffles: list[list[Ints]], ids: np.ndarray) -> tuple[Floats, Floats]:
    """Bits of each factor given those before it, and of its shuffles: [factor layer], [factor shuffle layer]."""
    before = np.zeros(len(ids), dtype=np.int64)
    entropy = _conditional_entropy(before, ids)
    bits, chance = [], []
    for column, shuffled in zip(columns, shuffles, strict=True):
        chance.append(np.stack([entropy - _conditional_entropy(_join(before, other), ids) for other in shuffled]))
        before = _join(before, column)
        left = _conditional_entropy(before, ids)
        bits.append(entropy - left)
        entropy = left
    return np.stack(bits), np.stack(chance)


def _join(first: Ints, second: Ints) -> Ints:
    """One number per pair of labels, without gaps."""
    return np.unique(first * (second.max(initial=0) + 1) + second, return_inverse=True)[1]


def _conditional_entropy(label: Ints, ids: np.ndarray) -> Floats:  # [token], [token layer k] -> bits [layer]
    """H(expert | label) per slot."""
    n_experts, n_labels = int(ids.max(initial=0)) + 1, int(label.max(initial=0)) + 1
    entropies = []
    for layer in range(ids.shape[1]):
        keys = (label[:, None] * n_experts + ids[:, layer]).ravel()
        if n_labels * n_experts <= DENSE:
            joint = np.bincount(keys, minlength=n_labels * n_experts)
        else:
            joint = np.unique(keys, return_counts=True)[1]
        sizes = np.bincount(label, minlength=n_labels) * ids.shape[2]
        entropies.append((_count_entropy(joint) - _count_entropy(sizes)) / max(keys.size, 1) / np.log(2))
    return np.array(entropies)


def _count_entropy(counts: Ints) -> float:
    """-sum n ln n, whose differences are entropies times the total."""
    n = counts[counts > 0].astype(np.float64)
    return float(-(n * np.log(n)).sum())
