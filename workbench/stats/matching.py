"""Which tokens a comparison is about, and how much each of them weighs.

Two conditions hold different text, so a difference of routing may be one of vocabulary, position or length. Every
function here takes a tokens frame and returns one: fewer rows, or a column `weight` that `load.slot_counts` and
`logits.logit_cells` use. After weighting, both conditions of a unit have the same mix of what was matched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.axes import EFFORTS
from workbench.errors import FrameError
from workbench.stats.load import CONTENT_SEGMENTS, Frame
from workbench.stats.resampling import t_interval

POSITION_EDGES = (1, 4, 16, 64, 256, 1024, 4096)


def select_tokens(tokens: Frame, segments: Sequence[str] = CONTENT_SEGMENTS, skip_first: int = 0) -> pl.DataFrame:
    """The tokens of `segments`, without the first `skip_first` of each document (attention sinks, arXiv 2507.23279)."""
    return tokens.lazy().filter(pl.col("segment").is_in(segments), pl.col("pos") >= skip_first).collect()


def at_one_effort(tokens: Frame) -> pl.DataFrame:
    """The documents of one effort, medium if there is any, else the lowest; all of them where none has an effort.

    A prompt read at three efforts is one text and three documents. A null that deals or shuffles tokens within
    documents takes these for independent: of three copies of routes that followed nothing but chance, it called some
    pair of experts certain every time, and found 0.1 bits of words. Give such measures one reading.
    """
    frame = tokens.lazy().collect()
    found = set(frame["effort"].drop_nulls()) if "effort" in frame.columns else set()
    chosen = next((effort for effort in ("medium", *EFFORTS) if effort in found), None)
    return frame if chosen is None else frame.filter(pl.col("effort") == chosen)


def match_tokens(
    tokens: Frame,
    axis: str,
    values: Sequence[str],
    strata: Sequence[str] = ("token_id",),
    unit: str = "group_id",
    segments: Sequence[str] = CONTENT_SEGMENTS,
) -> pl.DataFrame:
    """Only tokens that both conditions of a unit have, weighted so that these have the same mix of `strata`.

    axis: a column, say "lang" or "effort"; values: its two conditions. strata: what must be alike, say ("token_id",)
    for the shared-token contrast or ("token_id", "position_bin") for one at the same places. With n_a and n_b tokens of
    a stratum in a unit, the stratum weighs w = n_a n_b / (n_a + n_b), the Mantel-Haenszel weight (Mantel & Haenszel
    1959), and each of its tokens w / n_a or w / n_b, so that weighted frequencies differ by the stratified risk
    difference. Returns the rows kept, with `weight`, which sums to the same over both conditions of a unit.
    """
    keys = [unit, *strata]
    kept = select_tokens(tokens, segments).filter(pl.col(axis).is_in(list(values)))
    sizes = kept.group_by(*keys, axis).agg(n=pl.len().cast(pl.Float64))
    first, second = (
        sizes.filter(pl.col(axis) == value).drop(axis).rename({"n": name})
        for value, name in zip(values, ("n_a", "n_b"), strict=True)
    )
    both = first.join(second, on=keys, nulls_equal=True)
    shared = pl.col("n_a") * pl.col("n_b") / (pl.col("n_a") + pl.col("n_b"))
    own = pl.when(pl.col(axis) == values[0]).then("n_a").otherwise("n_b")
    return (
        kept.join(both, on=keys, nulls_equal=True, maintain_order="left")
        .with_columns(weight=shared / own)
        .drop("n_a", "n_b")
    )


def with_position_bin(tokens: Frame, column: str = "pos", edges: Sequence[int] = POSITION_EDGES) -> pl.DataFrame:
    """Adds position_bin: the lower edge of the bin of `column` ("pos" or "pos_in_segment"); bins grow by factors of 4.

    Routing changes along a text whatever it says, and most at its beginning (arXiv 2601.10159).
    """
    frame = tokens.lazy().collect()
    lower = pl.lit(0, dtype=pl.Int32)
    for edge in edges:
        lower = pl.when(pl.col(column) >= edge).then(pl.lit(edge, dtype=pl.Int32)).otherwise(lower)
    return frame.with_columns(position_bin=lower)


def match_length(
    tokens: Frame, axis: str, values: Sequence[str], unit: str = "group_id", segments: Sequence[str] = CONTENT_SEGMENTS
) -> pl.DataFrame:
    """The first n tokens of each condition, n being the number that the unit's shorter condition has.

    Answers at high effort are longer; later text differs from earlier text whatever the effort. Units that lack one of
    the conditions are dropped. Tokens are counted in order of document and position.
    """
    kept = select_tokens(tokens, segments).filter(pl.col(axis).is_in(list(values))).sort("doc_id", "pos")
    sizes = kept.group_by(unit, axis).len().group_by(unit).agg(pl.len().alias("found"), least=pl.col("len").min())
    place = pl.int_range(pl.len()).over(unit, axis)
    return (
        kept.with_columns(place=place)
        .join(sizes.filter(pl.col("found") == len(values)), on=unit, maintain_order="left")
        .filter(pl.col("place") < pl.col("least"))
        .drop("place", "found", "least")
    )


def matching_summary(
    tokens: Frame, matched: pl.DataFrame, axis: str, unit: str = "group_id", segments: Sequence[str] = CONTENT_SEGMENTS
) -> pl.DataFrame:
    """How much of the text a matching kept: columns axis, n_tokens (of `segments`), n_kept, share, n_units,
    n_units_kept."""
    everything = select_tokens(tokens, segments)

    def count(frame: pl.DataFrame, suffix: str) -> pl.DataFrame:
        names = {f"n_{suffix}": pl.len(), f"n_units_{suffix}": pl.col(unit).n_unique()}
        return frame.group_by(axis).agg(**names)

    joined = count(everything, "tokens").join(count(matched, "kept"), on=axis, how="left", nulls_equal=True)
    return joined.select(
        axis,
        "n_tokens",
        pl.col("n_kept").fill_null(0),
        share=pl.col("n_kept").fill_null(0) / pl.col("n_tokens"),
        n_units="n_units_tokens",
        n_units_kept=pl.col("n_units_kept").fill_null(0),
    ).sort(axis)


def fertility(
    tokens: Frame, axis: str, values: Sequence[str], unit: str = "group_id", segments: Sequence[str] = ("user",)
) -> pl.DataFrame:
    """How many tokens each condition needs for the same content: one row about the pair.

    Columns first, second (mean tokens per unit), ratio (geometric mean over units of first / second), low, high (95%,
    Student's t of its logarithm; null 1; as in arXiv 2305.15425), chars_per_token_first, chars_per_token_second,
    n_groups. A tokenizer that cuts Japanese finer gives it more, and more repetitive, tokens: contrasts weigh units and
    not tokens for that reason. Raises FrameError when no unit has both.
    """
    kept = select_tokens(tokens, segments).filter(pl.col(axis).is_in(list(values)))
    sizes = kept.group_by(unit, axis).agg(n=pl.len(), chars=pl.col("token").str.strip_chars().str.len_chars().sum())
    first, second = (sizes.filter(pl.col(axis) == value).drop(axis) for value in values)
    both = first.join(second, on=unit, suffix="_second").sort(unit)
    if both.is_empty():
        raise FrameError(f"tokens: expected a {unit} with both {values[0]} and {values[1]}, got none. Pass pairs.")
    n, n_second, chars, chars_second = (both[name].to_numpy() for name in ("n", "n_second", "chars", "chars_second"))
    logs = np.log(n / n_second)
    low, high = t_interval(logs)
    return pl.DataFrame(
        {
            "first": [float(n.mean())],
            "second": [float(n_second.mean())],
            "ratio": [float(np.exp(logs.mean()))],
            "low": [float(np.exp(low))],
            "high": [float(np.exp(high))],
            "chars_per_token_first": [chars.sum() / max(n.sum(), 1)],
            "chars_per_token_second": [chars_second.sum() / max(n_second.sum(), 1)],
            "n_groups": [len(both)],
        }
    )
