"""From a generation to frames and messages: the same columns that a study writes, without a second pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from workbench.axes import TOKEN_COLUMNS
from workbench.capture import Routing
from workbench.chat import ParsedMessage, label_tokens, parse
from workbench.errors import ConfigError, ShapeError
from workbench.models import Generation
from workbench.models.stopping import need_tokenizer

COLUMNS = tuple(name for name in TOKEN_COLUMNS if name in ("doc_id", "pos", "token_id", "token", "segment", "phase"))


def messages(generation: Generation) -> list[list[ParsedMessage]]:
    """Each row, prompt and continuation, as Harmony messages; spans count from the row's first token."""
    tokenizer = need_tokenizer(generation.tokenizer, "messages")
    return [parse(ids, tokenizer) for ids in rows_of(generation)]


def token_frame(generation: Generation, doc_id: Sequence[str] | None = None) -> pl.DataFrame:
    """One row per token with COLUMNS; phase is "prefill" in the prompt and "decode" after it."""
    tokenizer = need_tokenizer(generation.tokenizer, "token_frame")
    n_prompt = generation.attention_mask[:, : generation.n_prompt].sum(1).tolist()
    frames = [
        pl.DataFrame(
            {
                "doc_id": doc,
                "pos": np.arange(len(ids), dtype=np.int32),
                "token_id": ids,
                "token": tokenizer.to_str_tokens(ids),
                "segment": label_tokens(ids, tokenizer),
                "phase": ["prefill"] * given + ["decode"] * (len(ids) - given),
            }
        )
        for doc, ids, given in zip(_names(generation, doc_id), rows_of(generation), n_prompt, strict=True)
    ]
    return pl.concat(frames).select(COLUMNS)


def routing_frame(generation: Generation, doc_id: Sequence[str] | None = None) -> pl.DataFrame:
    """One row per (token, layer) with axes.ROUTING_COLUMNS; join `token_frame` on doc_id and pos for the rest."""
    kept = generation.attention_mask.bool()
    names = np.repeat(_names(generation, doc_id), kept.sum(1).numpy())
    positions = (kept.cumsum(1) - 1)[kept]
    return routing(generation).frame(names.tolist(), positions.tolist())


def routing(generation: Generation) -> Routing:
    """What was recorded, at real tokens, row after row. Raises ConfigError when routing was not recorded."""
    record = generation.record
    if not record.routing:
        raise ConfigError(
            'routing: expected a generation that recorded it, got one that did not. Pass record=["routing"].'
        )
    kept = generation.attention_mask.bool()
    values = {name: tensor[kept].numpy() for name, tensor in record.routing.items()}
    return Routing(record.routed_layers, record.n_experts, **values)


def rows_of(generation: Generation) -> list[list[int]]:
    """The ids of each row, padding removed."""
    kept = generation.attention_mask.bool()
    return [ids[real].tolist() for ids, real in zip(generation.tokens, kept, strict=True)]


def _names(generation: Generation, doc_id: Sequence[str] | None) -> list[str]:
    batch = len(generation.tokens)
    names = [f"row-{row}" for row in range(batch)] if doc_id is None else list(doc_id)
    if len(names) != batch or len(set(names)) != batch:
        raise ShapeError(f"doc_id: expected {batch} different names, one for each row, got {names!r}.")
    return names
