"""Synthetic routing frames with known answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

TokensAndRouting = tuple[pl.DataFrame, pl.DataFrame]


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
    tokens, routing = [], []
    for group in range(n_groups):
        content = rng.normal(0, spread, (n_layers, n_experts))
        for lang in ("ja", "en"):
            score = content + rng.normal(0, spread, content.shape) + rng.normal(size=(n_tokens, n_layers, n_experts))
            if lang == "ja":
                score[:, 0, 0] += shift
            ids = np.argsort(-score, axis=-1)[..., :k]
            doc = f"{group:04}-{lang}"
            tokens += [(doc, f"{group:04}", lang, "low", pos, "user", "prefill") for pos in range(n_tokens)]
            routing += [
                (doc, pos, layer, ids[pos, layer].tolist()) for pos in range(n_tokens) for layer in range(n_layers)
            ]
    names = ["doc_id", "group_id", "lang", "effort", "pos", "segment", "phase"]
    return (
        pl.DataFrame(tokens, schema=names, orient="row"),
        pl.DataFrame(routing, schema=["doc_id", "pos", "layer", "expert_ids"], orient="row"),
    )


@pytest.fixture
def draw() -> Callable[..., TokensAndRouting]:
    return draw_frames


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
