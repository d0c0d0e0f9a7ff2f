"""Language-specific neurons, in dense MLPs and inside experts: which fire for one language, and does that matter?

A neuron of an expert exists only for tokens that were routed to it, so everything about it is conditional on selection:
an expert chosen for Japanese is one thing, a neuron that speaks Japanese inside a shared expert another. Activity is
that of the gate, silu(gate · x), as in the papers. It describes; `ablate_neurons` tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.errors import ConfigError
from workbench.experiments.neuron_ablation import ablate_neurons
from workbench.experiments.neuron_activity import Activity, neuron_activity
from workbench.experiments.result import Result
from workbench.stats.resampling import Floats, sign_flip_max_t

__all__ = ["Activity", "ablate_neurons", "average_precision", "lape", "neuron_activity"]

KEYS = ("layer", "expert", "neuron")


def lape(
    activity: Activity, *, bar: float = 0.95, share: float = 0.01, min_tokens: int = 1, n_flips: int = 0, seed: int = 0
) -> Result:
    """Language activation probability entropy (Tang et al., arXiv 2402.16438): low where one language alone fires.

    p_lang = share of a neuron's tokens of that language with the gate above 0, of those routed to its expert if it has
    one; entropy of the p normalised over languages, in nats. Neurons whose largest p is not above the `bar` quantile of
    all p are out; of the others the lowest `share` of all neurons is selected, for each language whose p is above the
    bar. Frame: layer, expert (null when dense), neuron, p_<lang>, tokens_<lang>, entropy, log_ratio (of the first two
    languages), `lang` (the selected neuron's languages joined by +, else null). With two languages the entropy orders
    neurons as their share does.

    With `n_flips`, two languages and paired groups also t and p_adjusted: sign flips over groups of the difference of
    p, max-T over all neurons that had tokens in every group. Neurons with fewer than `min_tokens` in some language are
    left out.
    """
    langs = sorted(set(activity.langs))
    if len(langs) < 2:
        raise ConfigError(f"langs: expected at least two languages, got {', '.join(langs)}.")
    frames = []
    for layer in activity.active:
        columns: dict[str, NDArray[Any]] = activity.labels(layer)
        for lang in langs:
            rows = np.array([one == lang for one in activity.langs])
            tokens = activity.tokens[layer][rows].sum(0)[:, None] * np.ones(activity.active[layer].shape[2])
            with np.errstate(invalid="ignore", divide="ignore"):
                columns[f"p_{lang}"] = (activity.active[layer][rows].sum(0) / tokens).ravel()
            columns[f"tokens_{lang}"] = tokens.ravel().astype(np.int64)
        frames.append(_frame(columns))
    enough = pl.all_horizontal(pl.col(f"tokens_{lang}") >= max(min_tokens, 1) for lang in langs)
    frame = _select(pl.concat(frames).filter(enough), langs, bar, share)
    if n_flips:
        frame = frame.join(_paired_tests(activity, langs, n_flips, seed), on=KEYS, how="left", nulls_equal=True)
    settings = {
        "experiment": "lape", **activity.settings, "bar": bar, "share": share, "min_tokens": min_tokens,
        "languages": langs, "n_flips": n_flips, "seed": seed,
    }  # fmt: skip
    return Result(frame.sort("entropy", maintain_order=True), settings)


def average_precision(activity: Activity, lang: str, *, min_sequences: int = 4, seed: int = 0) -> Result:
    """How well a neuron's mean response tells sequences of `lang` from the others (Kojima et al., arXiv 2404.02431).

    The response of a sequence is the mean of silu(gate) over its tokens, over those routed to the neuron's expert if it
    has one; sequences that never chose the expert take no part. Frame: layer, expert, neuron, average_precision,
    baseline (the share of `lang` among the sequences that take part, which a neuron that knows nothing has on average),
    n_sequences; highest first. The paper's neurons are the first and the last 1000: those for and against. Ties are
    broken at random, reproducibly. Neurons with fewer than `min_sequences` of either side are left out.
    """
    is_lang = np.array([one == lang for one in activity.langs])
    if is_lang.all() or not is_lang.any():
        raise ConfigError(f"lang: expected some sequences of {lang!r} and some of another, got only one kind.")
    order = np.random.default_rng(seed).permutation(len(is_lang))
    frames = []
    for layer in activity.response:
        tokens = activity.tokens[layer][order]  # [sequence expert]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = activity.response[layer][order] / tokens[..., None]
        taking_part = tokens > 0
        n_positive, n_all = (taking_part & is_lang[order][:, None]).sum(0), taking_part.sum(0)
        least = np.minimum(n_positive, n_all - n_positive)
        n_neurons = means.shape[2]
        precision = _average_precision(means.reshape(len(order), -1), is_lang[order])
        columns = {
            **activity.labels(layer), "average_precision": precision,
            "baseline": np.repeat(n_positive / np.maximum(n_all, 1), n_neurons),
            "n_sequences": np.repeat(n_all, n_neurons), "_least": np.repeat(least, n_neurons),
        }  # fmt: skip
        frames.append(_frame(columns).filter(pl.col("_least") >= min_sequences).drop("_least"))
    settings = {
        "experiment": "average_precision", **activity.settings, "lang": lang, "min_sequences": min_sequences,
        "seed": seed,
    }  # fmt: skip
    return Result(pl.concat(frames).sort("average_precision", descending=True, maintain_order=True), settings)


def _frame(columns: dict[str, NDArray[Any]]) -> pl.DataFrame:
    frame = pl.DataFrame(columns)
    if "expert" not in frame.columns:
        frame = frame.with_columns(expert=pl.lit(None, pl.Int64))
    return frame.select(pl.col(KEYS).cast(pl.Int64), pl.exclude(*KEYS))


def _select(frame: pl.DataFrame, langs: Sequence[str], bar: float, share: float) -> pl.DataFrame:
    p = frame.select(f"p_{lang}" for lang in langs).to_numpy()  # [neuron lang]
    total = p.sum(1, keepdims=True)
    normalised = np.divide(p, total, where=total > 0, out=np.full_like(p, 1 / len(langs)))
    entropy = -(normalised * np.log(normalised, where=normalised > 0, out=np.zeros_like(p))).sum(1)
    threshold = np.quantile(p, bar) if len(p) else 0.0
    candidates = np.where(p.max(1, initial=0) > threshold, entropy, np.inf)
    n_selected = min(round(share * len(p)), int(np.isfinite(candidates).sum()))
    selected = np.zeros(len(p), dtype=bool)
    selected[np.argsort(candidates, kind="stable")[:n_selected]] = True
    names = ["+".join(lang for lang, above in zip(langs, row, strict=True) if above) for row in p > threshold]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.log(p[:, 0] / p[:, 1])
    return frame.with_columns(
        entropy=entropy, log_ratio=pl.Series(log_ratio).fill_nan(None),
        lang=pl.Series([name if kept else None for name, kept in zip(names, selected, strict=True)], dtype=pl.String),
    )  # fmt: skip


def _paired_tests(activity: Activity, langs: Sequence[str], n_flips: int, seed: int) -> pl.DataFrame:
    """t and max-T p of p_first - p_second over groups that have one sequence of each language."""
    if len(langs) != 2:
        raise ConfigError(f"n_flips: expected two languages to compare, got {', '.join(langs)}. Pass n_flips=0.")
    place = {(group, lang): row for row, (group, lang) in enumerate(zip(activity.groups, activity.langs, strict=True))}
    groups = [group for group in dict.fromkeys(activity.groups) if all((group, lang) in place for lang in langs)]
    first, second = ([place[group, lang] for group in groups] for lang in langs)
    differences, labels = [], []
    for layer in activity.active:
        with np.errstate(invalid="ignore", divide="ignore"):
            p = activity.active[layer] / activity.tokens[layer][..., None]
        change = (p[first] - p[second]).reshape(len(groups), -1)  # [group neuron]
        complete = np.isfinite(change).all(0)
        differences.append(change[:, complete])
        labels.append(_frame(activity.labels(layer)).filter(pl.Series(complete)))
    t, p_adjusted = sign_flip_max_t(np.concatenate(differences, axis=1).astype(np.float64), n_flips, seed)
    return pl.concat(labels).with_columns(t=pl.Series(t), p_adjusted=pl.Series(p_adjusted))


def _average_precision(scores: Floats, positive: np.ndarray) -> Floats:  # [sequence neuron], [sequence] -> [neuron]
    """Mean over positives of the precision at their rank, highest score first; NaN scores take no part."""
    missing = np.isnan(scores)
    order = np.argsort(np.where(missing, np.inf, -scores), axis=0, kind="stable")
    hits = positive[order] & ~np.take_along_axis(missing, order, axis=0)
    precision = np.cumsum(hits, axis=0) / np.arange(1, len(scores) + 1)[:, None]
    result: Floats = (precision * hits).sum(0) / np.maximum(hits.sum(0), 1)
    return result
