from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.events import channel_changes, event_average, sentence_starts, thought_switches, timeline


def conversation(pieces: list[str], doc: str = "a") -> pl.DataFrame:
    return pl.DataFrame({"token": pieces}).with_columns(
        doc_id=pl.lit(doc), group_id=pl.lit(doc), pos=pl.int_range(pl.len(), dtype=pl.Int32),
        segment=pl.lit("analysis"), segment_index=pl.lit(0), pos_in_segment=pl.int_range(pl.len(), dtype=pl.Int32),
    )  # fmt: skip


def test_channel_changes_are_the_first_tokens_of_channels() -> None:
    tokens = pl.DataFrame(
        {
            "doc_id": "a", "pos": range(5), "segment": ["user", "analysis", "analysis", "control", "final"],
            "pos_in_segment": [0, 0, 1, 0, 0],
        }
    )  # fmt: skip
    assert channel_changes(tokens).rows() == [("a", 1, "analysis"), ("a", 4, "final")]


def test_sentences_and_switches_in_both_languages() -> None:
    first = ["2", "+", "3", ".", "5", " is", " it", ".", " Wait", ",", " no", ".", " So", "。"]
    tokens = conversation([*first, "しか", "し", "違う", "。", "答え", "は", "5"])
    starts = sentence_starts(tokens)
    assert starts["pos"].to_list() == [8, 12, 14, 18]  # 3.5 is no end of a sentence
    events, others = thought_switches(tokens)
    assert events.select("pos", "event").rows() == [(8, "wait"), (14, "しかし")]
    assert others["pos"].to_list() == [12, 18]


def test_a_sentence_that_checks_is_a_switch_and_no_control() -> None:
    starts = ["確か", "確認", "見直", "答え"]
    tokens = conversation(["x", "。", "確か", "めよう", "。", "確認", "する", "。", "見直", "す", "。", "答え", "は"])
    assert len(sentence_starts(tokens)) == len(starts)
    events, others = thought_switches(tokens)
    assert events.select("pos", "event").rows() == [(2, "確かめ"), (5, "確認"), (8, "見直")]
    assert others["pos"].to_list() == [11]


def test_a_word_that_only_begins_alike_is_no_switch() -> None:
    events, others = thought_switches(conversation(["a", ".", " But", "ter", " is", ".", " But", " no"]))
    assert events["pos"].to_list() == [6]
    assert others["pos"].to_list() == [2]


