from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.errors import FrameError
from workbench.stats.information import decompose_routing, mutual_information


def made(
    rule, n_docs: int = 40, n_tokens: int = 50, n_words: int = 8, seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """k = 1, one layer; `rule(lang [doc], word [doc token], rng)` gives the expert of every token."""
    rng = np.random.default_rng(seed)
    lang = np.arange(n_docs) % 2
    word = rng.integers(0, n_words, (n_docs, n_tokens))
    expert = rule(lang[:, None] + 0 * word, word, rng)
    tokens = pl.DataFrame(
        {
            "doc_id": np.repeat([f"d{doc:03}" for doc in range(n_docs)], n_tokens),
            "group_id": np.repeat([f"g{doc // 2:03}" for doc in range(n_docs)], n_tokens),
            "pos": np.tile(np.arange(n_tokens), n_docs),
            "lang": np.repeat(np.where(lang, "ja", "en"), n_tokens),
            "token_id": word.ravel(),
            "segment": "user",
        }
    )
    routing = tokens.select("doc_id", "pos", layer=pl.lit(3), expert_ids=pl.Series(expert.ravel()[:, None].tolist()))
    return tokens, routing


def row(frame: pl.DataFrame, factor: str) -> dict:
    return frame.row(by_predicate=pl.col("factor") == factor, named=True)


def test_language_alone_is_one_bit() -> None:
    found = row(mutual_information(*made(lambda lang, word, rng: lang), "lang"), "lang")
    assert found["bits"] == pytest.approx(1)
    assert found["excess"] == pytest.approx(1, abs=0.1)  # shuffled labels of 40 documents agree a little by chance
    assert found["entropy"] == pytest.approx(1)
    assert (found["n_units"], found["n_tokens"], found["n_labels"], found["layer"]) == (20, 2000, 2, 3)
    assert found["p"] == pytest.approx(1 / 21)


def test_the_chain_gives_each_factor_its_own_bits() -> None:
    """Expert = 2 * word + lang: three bits of the word, one of the language, nothing left."""
    frame = decompose_routing(*made(lambda lang, word, rng: 2 * word + lang), ("token_id", "lang"))
    assert row(frame, "token_id")["excess"] == pytest.approx(3, abs=0.05)
    assert row(frame, "lang")["excess"] == pytest.approx(1, abs=0.1)
    assert row(frame, "residual")["bits"] == pytest.approx(0, abs=0.15)
    found = row(frame, "lang")
    assert found["low"] <= found["excess"] <= found["high"]


def test_chance_is_subtracted_when_labels_are_many() -> None:
    """Independent of everything, yet the plug-in estimate over 400 words is far above 0."""
    frame = decompose_routing(
        *made(lambda lang, word, rng: rng.integers(0, 16, word.shape), n_words=400), ("token_id", "lang")
    )
    word, lang = row(frame, "token_id"), row(frame, "lang")
    assert word["bits"] > 1
    assert abs(word["excess"]) < 0.06
    assert abs(lang["excess"]) < 0.06
    assert word["p"] > 0.04
    assert word["low"] < 0 < word["high"]


def test_a_language_that_the_words_give_away_adds_nothing_and_takes_nothing() -> None:
    """Most words belong to one language: a shuffle that gave them both would see bias where there is none."""
    tokens, routing = made(lambda lang, word, rng: rng.integers(0, 16, word.shape), n_words=60)
    own = 100 * (tokens["lang"] == "ja").cast(pl.Int64) * (tokens["token_id"] > 5).cast(pl.Int64)
    frame = decompose_routing(tokens.with_columns(token_id=pl.col("token_id") + own), routing, ("token_id", "lang"))
    lang = row(frame, "lang")
    assert abs(lang["excess"]) < 0.005
    assert lang["low"] < 0 < lang["high"]


def test_imbalance_is_no_specialisation() -> None:
    """The naive-upcycling null: one expert takes nearly everything, whatever the word."""
    frame = mutual_information(*made(lambda lang, word, rng: (rng.random(word.shape) < 0.02).astype(int)), "token_id")
    assert abs(row(frame, "token_id")["excess"]) < 0.004


def test_a_token_without_routing_is_an_error_and_no_number() -> None:
    tokens, routing = made(lambda lang, word, rng: lang, n_docs=4)
    with pytest.raises(FrameError, match="expected one row per token and layer, 200 x 1, got 199"):
        mutual_information(tokens, routing.head(199), "lang")


@pytest.mark.slow
def test_null_excess_is_covered_by_its_interval() -> None:
    covered = []
    for seed in range(60):

        def rule(lang: np.ndarray, word: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            taste = rng.dirichlet(np.ones(6), len(lang))
            return np.stack([rng.choice(6, word.shape[1], p=p) for p in taste])

        found = row(mutual_information(*made(rule, seed=seed), "lang"), "lang")
        covered.append(found["low"] <= 0 <= found["high"])
    assert np.mean(covered) >= 0.85
