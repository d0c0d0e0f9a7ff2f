"""Synthetic routing frames with known answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

TokensAndRouting = tuple[pl.DataFrame, pl.DataFrame]
Shards = list[tuple[pl.DataFrame, list[int], np.ndarray]]


def draw_frames(
    n_groups: int,
    n_tokens: int,
    n_layers: int,
    n_experts: int,
    k: int,
    seed: int,
    shift: float = 0.0,
    spread: float = 0.5,
) -> TokensAndRouting:
    """Documents in both languages whose experts are the top k of document taste + token noise.

    `spread` is how much documents differ from each other (shared by the languages of a group: content, and drawn anew
    per document: chance). In layer 0 alone, Japanese documents have `shift` added to the score of expert 0.
    """
    rng = np.random.default_rng(seed)
    tokens, scores = [], []
    for group in range(n_groups):
        content = rng.normal(0, spread, (n_layers, n_experts))
        for lang in ("ja", "en"):
            score = content + rng.normal(0, spread, content.shape) + rng.normal(size=(n_tokens, n_layers, n_experts))
            if lang == "ja":
                score[:, 0, 0] += shift
            doc = f"{group:04}-{lang}"
            tokens += [(doc, f"{group:04}", lang, "low", pos, "user", "prefill") for pos in range(n_tokens)]
            scores.append(score)
    names = ["doc_id", "group_id", "lang", "effort", "pos", "segment", "phase"]
    return route(pl.DataFrame(tokens, schema=names, orient="row"), np.concatenate(scores), k)[:2]


def route(tokens: pl.DataFrame, scores: np.ndarray, k: int) -> tuple[pl.DataFrame, pl.DataFrame, Shards]:
    """(tokens, routing, shards) when each token takes the k highest of its logits `scores` [token layer expert]."""
    n_tokens, n_layers, _ = scores.shape
    order = np.argsort(-scores, axis=-1, kind="stable")
    ids = order[..., :k]
    top = np.take_along_axis(scores, order, -1)
    lse = np.log(np.exp(scores).sum(-1))
    chosen = np.exp(top[..., :k])
    routing = pl.DataFrame(
        {
            "doc_id": np.repeat(tokens["doc_id"].to_numpy().astype(object), n_layers).tolist(),
            "pos": np.repeat(tokens["pos"].to_numpy(), n_layers),
            "layer": np.tile(np.arange(n_layers), n_tokens),
            "expert_ids": ids.reshape(-1, k).tolist(),
            "routing_weights": (chosen / chosen.sum(-1, keepdims=True)).reshape(-1, k).tolist(),
            "router_margin": (top[..., k - 1] - top[..., k]).ravel(),
            "router_mass": (chosen.sum(-1) / np.exp(lse)).ravel(),
            "router_lse": lse.ravel(),
        }
    )
    return tokens, routing, [(tokens, list(range(n_layers)), scores)]


def draw_words(
    n_groups: int = 30,
    n_tokens: int = 60,
    n_experts: int = 16,
    k: int = 2,
    seed: int = 0,
    context: float = 0.0,
    word: float = 0.0,
    fertility: float = 1.0,
) -> tuple[pl.DataFrame, pl.DataFrame, Shards]:
    """Japanese words (ids 0-9), English words (10-19) and words of both (20-24), one layer.

    Expert 0 gets `context` more in Japanese documents whatever the word. Expert 1 gets `word` more at word 3, which is
    Japanese and frequent: vocabulary, no language. Experts 2 to 6 follow the topic of the group.
    """
    rng = np.random.default_rng(seed)
    rows, scores = [], []
    for group in range(n_groups):
        topic = group % 5
        for lang in ("ja", "en"):
            n = round(n_tokens * fertility) if lang == "ja" else n_tokens
            own = rng.choice(10, n, p=np.r_[[0.05] * 3, 0.55, [0.05] * 6]) + 10 * (lang == "en")
            ids = np.where(rng.random(n) < 0.3, rng.integers(20, 25, n), own)
            score = rng.normal(size=(n, 1, n_experts)) + rng.normal(0, 0.3, (1, 1, n_experts))
            score[:, 0, 0] += context * (lang == "ja")
            score[:, 0, 1] += word * (ids == 3)
            score[:, 0, 2 + topic] += 1.0
            rows += [(f"{group:04}-{lang}", f"{group:04}", f"t{topic}", lang, pos, int(x)) for pos, x in enumerate(ids)]
            scores.append(score)
    names = ["doc_id", "group_id", "topic", "lang", "pos", "token_id"]
    tokens = pl.DataFrame(rows, schema=names, orient="row").with_columns(segment=pl.lit("user"))
    return route(tokens, np.concatenate(scores), k)


@pytest.fixture
def draw() -> Callable[..., TokensAndRouting]:
    return draw_frames


@pytest.fixture
def words() -> Callable[..., tuple[pl.DataFrame, pl.DataFrame, Shards]]:
    return draw_words


@pytest.fixture
def routed() -> Callable[..., tuple[pl.DataFrame, pl.DataFrame, Shards]]:
    return route


@pytest.fixture
def tiny() -> TokensAndRouting:
    """Two documents of one group, one layer, four experts, k = 2, small enough to count by hand."""
    tokens = pl.DataFrame(
        [
            ("a-ja", "a", "ja", "low", 0, "control", "prefill"),
            ("a-ja", "a", "ja", "low", 1, "user", "prefill"),
            ("a-ja", "a", "ja", "low", 2, "final", "decode"),
            ("a-en", "a", "en", "low", 0, "user", "prefill"),
        ],
        schema=["doc_id", "group_id", "lang", "effort", "pos", "segment", "phase"],
        orient="row",
    )
    routing = pl.DataFrame(
        [
            ("a-ja", 0, 0, [3, 2], 9.0),
            ("a-ja", 1, 0, [0, 1], 1.0),
            ("a-ja", 2, 0, [0, 2], 2.0),
            ("a-en", 0, 0, [1, 0], 4.0),
        ],
        schema=["doc_id", "pos", "layer", "expert_ids", "router_entropy"],
        orient="row",
    )
    return tokens, routing
