"""One prompt group to look at: its conversations token by token."""

from __future__ import annotations

import polars as pl

from workbench.plots.report import Example, ShownToken
from workbench.plots.theme import NAMES, ordered


def choose_examples(tokens: pl.DataFrame, routing: pl.LazyFrame) -> list[Example]:
    """The conversations of the group whose longest one is of median length; medium effort unfolded."""
    lengths = tokens.group_by("group_id").agg(pl.col("pos").max()).sort("pos", "group_id")
    group = lengths["group_id"][len(lengths) // 2]
    chosen = tokens.filter(pl.col("group_id") == group)
    heads = chosen.select("doc_id", "lang", "effort").unique()
    docs = [doc for lang in ordered(heads["lang"]) for doc in _by_effort(heads.filter(pl.col("lang") == lang))]
    experts = _experts_by_token(docs, routing)
    shown = chosen.join(experts, on=["doc_id", "pos"], how="left", maintain_order="left")
    opened = "medium" if "medium" in chosen["effort"].to_list() else chosen["effort"][0]
    return [_example(shown.filter(pl.col("doc_id") == doc), opened) for doc in docs]


def _by_effort(heads: pl.DataFrame) -> list[str]:
    return [
        doc
        for effort in ordered(heads["effort"])
        for doc in heads.filter(pl.col("effort").eq_missing(effort))["doc_id"]
    ]


def _experts_by_token(docs: list[str], routing: pl.LazyFrame) -> pl.DataFrame:
    """Columns doc_id, pos, experts: one line of text per layer."""
    ids = pl.col("expert_ids").cast(pl.List(pl.String)).list.join(", ")
    return (
        routing.filter(pl.col("doc_id").is_in(docs))
        .with_columns(line=pl.format("layer {}: {}", "layer", ids))
        .group_by("doc_id", "pos")
        .agg(experts=pl.col("line").sort_by("layer").str.join("\n"))
        .collect()
    )


def _example(tokens: pl.DataFrame, opened: str | None) -> Example:
    first = tokens.row(0, named=True)
    title = NAMES.get(first["lang"], first["lang"]) + (f", {first['effort']} effort" if first["effort"] else "")
    shown = [
        ShownToken(
            _visible(row["token"], row["segment"]),
            row["segment"],
            f"{row['token']!r} (id {row['token_id']}, {row['segment']}, {row['phase']})\n{row['experts']}",
        )
        for row in tokens.iter_rows(named=True)
    ]
    return Example(f"{title} ({first['topic']})", shown, opened=first["effort"] == opened)


def _visible(text: str, segment: str) -> str:
    """Line breaks as a sign; kept as breaks too, except in the long system message."""
    return text.replace("\n", "↵" if segment == "system" else "↵\n")
