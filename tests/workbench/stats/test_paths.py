from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.paths import paths


def test_paths_by_hand() -> None:
    rows = [(0, 1), (0, 1), (0, 2), (3, 2)]
    tokens = pl.DataFrame({"doc_id": ["a", "b", "b", "b"], "pos": [0, 0, 1, 2], "segment": "user"})
    routing = pl.concat(
        [
            tokens.select("doc_id", "pos", layer=pl.lit(layer), expert_ids=pl.Series([[row[layer], 9] for row in rows]))
            for layer in (0, 1)
        ]
    )
    table, about = paths(tokens, routing, unit="doc_id")
    assert table.row(0, named=True) == {
        "path": "0-1", "n_tokens": 2, "share": 0.5, "n_docs": 2, "expected_share": pytest.approx(0.5),
        "log2_lift": pytest.approx(0), "share_low": None, "share_high": None, "log2_lift_low": None,
        "log2_lift_high": None,  # two documents
    }  # fmt: skip
    assert about["path_entropy"].item() == pytest.approx(1.5)
    assert about["markov_entropy"].item() == pytest.approx(1.5)  # two layers are a Markov chain always


def walk(memory: float, n_groups: int = 20, n_tokens: int = 40, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Three layers of four experts: the second says nothing of the first, the third repeats the first with `memory`."""
    rng = np.random.default_rng(seed)
    n = n_groups * n_tokens
    first, second, other = rng.integers(0, 4, (3, n))
    third = np.where(rng.random(n) < memory, first, other)
    group = np.repeat(np.arange(n_groups), n_tokens).astype(str)
    tokens = pl.DataFrame(
        {"doc_id": group, "group_id": group, "pos": np.tile(np.arange(n_tokens), n_groups), "segment": "user"}
    )
    layers = [
        tokens.select("doc_id", "pos", layer=pl.lit(layer), expert_ids=pl.Series(ids[:, None].tolist()))
        for layer, ids in enumerate((first, second, third))
    ]
    return tokens, pl.concat(layers)


def test_a_path_that_remembers_has_less_entropy_than_the_chain_and_one_that_forgets_has_not() -> None:
    remembers = paths(*walk(0.5))[1].row(0, named=True)
    assert remembers["path_entropy_high"] < remembers["null_low"]
    assert remembers["p"] == pytest.approx(1 / 100)
    forgets = [paths(*walk(0.0, seed=seed), n_draws=39)[1].row(0, named=True) for seed in range(20)]
    assert sum(row["p"] <= 0.05 for row in forgets) <= 4
    assert np.mean([row["path_entropy"] - row["null_entropy"] for row in forgets]) == pytest.approx(0, abs=0.01)
    assert forgets[0]["path_entropy"] < forgets[0]["markov_entropy"]  # plug-in: the null has to be as much too low


def test_intervals_of_the_path_entropy_hold_that_of_other_text_of_the_same_length() -> None:
    found = [paths(*walk(0.5, seed=seed), n_draws=1)[1].row(0, named=True) for seed in range(20)]
    true = np.mean([row["path_entropy"] for row in found])
    assert sum(row["path_entropy_low"] <= true <= row["path_entropy_high"] for row in found) >= 17
