"""Routing at the turns of an answer: where the final channel begins, where a thought changes direction."""

from __future__ import annotations

import polars as pl

from workbench.io.runs import Run
from workbench.stats.dynamics import token_motion
from workbench.stats.events import channel_changes, event_average, sentence_starts, thought_switches
from workbench.stats.load import CONTENT_SEGMENTS

Frames = dict[str, pl.DataFrame]
REACH = 8  # tokens on each side of an event, fewer where most answers are shorter
MOST = 0.8  # of the groups with a turn and a control in one document must hold every place
VALUES = ("router_entropy", "turnover")


def event_frames(run: Run, tokens: pl.DataFrame) -> Frames:
    """events (every layer) and events_mean (layer 0: the mean over layers); none without a document that has both an
    event and a control.

    Rows of `stats.event_average` for each of VALUES (column value) and each turn (column turn): "final begins" (from
    its first token on: headers come before it) and "thought switch", both against the other sentence starts of the
    thinking of the same document.
    """
    turns = turns_of(tokens)
    if not turns:
        return {}
    content = tokens.filter(pl.col("segment").is_in(CONTENT_SEGMENTS)).select("doc_id", "pos")
    values = routing_values(run, tokens).join(content, on=["doc_id", "pos"], how="semi")
    found: dict[str, list[pl.DataFrame]] = {"events": [], "events_mean": []}
    for turn, (events, controls) in turns.items():
        part = _without_before(values, events) if turn == "final begins" else values
        for value in VALUES:
            known = part.select("doc_id", "pos", "layer", value).drop_nulls()
            mean = known.group_by("doc_id", "pos", maintain_order=True).agg(pl.col(value).mean(), layer=pl.lit(0))
            reach = fitting_reach(mean, tokens, events, controls, value)
            for name, frame in (("events", known), ("events_mean", mean)):
                average = event_average(frame, tokens, events, controls, value, reach, seed=run.seed)
                found[name].append(average.select(pl.lit(turn).alias("turn"), pl.lit(value).alias("value"), pl.all()))
    frames = {name: pl.concat(parts) for name, parts in found.items()}
    return {} if frames["events"].is_empty() else frames


def fitting_reach(
    values: pl.DataFrame, tokens: pl.DataFrame, events: pl.DataFrame, controls: pl.DataFrame, value: str
) -> int:
    """The largest reach up to REACH at which MOST of the groups with both in one document hold every place."""
    sizes = {}
    for reach in range(REACH + 1):
        average = event_average(values, tokens, events, controls, value, reach, n_resamples=1)
        sizes[reach] = 0 if average.is_empty() else average["n_groups"][0]
    return max(reach for reach, n in sizes.items() if n >= MOST * sizes[0])


def turns_of(tokens: pl.DataFrame) -> dict[str, tuple[pl.DataFrame, pl.DataFrame]]:
    """(events, controls) of every turn that occurs in the tokens and has something to be compared with."""
    switches, others = thought_switches(tokens)
    finals = channel_changes(tokens, ["final"])
    pairs = {"final begins": (finals, sentence_starts(tokens)), "thought switch": (switches, others)}
    return {turn: pair for turn, pair in pairs.items() if not any(part.is_empty() for part in pair)}


def routing_values(run: Run, tokens: pl.DataFrame) -> pl.DataFrame:
    """doc_id, pos, layer and VALUES of every token."""
    entropy = run.routing.select("doc_id", "pos", "layer", "router_entropy").collect()
    motion = token_motion(tokens, run.routing, run.n_experts, window=None)
    same = entropy.with_columns(pl.col("layer").cast(pl.Int64), pl.col("router_entropy").cast(pl.Float64))
    return motion.join(same, on=["doc_id", "pos", "layer"])


def _without_before(values: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Without the REACH positions before each event."""
    offsets = pl.DataFrame({"offset": range(1, REACH + 1)})
    place = (pl.col("pos") - pl.col("offset")).cast(values.schema["pos"])
    before = events.join(offsets, how="cross").select("doc_id", place)
    return values.join(before, on=["doc_id", "pos"], how="anti")
