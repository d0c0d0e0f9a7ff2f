"""Frames of made-up routing, whose every number a test can recompute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    "\u2028\u2029",
    "\u202eright to left",
    "<!--",
    '" onmouseover="window.broken = 3',
    "&lt;",
    "東京",
    "𠮷",
    "",  # a further byte of the character before it
    "",
    "<0xE3>",
    "\n",
    "\t\x00\x1b",
    "العربية",
]


def frames(
    texts: dict[str, Sequence[str]],
    n_layers: int = 3,
    n_experts: int = 8,
    k: int = 2,
    seed: int = 0,
    n_written: int = 0,
    layers: Sequence[int] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(tokens, routing) of documents by id; an id like "tea-ja-low" gives group, language and effort.

    The last `n_written` tokens of each are an answer (analysis), the others the question (user).
    """
    rng = np.random.default_rng(seed)
    tokens, routing = [], []
    for doc, words in texts.items():
        group, lang, effort = (*doc.split("-"), None)[:3]
        n = len(words)
        given = n - n_written
        tokens.append(
            pl.DataFrame(
                {
                    "doc_id": [doc] * n, "group_id": [group] * n, "topic": ["test"] * n, "lang": [lang] * n,
                    "effort": pl.Series([effort] * n, dtype=pl.String), "pos": np.arange(n, dtype=np.int32),
                    "token_id": np.arange(100, 100 + n, dtype=np.int32), "token": list(words),
                    "segment": ["user"] * given + ["analysis"] * n_written,
                    "phase": ["prefill"] * given + ["decode"] * n_written,
                }
            )
        )  # fmt: skip
        for layer in layers or range(n_layers):
            ids = np.argsort(rng.random((n, n_experts)))[:, :k].astype(np.int16)
            weights = -np.sort(-rng.dirichlet(np.ones(k), n), axis=1)
            routing.append(
                pl.DataFrame(
                    {
                        "doc_id": [doc] * n, "pos": np.arange(n, dtype=np.int32),
                        "layer": pl.Series([layer] * n, dtype=pl.Int16), "expert_ids": ids.tolist(),
                        "routing_weights": weights.tolist(), "router_entropy": rng.random(n) * 2,
                        "router_margin": rng.random(n),
                    }
                )
            )  # fmt: skip
    return pl.concat(tokens), pl.concat(routing)
