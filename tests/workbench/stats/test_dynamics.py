from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.stats.dynamics import layer_consistency, local_consistency, persistence, shared_experts, token_motion


def text(
    routed, rule, n_docs: int = 20, n_tokens: int = 64, n_layers: int = 1, n_experts: int = 16, k: int = 2,
    seed: int = 0, hold: int = 1,
):  # fmt: skip
    """`rule(rng, words [doc token])` adds to the scores [doc token layer expert]."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 12, (n_docs, n_tokens))
    words = np.repeat(words[:, ::hold], hold, axis=1)[:, :n_tokens]
    tokens = pl.DataFrame(
        {
            "doc_id": np.repeat([f"d{doc:02}" for doc in range(n_docs)], n_tokens),
            "group_id": np.repeat([f"g{doc:02}" for doc in range(n_docs)], n_tokens),
            "pos": np.tile(np.arange(n_tokens), n_docs),
            "token_id": words.ravel(),
            "segment": "analysis",
        }
    )
    scores = rng.normal(size=(n_docs, n_tokens, n_layers, n_experts)) + rule(rng, words)
    return routed(tokens, scores.reshape(-1, n_layers, n_experts), k)[:2]


def test_shared_experts_by_hand() -> None:
    assert shared_experts(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]])).tolist() == [2, 1]


def test_independent_tokens_persist_as_their_load_says(routed) -> None:
    found = persistence(*text(routed, lambda rng, words: np.zeros(16)), 16).row(0, named=True)
    assert found["load_null"] == pytest.approx(2 / 16, abs=0.003)
    assert found["low"] < found["load_null"] < found["high"]
    assert (found["n_pairs"], found["n_groups"]) == (20 * 63, 20)
    uneven = persistence(*text(routed, lambda rng, words: np.r_[3.0, 3.0, [0.0] * 14]), 16).row(0, named=True)
    assert uneven["load_null"] > 0.4
    assert abs(uneven["overlap"] - uneven["load_null"]) < 0.03


def test_persisting_context_is_told_from_repeating_words(routed) -> None:
    def by_document(rng, words):
        return np.broadcast_to(rng.normal(0, 2, (len(words), 1, 1, 16)), (*words.shape, 1, 16))

    def by_word(rng, words):
        return rng.normal(0, 3, (12, 16))[words][:, :, None]

    context = persistence(*text(routed, by_document), 16).row(0, named=True)
    word = persistence(*text(routed, by_word, hold=4), 16).row(0, named=True)
    assert context["word_overlap"] > context["word_null"] + 0.2
    assert word["overlap"] > word["load_null"] + 0.05
    assert word["word_overlap"] == pytest.approx(word["word_null"], abs=0.02)
    assert word["n_word_pairs"] > 500
    assert context["word_gap_low"] > 0.2
    assert word["word_gap_low"] < 0 < word["word_gap_high"]
    assert context["word_gap"] == pytest.approx(context["word_overlap"] - context["word_null"], abs=0.02)


def test_the_same_words_are_sought_in_another_group(routed) -> None:
    """A prompt read again at another effort is no other text, and would give back its own experts."""

    def by_document(rng, words):
        return np.broadcast_to(rng.normal(0, 3, (len(words), 1, 1, 16)), (*words.shape, 1, 16))

    tokens, routing = text(routed, by_document)
    twice = pl.concat([tokens, tokens.with_columns(doc_id=pl.col("doc_id") + "-again")])
    copies = pl.concat([routing, routing.with_columns(doc_id=pl.col("doc_id") + "-again")])
    once, again = (persistence(*pair, 16).row(0, named=True) for pair in ((tokens, routing), (twice, copies)))
    assert again["word_null"] == pytest.approx(once["word_null"], abs=0.03)


def test_gaps_are_no_neighbours(routed) -> None:
    tokens, routing = text(routed, lambda rng, words: np.zeros(16), n_docs=2, n_tokens=10)
    found = persistence(tokens.filter(pl.col("pos") != 4), routing, 16)
    assert found["n_pairs"].item() == 2 * 7


def test_srp_by_hand_and_its_limits(routed) -> None:
    tokens = pl.DataFrame({"doc_id": ["a"] * 4, "group_id": "a", "pos": range(4), "segment": "analysis"})
    routing = tokens.select("doc_id", "pos", layer=pl.lit(0), expert_ids=pl.Series([[0], [0], [0], [1]]))
    # tau = 1: experts 0 and 1 loaded, 2 * 4 / (4 * 2 + 4) = 2/3; tau = 2 or 3: 2 * 3 / (4 + 4) = 3/4
    found = local_consistency(tokens, routing, 2, lengths=(4, 8)).row(0, named=True)
    assert (found["srp"], found["tau"], found["m"]) == (0.75, 2, 4)
    assert np.isnan(found["low"])
    constant = text(routed, lambda rng, words: np.r_[99.0, 99.0, [0.0] * 14])
    assert local_consistency(*constant, 16)["srp"].to_list() == pytest.approx([1.0] * 3)  # 256 is longer than any text


@pytest.mark.parametrize("headers", [3, 0])
def test_segments_of_m_tokens_jump_over_no_header(headers: int) -> None:
    """Six tokens of expert 0, then, with or without a header between, six of another message and of expert 1."""
    n = 12 + headers
    tokens = pl.DataFrame(
        {
            "doc_id": "a", "group_id": "a", "pos": range(n),
            "segment": ["user"] * 6 + ["control"] * headers + ["final"] * 6,
            "segment_index": [0] * 6 + [1] * headers + [2] * 6,
        }
    )  # fmt: skip
    expert = (pl.col("segment") == "final").cast(pl.Int64)
    routing = tokens.select("doc_id", "pos", layer=pl.lit(0), expert_ids=pl.concat_list(expert))
    found = local_consistency(tokens, routing, 2, lengths=(4, 8)).row(0, named=True)
    assert (found["m"], found["srp"], found["n_segments"]) == (4, 1.0, 2)
    assert local_consistency(tokens, routing, 2, lengths=(8,)).is_empty()
    if headers:
        gap = local_consistency(tokens.drop("segment_index"), routing, 2, lengths=(4,)).row(0, named=True)
        assert (gap["srp"], gap["n_segments"]) == (1.0, 2)


def test_documents_with_a_taste_are_more_consistent_than_their_load(routed) -> None:
    def taste(rng, words):
        return np.broadcast_to(rng.normal(0, 2, (len(words), 1, 1, 16)), (*words.shape, 1, 16))

    found = local_consistency(*text(routed, taste), 16, lengths=(16,)).row(0, named=True)
    assert found["low"] > found["null"] + 0.1
    assert found["low"] < found["srp"] < found["high"]
    flat = local_consistency(*text(routed, lambda rng, words: np.zeros(16)), 16, lengths=(16,)).row(0, named=True)
    assert flat["srp"] == pytest.approx(flat["null"], abs=0.02)


def test_layers_that_sort_tokens_alike_agree_whatever_the_numbers(routed) -> None:
    permutation = np.random.default_rng(9).permutation(16)

    def alike(rng, words):
        vector = rng.normal(0, 3, (*words.shape, 1, 16))
        other = rng.normal(0, 3, (*words.shape, 1, 16))
        return np.concatenate([vector, vector[..., permutation], other], axis=2)

    found = layer_consistency(*text(routed, alike, n_layers=3), n_pairs=8000)
    rows = {(row["layer"], row["other"]): row for row in found.rows(named=True)}
    assert rows[0, 1]["low"] > 0.3
    assert rows[0, 2]["low"] < 0 < rows[0, 2]["high"]


def test_motion_peaks_where_routing_changes(routed) -> None:
    def switch(rng, words):
        push = np.zeros((*words.shape, 1, 16))
        push[:, :32, :, :2], push[:, 32:, :, 2:4] = 9, 9
        return push

    motion = token_motion(*text(routed, switch, n_docs=3), n_experts=16, window=8)
    alone = token_motion(*text(routed, switch, n_docs=3), n_experts=16, window=None)
    assert alone.equals(motion.drop("velocity"), null_equal=True)
    mean = motion.group_by("pos").agg(pl.col("turnover", "velocity").mean()).sort("pos")
    assert mean["velocity"].arg_max() == 32
    assert mean["velocity"][32] > 0.95
    assert mean["turnover"].arg_max() == 31
    assert mean["turnover"][63] is None
    assert mean.filter(pl.col("velocity").is_not_null())["pos"].to_list() == list(range(8, 57))
