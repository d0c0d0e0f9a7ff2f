"""What single experts are for: by language, topic, token class, position, segment, effort or phase, and by word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.errors import FrameError
from workbench.stats.index import Frame, Ints, check_choices, check_counts, check_experts, codes, token_array
from workbench.stats.load import CONTENT_SEGMENTS, slot_counts
from workbench.stats.resampling import (
    Floats,
    block_jackknife,
    half_width,
    permutation_max_t,
    sign_flip_max_t,
    welch_interval,
)

ROLES = ("input", "next")
LEAST_P = 40  # resamples for each value, so that Bonferroni over values leaves a p below 0.05
NORMAL = 1.959964  # half of the width of a 95% interval, in standard errors


def specialisation(
    tokens: Frame,
    routing: Frame,
    column: str,
    n_experts: int,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    unit: str = "group_id",
    n_resamples: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Does an expert prefer the tokens with a value of `column` to the other tokens? One row per value, layer, expert.

    column: lang, topic, token_class, segment, effort, phase, position_bin (matching.with_position_bin) ... Columns:
    value, layer, expert, f_in, f_out (selection frequency of tokens with the value, and of the rest), difference, low,
    high (95%), log2_ratio (with half a slot added to both, Jeffreys), t, p_adjusted, design, n_units, n_tokens,
    n_tests.

    design "within": units that hold both kinds of token are compared with themselves (sign flips; Student's t).
    "between": units hold one kind only, as with topics, so units with the value are compared with the others (labels
    shuffled between units; Welch's t interval). p_adjusted: max-T over layers and experts, Bonferroni over values.
    Null: the value makes no difference. Where a value has a token or two of a unit, a rare expert may not meet it once,
    and differences that are all alike say nothing: no standard error is taken for less than that of independent tokens,
    widened by the design effect that the experts have on average (with one token of each of 40 units and 128 experts,
    k = 8, all null families had a p of at most 0.05 without this, 1% have with it, and 3% where it occurs three
    times). Domain specialisation of arXiv 2409.02060, against the rest instead of the uniform line. "Within"
    holds the document fixed, not the words: see `matching.match_tokens`.
    """
    counts = slot_counts(tokens, routing, [unit, column], segments)
    n_resamples = max(n_resamples, LEAST_P * counts[column].drop_nulls().n_unique())
    check_counts(counts, n_experts)
    if not counts[column].drop_nulls().len():
        raise FrameError(f"{column}: expected values, got null alone. Pass a column that the run recorded.")
    layers = counts["layer"].unique().sort().to_list()
    slots, sizes, values = _value_cube(counts, column, unit, layers, n_experts)
    frames = []
    for place, value in enumerate(values):
        n_in, n_out = sizes[place], sizes.sum(0) - sizes[place]  # [unit]
        inside, outside = slots[place], slots.sum(0) - slots[place]  # [unit layer expert]
        both = (n_in > 0) & (n_out > 0)
        design = "within" if both.sum() * 2 > (n_in > 0).sum() else "between"
        if design == "within":
            numbers = _within(inside[both], outside[both], n_in[both], n_out[both], n_resamples, seed)
            n_units = int(both.sum())
        else:
            numbers = _between(inside + outside, n_in + n_out, n_in > n_out, n_resamples, seed)
            n_units = len(n_in)
        ratio = np.log2((inside.sum(0) + 0.5) / n_in.sum()) - np.log2((outside.sum(0) + 0.5) / max(n_out.sum(), 1))
        frames.append(
            pl.DataFrame(
                {
                    "layer": np.repeat(np.array(layers, dtype=np.int64), n_experts),
                    "expert": np.tile(np.arange(n_experts), len(layers)),
                    **numbers,
                    "log2_ratio": ratio.ravel(),
                }
            ).select(
                pl.lit(value).alias("value"),
                pl.all(),
                design=pl.lit(design),
                n_units=pl.lit(n_units),
                n_tokens=pl.lit(int(n_in.sum())),
            )
        )
    n_tests = len(values) * len(layers) * n_experts
    adjusted = (pl.col("p_adjusted") * len(values)).clip(upper_bound=1)
    return pl.concat(frames).with_columns(adjusted, n_tests=pl.lit(n_tests))


