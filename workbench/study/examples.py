"""Which conversations the report shows token by token."""

from __future__ import annotations

import polars as pl

from workbench.io.runs import Run
from workbench.plots.explorer import Explorer, explore
from workbench.plots.explorer_data import order_docs

N_GROUPS = 3
MAX_BYTES = 1_500_000  # that the explorer may add to the page, about


def choose_explorer(run: Run, tokens: pl.DataFrame) -> Explorer | None:
    """An explorer over a few prompt groups, two texts beside each other; None where no conversation is short enough."""
    max_tokens = MAX_BYTES // _token_bytes(run)
    docs = choose_documents(tokens, max_tokens)
    if not docs:
        return None
    return explore(tokens, run.routing, docs=docs, n_experts=run.n_experts, compare=True, max_tokens=max_tokens)


def choose_documents(tokens: pl.DataFrame, max_tokens: int) -> list[str]:
    """Whole prompt groups of about median length, each of another topic, those in both languages first.

    Within a group the middle effort comes first, Japanese before English, so that the first two documents are the two
    languages of one prompt. Where no whole group fits into `max_tokens`: the documents of the shortest that do.
    """
    groups = tokens.group_by("group_id").agg(pl.col("topic").first(), n=pl.len(), n_langs=pl.col("lang").n_unique())
    from_median = (pl.col("n").cast(pl.Int64) - pl.col("n").median()).abs()
    ranked = groups.sort(-pl.col("n_langs").cast(pl.Int64), from_median, "group_id")
    chosen = _whole(ranked.unique("topic", keep="first", maintain_order=True), tokens, max_tokens)
    chosen = chosen or _whole(ranked.sort("n", maintain_order=True), tokens, max_tokens)
    return chosen or _first(tokens.filter(pl.col("group_id") == ranked.sort("n")["group_id"][0]), max_tokens)


def _whole(groups: pl.DataFrame, tokens: pl.DataFrame, max_tokens: int) -> list[str]:
    chosen: list[str] = []
    left = N_GROUPS
    for group, n in groups.select("group_id", "n").iter_rows():
        if n <= max_tokens and left:
            chosen += order_docs(tokens.filter(pl.col("group_id") == group))
            max_tokens, left = max_tokens - n, left - 1
    return chosen


def _first(group: pl.DataFrame, max_tokens: int) -> list[str]:
    sizes = dict(group.group_by("doc_id").len().iter_rows())
    chosen = []
    for doc in order_docs(group):
        if sizes[doc] <= max_tokens:
            chosen.append(doc)
            max_tokens -= sizes[doc]
    return chosen


def _token_bytes(run: Run) -> int:
    """Of one token in an explorer: ids, weights and two quantities of every layer in base64, text, tooltip."""
    n_layers, k = run.manifest["counts"]["n_routed_layers"], run.manifest["model"]["k"]
    packed = n_layers * (k * (1 if run.n_experts <= 256 else 2) + k + 4)
    return packed * 4 // 3 + 4 * n_layers + 150