def planted(
    bump: float, seed: int = 0, n_docs: int = 24
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Noise with a document mean; `bump` more at the event and one token after it, not at the control."""
    rng = np.random.default_rng(seed)
    docs = [f"d{doc:02}" for doc in range(n_docs)]
    values = rng.normal(size=(n_docs, 100, 1)) + rng.normal(size=(n_docs, 1, 1))
    values[:, 40:42] += bump
    tokens = pl.DataFrame({"doc_id": np.repeat(docs, 100), "group_id": np.repeat(docs, 100)})
    frame = tokens.select("doc_id", pos=pl.Series(np.tile(np.arange(100, dtype=np.int32), n_docs)), layer=pl.lit(0),
                          x=pl.Series(values.ravel()))  # fmt: skip
    events, controls = (pl.DataFrame({"doc_id": docs, "pos": [pos] * n_docs}) for pos in (40, 70))
    return frame, tokens, events, controls


def test_an_effect_of_events_shows_at_its_offsets_only() -> None:
    found = event_average(*planted(2.0), "x", reach=8)
    assert found.filter(pl.col("p_adjusted") <= 0.05)["offset"].to_list() == [0, 1]
    at = found.filter(pl.col("offset") == 0).row(0, named=True)
    assert at["low"] < 2 < at["high"]
    assert at["difference"] == pytest.approx(at["event"] - at["control"])
    assert (at["n_groups"], at["n_events"], at["n_tests"]) == (24, 24, 17)


def test_nothing_shows_on_null_events() -> None:
    rejected = sum(
        bool((event_average(*planted(0.0, seed), "x", reach=8, n_resamples=400)["p_adjusted"] <= 0.05).any())
        for seed in range(30)
    )
    assert rejected <= 5


def test_groups_that_lack_part_of_the_window_are_left_out() -> None:
    values, tokens, events, controls = planted(0.0)
    late = pl.concat([events[:10], events[10:].with_columns(pos=pl.lit(98, dtype=pl.Int64))])
    found = event_average(values, tokens, late, controls, "x", reach=8)
    assert found["n_groups"].unique().to_list() == [10]
    none = event_average(values, tokens, events[:0], controls, "x")
    assert none.is_empty()
    assert none.schema == found.schema


def test_an_event_is_compared_with_its_own_document() -> None:
    """Each group has a document of events and controls, and another, of a higher level, of controls alone."""
    values, tokens, events, controls = planted(0.0)
    other = [
        frame.with_columns(doc_id=pl.col("doc_id") + "-high").with_columns(**changed)
        for frame, changed in ((values, {"x": pl.col("x") + 5}), (tokens, {}), (controls, {}))
    ]
    both = [pl.concat(pair) for pair in zip((values, tokens, controls), other, strict=True)]
    found = event_average(both[0], both[1], events, both[2], "x", reach=8)
    assert found.equals(event_average(values, tokens, events, controls, "x", reach=8))
    assert set(found["n_controls"]) == {24}
    assert not (found["p_adjusted"] <= 0.05).any()


def test_documents_of_a_group_weigh_equally() -> None:
    tokens = pl.DataFrame({"doc_id": ["a"] * 5 + ["b"] * 2, "group_id": "g"})
    values = tokens.select("doc_id", pos=pl.Series([0, 1, 2, 3, 4, 0, 1]), layer=pl.lit(0),
                           x=pl.Series([1.0, 2.0, 3.0, 0.0, 0.0, 9.0, 5.0]))  # fmt: skip
    events = pl.DataFrame({"doc_id": ["a", "a", "a", "b"], "pos": [0, 1, 2, 0]})
    controls = pl.DataFrame({"doc_id": ["a", "a", "b"], "pos": [3, 4, 1]})
    row = event_average(values, tokens, events, controls, "x", reach=0).row(0, named=True)
    assert (row["event"], row["control"], row["difference"]) == (5.5, 2.5, 3.0)  # of 2 and 9, of 0 and 5
    assert (row["n_events"], row["n_controls"], row["n_groups"]) == (4, 3, 1)


def test_the_same_events_stand_behind_every_offset() -> None:
    """A second event of every document, at its end, far higher and with half a window, would be a step at offset 2."""
    values, tokens, events, controls = planted(0.0)
    high = values.with_columns(x=pl.col("x") + 9 * (pl.col("pos") > 80))
    late = pl.concat([events, events.with_columns(pos=pl.lit(98, dtype=pl.Int64))])
    found = event_average(high, tokens, late, controls, "x", reach=8)
    assert found.equals(event_average(high, tokens, events, controls, "x", reach=8))
    assert set(found["n_events"]) == {24}
    other_way = event_average(high, tokens, controls, late, "x", reach=8)
    assert set(other_way["n_controls"]) == {24}
    assert other_way["difference"].abs().max() < 2


def test_the_timeline_stretches_answers_of_different_lengths() -> None:
    parts = [conversation(["x"] * n, doc=f"d{n}") for n in (20, 40, 5)]
    tokens = pl.concat(parts)
    values = tokens.select("doc_id", "pos", layer=pl.lit(3), x=pl.col("pos") / pl.len().over("doc_id"))
    found = timeline(values, tokens, "x", n_bins=4)
    assert found["bin"].to_list() == [0, 1, 2, 3]
    assert found["mean"].is_sorted()
    assert found["n_groups"].to_list() == [3] * 4
    assert timeline(values, tokens, "x", n_bins=10)["n_groups"].unique().to_list() == [2]
