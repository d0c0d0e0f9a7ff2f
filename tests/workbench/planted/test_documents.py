from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workbench.axes import TOKEN_COLUMNS
from workbench.planted.design import Vocabulary
from workbench.planted.documents import (
    N_HEADER,
    effort_documents,
    language_documents,
    mode_documents,
    null_documents,
    sequences,
)


def test_every_token_is_labelled() -> None:
    tokens = language_documents(4, 30)
    assert tuple(tokens.columns) == TOKEN_COLUMNS
    assert tokens.null_count().sum_horizontal().item() == 0
    first = tokens.filter(pl.col("doc_id") == tokens["doc_id"][0])
    channel = first["segment"][3]
    assert channel in ("analysis", "final")
    assert first["segment"].to_list() == ["bos", "control", "control", *[channel] * 30]
    words = tokens.filter(pl.col("pos") >= N_HEADER)
    assert words.group_by("group_id").agg(pl.col("segment").n_unique())["segment"].to_list() == [1] * 4
    assert first["segment_index"].to_list() == [0, 1, 1, *[2] * 30]
    assert first["pos_in_segment"].to_list() == [0, 0, 1, *range(30)]
    assert first["pos"].to_list() == list(range(33))
    assert tokens.group_by("group_id").agg(pl.col("lang").n_unique())["lang"].to_list() == [2] * 4


def test_languages_share_only_the_shared_words() -> None:
    tokens = language_documents(30, 96).filter(pl.col("pos") >= N_HEADER)
    ja, en = (set(tokens.filter(pl.col("lang") == lang)["token_id"]) for lang in ("ja", "en"))
    assert ja & en == set(Vocabulary.SHARED.tolist())
    assert ja - en <= set(Vocabulary.JA.tolist())
    share = tokens["token_id"].is_in(Vocabulary.SHARED.tolist()).mean()
    assert 0.2 < share < 0.3


def test_a_document_keeps_to_one_topic() -> None:
    tokens = language_documents(20, 96).with_columns(
        own=pl.col("token_id").map_elements(Vocabulary.topic_of, return_dtype=pl.Int64)
    )
    agree = tokens.filter(pl.col("own").is_not_null()).select((pl.format("topic{}", "own") == pl.col("topic")).mean())
    assert agree.item() > 0.75  # the topic's words, and a few of any


@pytest.mark.parametrize(("make", "column", "n"), [(mode_documents, "segment", 2), (effort_documents, "effort", 3)])
def test_a_swapped_header_changes_nothing_else(make, column: str, n: int) -> None:
    tokens = make(6, 40)
    words = tokens.filter(pl.col("pos") >= N_HEADER)
    assert words.group_by("group_id", "pos").agg(pl.col("token_id").n_unique())["token_id"].max() == 1
    assert words.group_by("group_id").agg(pl.col(column).n_unique())[column].to_list() == [n] * 6
    assert words.group_by("group_id").agg(pl.col("doc_id").n_unique())["doc_id"].to_list() == [n] * 6


def test_the_null_labels_one_language_twice() -> None:
    tokens = null_documents(12, 96).filter(~pl.col("token_id").is_in(Vocabulary.SHARED.tolist()))
    words = tokens.filter(pl.col("pos") >= N_HEADER)
    written_in = words.group_by("group_id", "lang").agg((pl.col("token_id") <= Vocabulary.JA[-1]).mean())
    assert set(written_in["token_id"]) == {0.0, 1.0}
    assert written_in.group_by("group_id").agg(pl.col("token_id").n_unique())["token_id"].max() == 1


def test_fertility_lengthens_japanese_alone() -> None:
    lengths = language_documents(3, 40, fertility=1.3).group_by("lang").agg(pl.len())
    assert dict(lengths.rows()) == {"ja": 3 * (52 + N_HEADER), "en": 3 * (40 + N_HEADER)}


def test_confounded_topics_never_meet() -> None:
    tokens = language_documents(30, 20, topics_differ=True)
    topics = {lang: set(part["topic"]) for (lang,), part in tokens.group_by("lang")}
    assert not topics["ja"] & topics["en"]


def test_a_seed_repeats_and_sequences_are_the_documents() -> None:
    tokens = language_documents(3, 20, seed=5)
    assert tokens.equals(language_documents(3, 20, seed=5))
    assert not tokens.equals(language_documents(3, 20, seed=6))
    assert [len(ids) for ids in sequences(tokens)] == [23] * 6
    assert np.concatenate(sequences(tokens)).tolist() == tokens["token_id"].to_list()