def _value_cube(
    counts: pl.DataFrame, column: str, unit: str, layers: list[int], n_experts: int
) -> tuple[Floats, Floats, list[object]]:
    """Slots [value unit layer expert], tokens [value unit], and the values, sorted."""
    known = counts.filter(pl.col(column).is_not_null())
    values = known[column].unique().sort().to_list()
    value, row = codes(known[column]), codes(known[unit])
    slots = np.zeros((len(values), int(row.max(initial=-1)) + 1, len(layers), n_experts))
    depth, expert = np.searchsorted(layers, known["layer"].to_numpy()), known["expert"].cast(pl.Int64).to_numpy()
    slots[value, row, depth, expert] = known["slots"].to_numpy()
    sizes = np.zeros(slots.shape[:2])
    sizes[value, row] = known["n_tokens"].to_numpy()
    return slots, sizes, values


def _within(
    inside: Floats, outside: Floats, n_in: Floats, n_out: Floats, n_resamples: int, seed: int
) -> dict[str, Floats]:
    f_in, f_out = (slots / n[:, None, None] for slots, n in ((inside, n_in), (outside, n_out)))
    differences = (f_in - f_out).reshape(len(n_in), -1)
    overall = ((inside + outside).sum(0) / max((n_in + n_out).sum(), 1)).ravel()
    least = overall * (1 - overall) * (1 / n_in + 1 / n_out).sum() / max(len(n_in), 1) ** 2  # of independent tokens
    if len(differences) > 1:  # tokens of a unit are alike, on average by so much
        least = least * max(1.0, (differences.var(0, ddof=1) / len(differences)).sum() / max(least.sum(), 1e-300))
    mean, around = differences.mean(0), np.maximum(half_width(differences), NORMAL * np.sqrt(least))
    t, p_adjusted = sign_flip_max_t(differences, n_resamples, seed, least)
    means = {"f_in": f_in.mean(0).ravel(), "f_out": f_out.mean(0).ravel(), "difference": mean}
    return {**means, "low": mean - around, "high": mean + around, "t": t, "p_adjusted": p_adjusted}


def _between(slots: Floats, n: Floats, has: np.ndarray, n_resamples: int, seed: int) -> dict[str, Floats]:
    frequency = (slots / n[:, None, None]).reshape(len(n), -1)
    t, p_adjusted = permutation_max_t(frequency, has, n_shuffles=n_resamples, seed=seed)
    missing = np.full(frequency.shape[1], np.nan)
    f_in, f_out = (frequency[side].mean(0) if side.any() else missing for side in (has, ~has))
    low, high = welch_interval(frequency[has], frequency[~has])
    return {
        "f_in": f_in, "f_out": f_out, "difference": f_in - f_out, "low": low, "high": high, "t": t,
        "p_adjusted": p_adjusted,
    }  # fmt: skip


def vocabulary_specialisation(
    tokens: Frame,
    routing: Frame,
    n_experts: int,
    role: str = "input",
    min_count: int = 20,
    segments: Sequence[str] = CONTENT_SEGMENTS,
    n_draws: int = 200,
    seed: int = 0,
    unit: str = "group_id",
) -> pl.DataFrame:
    """Does each word go to one expert, beyond what load alone gives? One row per layer.

    Columns layer, role, specialisation, null, excess, low, high, n_types, n_tokens, n_docs. specialisation = mean over
    word types of max_e N_xe / N_x over the first expert (arXiv 2409.02060, section 5.3), of types with at least
    `min_count` tokens; null = the same for N_x independent draws from the layer's load; excess = (specialisation -
    null) / (1 - null): 0 when load explains it, 1 when every word has its expert. low, high: of excess, delete-a-group
    jackknife over units with the null held. role "input": the token itself; "next": the token after it, in the same
    document. Published values without the correction reach 0.995 on models whose excess is near 0. One frequent word
    with an expert of its own raises the load, and with it the null of all other words, so that excess may fall below 0:
    the headline, with a test, is `information.mutual_information` of token_id.
    """
    if role not in ROLES:
        raise ValueError(f"role: expected one of {', '.join(ROLES)}, got {role!r}.")
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).sort("doc_id", "pos").collect()
    layers, ids = token_array(kept, routing)
    if ids.size:
        check_choices(ids, n_experts)
    word = kept["token_id"] if role == "input" else kept.select(pl.col("token_id").shift(-1).over("doc_id"))["token_id"]
    known = word.is_not_null().to_numpy()
    word_code = codes(word.filter(word.is_not_null()))
    n_types = np.bincount(word_code)
    frequent = np.flatnonzero(n_types >= min_count)
    unit_code = codes(kept[unit])[known]
    rng = np.random.default_rng(seed)
    rows = []
    for place, layer in enumerate(layers):
        first = ids[known, place, 0].astype(np.int64)
        found, low, high = _specialised(word_code, first, unit_code, frequent, len(n_types), n_experts)
        load, sizes = np.bincount(first, minlength=n_experts) / max(len(first), 1), n_types[frequent]
        null = _largest_share(sizes, load, n_draws, rng) if len(frequent) else np.nan
        excess = [(value - null) / (1 - null) if null < 1 else np.nan for value in (found, low, high)]
        rows.append((layer, role, found, null, *excess, len(frequent), int(sizes.sum()), kept["doc_id"].n_unique()))
    names = ["layer", "role", "specialisation", "null", "excess", "low", "high", "n_types", "n_tokens", "n_docs"]
    return pl.DataFrame(rows, schema=names, orient="row")


