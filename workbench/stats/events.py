"""Routing around events: channel changes and thought switches; and along the whole of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.axes import CHANNELS
from workbench.stats.index import Frame, locate
from workbench.stats.resampling import sign_flip_max_t, t_interval

# How a line of reasoning turns, after the labels of arXiv 2506.18167 and the anchors of 2505.14681.
SWITCHES = (
    "しかし", "待って", "別の", "つまり", "ところが", "一方", "でも", "もう一度", "確かめ", "確認", "見直",
    "wait", "alternatively", "however", "but", "hmm", "actually", "instead", "let me check",
)  # fmt: skip
_ENDS = ("。", "．", ".", "!", "?", "！", "？", "\n")


def channel_changes(tokens: Frame, channels: Sequence[str] = CHANNELS) -> pl.DataFrame:
    """The first token of every channel of every document: columns doc_id, pos, event ("analysis", "final" ...)."""
    first = (pl.col("pos_in_segment") == 0) & pl.col("segment").is_in(channels)
    return tokens.lazy().filter(first).select("doc_id", "pos", event="segment").sort("doc_id", "pos").collect()


def sentence_starts(tokens: Frame, segment: str = "analysis") -> pl.DataFrame:
    """The first token of every sentence but the first within runs of a segment: columns doc_id, pos, text.

    Sentences end with 。 ． . ! ? or a line break; text is what follows, to 24 characters, in lower case. A full stop
    between digits ends none.
    """
    kept = tokens.lazy().filter(pl.col("segment") == segment).sort("doc_id", "pos").collect()
    rows = []
    for (doc_id, _), part in kept.group_by("doc_id", "segment_index", maintain_order=True):
        pieces, positions = part["token"].to_list(), part["pos"].to_list()
        for place in range(1, len(pieces)):
            ended = pieces[place - 1].rstrip(" ").endswith(_ENDS)
            decimal = pieces[place][:1].isdigit() and pieces[place - 1].endswith((".", "．"))
            if ended and not decimal and pieces[place].strip(" \n"):
                rows.append((doc_id, positions[place], "".join(pieces[place : place + 24]).strip().lower()[:24]))
    return pl.DataFrame(rows, schema={"doc_id": pl.String, "pos": pl.Int32, "text": pl.String}, orient="row")


def thought_switches(
    tokens: Frame, segment: str = "analysis", words: Sequence[str] = SWITCHES
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(sentences that open with one of `words`, all other sentence starts): both doc_id, pos, event.

    The others, from the same documents, are the controls: an effect that every sentence start has is no switch.
    """
    starts = sentence_starts(tokens, segment)
    word = pl.coalesce(pl.when(_opens(word)).then(pl.lit(word)) for word in words)
    labelled = starts.with_columns(event=word)
    events = labelled.filter(pl.col("event").is_not_null()).select("doc_id", "pos", "event")
    others = labelled.filter(pl.col("event").is_null()).with_columns(event=pl.lit("other sentence"))
    return events, others.select("doc_id", "pos", "event")


def _opens(word: str) -> pl.Expr:
    if not word.isascii():
        return pl.col("text").str.starts_with(word)
    return pl.col("text").str.contains(rf"^{word}(?:[^a-z]|$)")


