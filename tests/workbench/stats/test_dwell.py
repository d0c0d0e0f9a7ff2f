"""Leaving an expert: by hand, on routing without memory, and on routing with it."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.dwell import SCHEMA, leaving_hazard


def frames(docs: list[list[int]], gaps: bool = False) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One layer, one expert per token; with gaps, position 2 of every document is missing."""
    rows = [
        (f"d{doc}", pos + (gaps and pos >= 2), [expert])
        for doc, experts in enumerate(docs)
        for pos, expert in enumerate(experts)
    ]
    routing = pl.DataFrame(rows, schema=["doc_id", "pos", "expert_ids"], orient="row").with_columns(layer=pl.lit(4))
    tokens = routing.select("doc_id", "pos", group_id="doc_id", segment=pl.lit("user"), segment_index=pl.lit(0))
    return tokens, routing


def test_by_hand() -> None:
    found = leaving_hazard(*frames([[0, 0, 0, 1, 1, 2]]), n_experts=3, max_age=3)
    assert found["age"].to_list() == [1, 2, 3]
    assert found["n_at_risk"].to_list() == [2, 2, 1]  # the run of 2 ends the text and is not at risk
    assert found["hazard"].to_list() == pytest.approx([0, 0.5, 1])
    assert found["null"].to_list() == pytest.approx([(1 / 2 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, 1 / 2])
    assert found["low"].null_count() == 3  # one group
    cut = leaving_hazard(*frames([[0, 0, 0, 1, 1, 2]], gaps=True), n_experts=3, max_age=3)
    assert cut["n_at_risk"].to_list() == [3, 1, 0]  # 0 0 | 0 1 1 2: the gap starts the run anew
    assert cut["hazard"].to_list() == [pytest.approx(1 / 3), 1, None]


def walk(rng: np.random.Generator, stay: float, n: int = 60) -> list[int]:
    """Uneven experts; with `stay` the last one is kept whatever its load."""
    drawn = rng.choice(4, size=n, p=[0.55, 0.25, 0.15, 0.05])
    for place in range(1, n):
        if rng.random() < stay:
            drawn[place] = drawn[place - 1]
    return drawn.tolist()


def test_without_memory_load_alone_explains_a_falling_hazard() -> None:
    rng, held, hazards = np.random.default_rng(0), [], []
    for _ in range(40):
        found = leaving_hazard(*frames([walk(rng, 0.0) for _ in range(24)]), n_experts=4, max_age=4)
        hazards.append(found["hazard"].to_numpy())
        held += ((found["excess_low"] <= 0) & (found["excess_high"] >= 0)).to_list()
    assert (np.diff(np.mean(hazards, axis=0)) < -0.02).all()  # busier experts are left last
    assert 0.9 <= np.mean(held) <= 0.985  # 160 intervals, of which 95% are to hold 0


def test_memory_is_found_at_every_age() -> None:
    rng = np.random.default_rng(0)
    found = leaving_hazard(*frames([walk(rng, 0.3) for _ in range(60)]), n_experts=4, max_age=4)
    assert found["excess_low"].min() > 0.05
    assert found["n_groups"].unique().to_list() == [60]


def test_nothing_gives_no_rows_and_too_few_experts_are_refused() -> None:
    tokens, routing = frames([[0, 1, 2]])
    assert leaving_hazard(tokens.clear(), routing.clear(), 3).schema == pl.Schema(SCHEMA)
    with pytest.raises(FrameError):
        leaving_hazard(tokens, routing, 2)
