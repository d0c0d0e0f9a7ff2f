"""Routing at the turns of an answer: on a made-up run whose router hesitates where the final channel begins."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import polars as pl

from workbench.plots.dynamics import event_curves
from workbench.study.moments import REACH, event_frames, turns_of
from workbench.study.remarks import _turns

ANALYSIS = [" a", " b", "."] * 8 + [" wait"] + [" c"] * 11 + ["."] + [" d"] * 11
N_FINAL = 12
LAYERS, N_EXPERTS = (1, 3), 8


def conversation(doc: int) -> pl.DataFrame:
    parts = [("user", ["q"] * 4), ("analysis", ANALYSIS), ("control", ["<h>"] * 3), ("final", ["f"] * N_FINAL)]
    rows = [
        (f"d{doc}", f"g{doc}", segment, index, place, piece)
        for index, (segment, pieces) in enumerate(parts)
        for place, piece in enumerate(pieces)
    ]
    names = ["doc_id", "group_id", "segment", "segment_index", "pos_in_segment", "token"]
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(pos=pl.int_range(pl.len(), dtype=pl.Int32))


def made_up(bump: float, n_docs: int = 20) -> tuple[SimpleNamespace, pl.DataFrame]:
    """(run, tokens): entropy is noise, `bump` higher on the first token of the final channel; experts are random."""
    rng = np.random.default_rng(0)
    tokens = pl.concat([conversation(doc) for doc in range(n_docs)])
    first = ((tokens["segment"] == "final") & (tokens["pos_in_segment"] == 0)).to_numpy()
    frames = []
    for layer in LAYERS:
        ids = np.argsort(rng.random((len(tokens), N_EXPERTS)), axis=1)[:, :2]
        frames.append(
            tokens.select("doc_id", "pos").with_columns(
                layer=pl.lit(layer, dtype=pl.Int16),
                expert_ids=pl.Series(ids.tolist(), dtype=pl.List(pl.Int16)),
                router_entropy=pl.Series(rng.normal(size=len(tokens)) + bump * first, dtype=pl.Float32),
            )
        )
    return SimpleNamespace(routing=pl.concat(frames).lazy(), n_experts=N_EXPERTS, seed=0), tokens


def test_what_happens_at_a_turn_is_found_there_and_nowhere_else() -> None:
    run, tokens = made_up(6.0)
    frames = event_frames(run, tokens)  # type: ignore[arg-type]
    sure = frames["events"].filter(pl.col("p_adjusted") <= 0.05)
    assert set(sure.select("turn", "value", "layer", "offset").rows()) == {
        ("final begins", "router_entropy", layer, 0) for layer in LAYERS
    }
    mean = frames["events_mean"].filter(turn="final begins", value="router_entropy", offset=0).row(0, named=True)
    assert mean["low"] < 6 < mean["high"]
    both = frames["events"].filter(turn="final begins", value="router_entropy", offset=0)
    assert np.isclose(both["difference"].to_numpy().mean(), mean["difference"])
    text = _turns(frames)
    assert "Final begins, router entropy in nats: 1 of" in text
    assert "most token +0 by +" in text
    assert "Thought switch, router entropy in nats: no significant difference (20 places" in text


def test_headers_between_messages_are_no_part_of_it() -> None:
    run, tokens = made_up(0.0)
    frame = event_frames(run, tokens)["events"]  # type: ignore[arg-type]
    final = frame.filter(turn="final begins", value="router_entropy", layer=1)
    assert final["offset"].to_list() == [*range(REACH + 1)]
    assert frame.filter(turn="thought switch", value="router_entropy", layer=1)["offset"].len() == 2 * REACH + 1


def test_where_answers_are_short_fewer_places_are_looked_at() -> None:
    run, tokens = made_up(6.0)
    short = tokens.filter((pl.col("segment") != "final") | (pl.col("pos_in_segment") < 5))
    frame = event_frames(run, short)["events"]  # type: ignore[arg-type]
    final = frame.filter(turn="final begins", value="router_entropy", layer=1)
    assert final["offset"].to_list() == [*range(5)]
    assert final["n_groups"].unique().to_list() == [20]
    turnover = frame.filter(turn="final begins", value="turnover", layer=1)
    assert turnover["offset"].to_list() == [*range(4)]  # the last token has no next one


def test_a_run_without_turns_or_without_controls_has_no_such_frames() -> None:
    run, tokens = made_up(0.0)
    assert set(turns_of(tokens)) == {"final begins", "thought switch"}
    calm = tokens.with_columns(token=pl.col("token").replace(" wait", " so"))
    assert set(turns_of(calm)) == {"final begins"}
    first = pl.col("group_id").str.ends_with("1")
    lone = first & (pl.col("token") == ".") & (pl.col("token").shift(-1) != " wait")  # there the switch stands alone
    calm = ~first & (pl.col("token") == " wait")  # and here there is none
    never_both = pl.when(lone).then(pl.lit(",")).when(calm).then(pl.lit(" so")).otherwise("token")
    apart = event_frames(run, tokens.with_columns(token=never_both))["events"]  # type: ignore[arg-type]
    assert set(apart["turn"]) == {"final begins"}
    one_sentence = tokens.with_columns(token=pl.col("token").replace(".", ","))
    assert event_frames(run, one_sentence) == {}  # type: ignore[arg-type]
    assert _turns({}) == ""


def test_the_figure_marks_what_is_certain() -> None:
    run, tokens = made_up(6.0)
    part = event_frames(run, tokens)["events_mean"].filter(value="router_entropy")  # type: ignore[arg-type]
    curves = {trace.name: trace for trace in event_curves(part, "nats").data if trace.name}
    assert set(curves) == {"final begins", "thought switch"}
    final = curves["final begins"]
    filled = [x for x, symbol in zip(final.x, final.marker.symbol, strict=True) if not symbol.endswith("-open")]
    assert filled == [0]