def _specialised(
    word: Ints, expert: Ints, unit: Ints, frequent: Ints, n_types: int, n_experts: int
) -> tuple[float, float, float]:
    """Mean over the frequent types of their largest share, with its interval over units."""
    cell = word * n_experts + expert

    def mean_of_largest(kept: NDArray[np.bool_]) -> Floats:
        table = np.bincount(cell[kept[unit]], minlength=n_types * n_experts).reshape(n_types, n_experts)[frequent]
        total = table.sum(1)
        return np.asarray((table.max(1)[total > 0] / total[total > 0]).mean() if total.any() else np.nan)

    estimate, low, high = block_jackknife(mean_of_largest, int(unit.max(initial=-1)) + 1)
    return float(estimate), float(low), float(high)


def _largest_share(sizes: Ints, load: Floats, n_draws: int, rng: np.random.Generator) -> float:
    """Mean over types of E[max_e Multinomial(N_x, load)_e / N_x]; types of one size share their draws."""
    unique, times = np.unique(sizes, return_counts=True)
    shares = [float((rng.multinomial(n, load, n_draws).max(1) / n).mean()) for n in unique]
    return float(np.average(shares, weights=times))


def top_tokens(
    tokens: Frame, routing: Frame, n_experts: int, n: int = 15, min_count: int = 5,
    segments: Sequence[str] = CONTENT_SEGMENTS,
) -> pl.DataFrame:  # fmt: skip
    """The words that each expert takes most beyond its load: columns layer, expert, token, rate, log2_lift, ...

    rate = share of the word's tokens that chose the expert; log2_lift compares it with the expert's frequency over all
    tokens, both with half a token added; n_tokens and n_docs say on how much it rests. The n highest lifts per expert
    among words of at least `min_count` tokens that chose it at least twice. A list to read (arXiv 2409.02060), with
    neither interval nor test: the best of many words beats a null of 0 always. The test of words is
    `information.mutual_information` of token_id.
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    sizes = {"n_tokens": pl.len(), "n_docs": pl.col("doc_id").n_unique()}
    words = kept.group_by("token_id").agg(pl.col("token").first(), **sizes)
    counts = slot_counts(kept, routing, ["token_id"], segments).drop("n_tokens").join(words, on="token_id")
    check_experts(counts["expert"].max(), n_experts)  # type: ignore[arg-type]
    total = len(kept)
    overall = pl.col("slots").sum().over("layer", "expert")
    lift = ((pl.col("slots") + 0.5) / (pl.col("n_tokens") + 1)) / ((overall + 0.5) / (total + 1))
    return (
        counts.with_columns(rate=pl.col("slots") / pl.col("n_tokens"), log2_lift=lift.log(2))
        .filter(pl.col("n_tokens") >= min_count, pl.col("slots") >= 2)
        .sort("layer", "expert", "log2_lift", "token_id", descending=[False, False, True, False])  # ties in one order
        .group_by("layer", "expert", maintain_order=True)
        .head(n)
        .select("layer", "expert", "token", "token_id", "rate", "log2_lift", "slots", "n_tokens", "n_docs")
    )
