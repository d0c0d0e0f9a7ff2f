"""Routing at the turns of an answer: where the final channel begins, where a thought changes direction."""

from __future__ import annotations

import polars as pl

from workbench.io.runs import Run
from workbench.stats.dynamics import token_motion
from workbench.stats.events import channel_changes, event_average, sentence_starts, thought_switches
from workbench.stats.load import CONTENT_SEGMENTS

Frames = dict[str, pl.DataFrame]
REACH = 8  # tokens on each side of an event
VALUES = ("router_entropy", "turnover")


def event_frames(run: Run, tokens: pl.DataFrame) -> Frames:
    """events (every layer) and events_mean (layer 0: the mean over layers); none without a group that has both an event
    and a control.

    Rows of `stats.event_average` for each of VALUES (column value) and each turn (column turn): "final begins" and
    "thought switch", both against the other sentence starts of the thinking of the same groups.
    """
    turns = turns_of(tokens)
    if not turns:
        return {}
    content = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS)).select("doc_id", "pos")
    values = routing_values(run, tokens).join(content, on=["doc_id", "pos"], how="semi")
    mean = values.group_by("doc_id", "pos", maintain_order=True).agg(pl.col(VALUES).mean(), layer=pl.lit(0))
    frames = {}
    for name, part in (("events", values), ("events_mean", mean)):
        found = [
            _labelled(event_average(part.drop_nulls(value), tokens, *pair, value, REACH, seed=run.seed), turn, value)
            for turn, pair in turns.items()
            for value in VALUES
        ]
        kept = [frame for frame in found if not frame.is_empty()]
        if kept:
            frames[name] = pl.concat(kept)
    return frames


def turns_of(tokens: pl.DataFrame) -> dict[str, tuple[pl.DataFrame, pl.DataFrame]]:
    """(events, controls) of every turn that occurs in the tokens and has something to be compared with."""
    switches, others = thought_switches(tokens)
    finals = channel_changes(tokens, ["final"])
    pairs = {"final begins": (finals, sentence_starts(tokens)), "thought switch": (switches, others)}
    return {turn: pair for turn, pair in pairs.items() if not any(part.is_empty() for part in pair)}


def routing_values(run: Run, tokens: pl.DataFrame) -> pl.DataFrame:
    """doc_id, pos, layer and VALUES of every token."""
    entropy = run.routing.select("doc_id", "pos", "layer", "router_entropy").collect()
    motion = token_motion(tokens, run.routing, run.n_experts).select("doc_id", "pos", "layer", "turnover")
    return motion.join(entropy.with_columns(pl.col("layer").cast(pl.Int64)), on=["doc_id", "pos", "layer"])


def _labelled(frame: pl.DataFrame, turn: str, value: str) -> pl.DataFrame:
    return frame.filter(pl.col("difference").is_not_null()).select(
        pl.lit(turn).alias("turn"), pl.lit(value).alias("value"), pl.all()
    )
