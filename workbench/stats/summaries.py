"""Plain summaries with the prompt group as the unit: router entropy, margin, answer lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.axes import CHANNELS
from workbench.stats.load import CONTENT_SEGMENTS, Frame
from workbench.stats.resampling import t_interval


def layer_means(
    tokens: Frame,
    routing: Frame,
    value: str,
    by: Sequence[str],
    segments: Sequence[str] = CONTENT_SEGMENTS,
) -> pl.DataFrame:
    """Mean of a routing column per layer: columns *by, layer, mean, low, high, n_groups.

    `value` is router_entropy (nats, 0 to ln E; entropy of the full softmax, not of the k weights) or router_margin
    (logits; k-th minus (k+1)-th, the smallest push that changes the choice). Mean over tokens within a group, then over
    groups, with a 95% interval over groups. No null: a description. `by` are columns of the tokens frame.
    """
    keys = list(by)
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).select("doc_id", "pos", "group_id", *keys)
    units = (
        routing.lazy()
        .select("doc_id", "pos", "layer", value)
        .join(kept, on=["doc_id", "pos"])
        .group_by(*keys, "layer", "group_id")
        .agg(pl.col(value).cast(pl.Float64).mean())
        .filter(pl.col(value).is_not_null())
        .collect()
    )
    return group_means(units, value, [*keys, "layer"])


def segment_lengths(tokens: Frame, segments: Sequence[str] = CHANNELS) -> pl.DataFrame:
    """Tokens the model wrote per channel: columns lang, effort, segment, mean, low, high, n_groups.

    Counts decoded tokens of each segment per document, channel names and other scaffolding left out; a document without
    the channel counts 0. Mean over a group's documents, then over groups; 95% interval over groups. No null: a
    description.
    """
    keys = ["lang", "effort", "segment"]
    written = (
        tokens.lazy()
        .group_by("doc_id", "group_id", "lang", "effort")
        .agg(*(((pl.col("segment") == name) & (pl.col("phase") == "decode")).sum().alias(name) for name in segments))
    )
    units = (
        written.unpivot(segments, index=["doc_id", "group_id", "lang", "effort"], variable_name="segment")
        .group_by(*keys, "group_id")
        .agg(pl.col("value").cast(pl.Float64).mean())
        .collect()
    )
    return group_means(units, "value", keys)


def group_means(units: pl.DataFrame, value: str, by: Sequence[str]) -> pl.DataFrame:
    """Mean over units with its 95% interval: columns *by, mean, low, high, n_groups.

    `units` has one row per unit and combination of `by`.
    """
    rows = []
    ordered = units.sort(*by, "group_id")
    for key, part in ordered.group_by(list(by), maintain_order=True):
        values = part[value].to_numpy()
        low, high = t_interval(values)
        rows.append((*key, float(np.mean(values)), float(low), float(high), len(values)))
    names = {name: units.schema[name] for name in by}
    numbers = {"mean": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n_groups": pl.Int64}
    return pl.DataFrame(rows, schema={**names, **numbers}, orient="row")
