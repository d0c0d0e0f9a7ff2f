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
    assert about.select("n_distinct", "n_tokens", "max_entropy").row(0) == (4, 4, 2.0)
    assert about["path_entropy"].item() == pytest.approx(1.5)
    assert about["markov_entropy"].item() == pytest.approx(1.5)  # two layers are a Markov chain always


def chain(
    memory: float, n_experts: int = 8, n_groups: int = 20, n_tokens: int = 40, times: int = 1, seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A Markov chain of three uneven layers whose last repeats the first with `memory`; every path comes `times` times
    in its document."""
    rng, fixed, n = np.random.default_rng(seed), np.random.default_rng(7), n_groups * n_tokens
    steps = fixed.dirichlet(np.full(n_experts, 2.0), (2, n_experts)).cumsum(-1)  # [step expert expert]
    first = rng.choice(n_experts, n, p=fixed.dirichlet(np.full(n_experts, 2.0)))
    second = (rng.random((n, 1)) > steps[0, first, :-1]).sum(1)
    third = np.where(rng.random(n) < memory, first, (rng.random((n, 1)) > steps[1, second, :-1]).sum(1))
    group = np.repeat(np.arange(n_groups), n_tokens * times).astype(str)
    pos = np.tile(np.arange(n_tokens * times), n_groups)
    tokens = pl.DataFrame({"doc_id": group, "group_id": group, "pos": pos, "segment": "user"})
    layers = [
        tokens.select("doc_id", "pos", layer=pl.lit(layer), expert_ids=pl.Series(ids.repeat(times)[:, None].tolist()))
        for layer, ids in enumerate((first, second, third))
    ]
    return tokens, pl.concat(layers)


def about(*frames: pl.DataFrame, n_draws: int = 39) -> dict:
    return paths(*frames, n=1, n_draws=n_draws)[1].row(0, named=True)


def test_a_path_that_remembers_has_less_entropy_than_the_chain_and_one_that_forgets_has_not() -> None:
    remembers = about(*chain(0.5), n_draws=99)
    assert remembers["path_entropy"] < remembers["null_low"]
    assert remembers["p"] == pytest.approx(1 / 100)
    assert remembers["excess"] == pytest.approx(remembers["null_entropy"] - remembers["path_entropy"])
    forgets = [about(*chain(0.0, n_experts=16, seed=seed)) for seed in range(20)]
    assert sum(row["p"] <= 0.05 for row in forgets) <= 3
    assert np.mean([row["excess"] for row in forgets]) == pytest.approx(0, abs=0.02)
    assert forgets[0]["path_entropy"] < forgets[0]["markov_entropy"] - 0.2  # plug-in: the null is as much too low


def test_documents_that_repeat_their_paths_are_no_structure() -> None:
    forgets = [about(*chain(0.0, times=2, seed=seed)) for seed in range(20)]
    assert sum(row["p"] <= 0.05 for row in forgets) <= 1
    assert all(row["n_distinct"] <= row["n_tokens"] / 2 == 800 for row in forgets)
    remembers = [about(*chain(0.3, times=2, seed=seed)) for seed in range(20)]
    assert sum(row["p"] <= 0.05 for row in remembers) >= 19
    assert min(row["excess"] for row in remembers) > max(row["excess"] for row in forgets)


def test_repeats_change_no_entropy_and_no_exchange() -> None:
    once, twice = (about(*chain(0.3, times=times)) for times in (1, 2))
    assert (once.pop("n_tokens"), twice.pop("n_tokens")) == (800, 1600)
    assert once == twice


def test_a_plug_in_entropy_comes_without_an_interval() -> None:
    """That of a text of this length is always below that of a longer one: leaving out groups cannot show it."""
    short, long = about(*chain(0.0)), about(*chain(0.0, n_groups=400))
    assert short["path_entropy"] < long["path_entropy"] - 0.1
    assert not {name for name in short if name.startswith(("path_entropy_", "markov_entropy_"))}