def event_average(
    values: pl.DataFrame,
    tokens: Frame,
    events: pl.DataFrame,
    controls: pl.DataFrame,
    value: str,
    reach: int = 16,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Mean of a column around events, less that around controls of the same document: one row per layer and offset.

    values: doc_id, pos, layer and `value` (turnover or velocity of `dynamics.token_motion`, router_entropy of the
    routing ...). Columns layer, offset (-reach .. reach), event, control, difference, low, high (95%, t over
    groups), t, p_adjusted (sign flips over groups, max-T over all layers and offsets), n_events, n_controls (of that
    row), n_groups, n_tests. The mean of a document's events less that of its controls, then the mean over a group's
    documents, then over groups. A document without both is left out, and so is an event or control without a value at
    every layer and offset that the two share anywhere, so that the same ones stand behind every row. Null: an event is
    like any control of its document. No row where no document has both. Event-triggered averages with controls of the
    same document are this project's; which sentences are events follows arXiv 2506.18167.
    """
    groups = tokens.lazy().select("doc_id", "group_id").unique().collect()
    sides = _whole_windows(*(_around(values, part, value, reach) for part in (events, controls)))
    means = [
        part.group_by("doc_id", "layer", "offset").agg(pl.col(value).mean().alias(name), pl.len().alias(f"n_{name}s"))
        for part, name in zip(sides, ("event", "control"), strict=True)
    ]
    both = means[0].join(means[1], on=["doc_id", "layer", "offset"]).join(groups, on="doc_id").sort("doc_id")
    units = both.group_by("group_id", "layer", "offset", maintain_order=True).agg(
        pl.col("event", "control").mean(), pl.col("n_events", "n_controls").sum()
    )
    return _over_groups(units.sort("group_id", "layer", "offset"), n_resamples, seed)


def _around(values: pl.DataFrame, events: pl.DataFrame, value: str, reach: int) -> pl.DataFrame:
    """The values at every offset from every event: columns doc_id, number (of the event), layer, offset, value."""
    offsets = np.arange(-reach, reach + 1)
    n = len(events)
    number = np.repeat(np.arange(n), len(offsets))
    at = events.select("doc_id", "pos")[number].with_columns(number=pl.Series(number, dtype=pl.Int64))
    at = at.with_columns(offset=pl.Series(np.tile(offsets, n))).with_columns(pos=pl.col("pos") + pl.col("offset"))
    at = at.with_columns(pl.col("pos").cast(values.schema["pos"]))
    known = values.select("doc_id", "pos", "layer", value).drop_nulls(value)
    return at.join(known, on=["doc_id", "pos"]).drop("pos")


def _whole_windows(events: pl.DataFrame, controls: pl.DataFrame) -> list[pl.DataFrame]:
    """Those with a value in every cell (layer, offset) that events and controls of some document have in common."""
    place, cell = ["doc_id", "layer", "offset"], ["layer", "offset"]
    cells = events.select(place).join(controls.select(place), on=place, how="semi").select(cell).unique()
    shared = [part.join(cells, on=cell, how="semi") for part in (events, controls)]
    return [part.filter(pl.len().over("number") == len(cells)) for part in shared]


def _over_groups(units: pl.DataFrame, n_resamples: int, seed: int) -> pl.DataFrame:
    """Rows of `event_average` from those of the groups, each of which has every cell once, in order."""
    cells = units.group_by("layer", "offset").agg(pl.col("n_events", "n_controls").sum().cast(pl.Int64))
    cells, n_groups = cells.sort("layer", "offset"), units["group_id"].n_unique()
    event, control = (units[name].to_numpy().reshape(n_groups, len(cells)) for name in ("event", "control"))
    difference = event - control
    low, high = t_interval(difference)
    t, p_adjusted = sign_flip_max_t(difference, n_resamples, seed)
    means = (part.sum(0) / max(n_groups, 1) for part in (event, control, difference))
    numbers = dict(zip(("event", "control", "difference"), means, strict=True))
    numbers |= {"low": low, "high": high, "t": t, "p_adjusted": p_adjusted}
    return cells.select(
        "layer", "offset", *(pl.Series(name, part, dtype=pl.Float64) for name, part in numbers.items()),
        "n_events", "n_controls", n_groups=pl.lit(n_groups), n_tests=pl.lit(len(cells)),
    )  # fmt: skip


def timeline(
    values: pl.DataFrame,
    tokens: Frame,
    value: str,
    segments: Sequence[str] = CHANNELS,
    n_bins: int = 10,
    by: Sequence[str] = (),
) -> pl.DataFrame:
    """A column along each channel from its beginning to its end: columns *by, segment, bin, layer, mean, low, high, ...

    Every run of a segment is cut into n_bins equal parts, so that answers of different lengths lie over each other (bin
    0 holds the first tenth); runs shorter than n_bins tokens are left out. Mean over a group's tokens, then over
    groups, 95% by Student's t over groups; n_groups, n_tokens. No null: neighbouring bins hold different words, so this
    is a description (this project's; the traces of arXiv 2505.16056 and others are of single answers).
    """
    kept = tokens.lazy().filter(pl.col("segment").is_in(segments)).collect()
    size = pl.len().over("doc_id", "segment_index")
    kept = kept.with_columns(bin=pl.col("pos_in_segment").cast(pl.Int64) * n_bins // size).filter(size >= n_bins)
    keys = [*by, "segment", "bin"]
    place = locate(kept.select("doc_id", "pos"), values)
    labels = kept.select("group_id", *keys)[place[place >= 0]]
    joined = values.filter(pl.Series(place >= 0)).select("layer", value).hstack(labels).drop_nulls(value)
    units = joined.group_by(*keys, "layer", "group_id").agg(pl.col(value).mean(), n_tokens=pl.len())
    rows = []
    for key, part in units.sort("group_id").group_by(*keys, "layer", maintain_order=True):
        low, high = t_interval(part[value].to_numpy())
        rows.append((*key, float(part[value].mean()), float(low), float(high), len(part), int(part["n_tokens"].sum())))  # type: ignore[arg-type]
    names = {name: units.schema[name] for name in (*keys, "layer")}
    numbers = {"mean": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n_groups": pl.Int64, "n_tokens": pl.Int64}
    return pl.DataFrame(rows, schema={**names, **numbers}, orient="row").sort(*keys, "layer")
