from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from workbench.io.token_class import character_classes, places, token_classes, word_starts
from workbench.io.tokens import Tokenizer

NANO_TOKENIZER = Path(__file__).resolve().parents[3] / "data" / "nano" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(NANO_TOKENIZER)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("漢字々〇", {"kanji"}),
        ("ひらがなゝ", {"hiragana"}),
        ("カタカナーｱ", {"katakana"}),
        ("Latin é Ａ", {"latin"}),
        ("42 ４２ ①", {"digit"}),
        ("、。「」.,!→$😀", {"punct"}),
        (" \u3000\n", set()),
        ("Ω я", {"mixed"}),
        ("食べる", {"kanji", "hiragana"}),
        ("二", {"kanji"}),
    ],
)
def test_classes_of_characters(text: str, expected: set[str]) -> None:
    assert character_classes(text) == expected


def test_classes_of_tokens_join_to_those_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.to_tokens("お茶は3円、tea! コーヒー<|end|>𠮷", bos=True)
    classes = token_classes(ids, tokenizer)
    assert classes[0] == classes[ids.index(tokenizer.end_id)] == "special"
    assert classes[-4:] == ["byte"] * 4  # a character outside the vocabulary
    for name, text in (("latin", "tea"), ("digit", "3"), ("katakana", "コーヒー")):
        shown = "".join(
            piece for piece, found in zip(tokenizer.to_str_tokens(ids), classes, strict=True) if found == name
        )
        assert shown.strip() == text


def test_words_begin_after_spaces_and_where_the_script_changes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.to_tokens("xqzt zzyx、東京<|end|>", bos=False)
    starts = word_starts(ids, tokenizer)
    firsts = [piece.strip() for piece, start in zip(tokenizer.to_str_tokens(ids), starts, strict=True) if start]
    assert "".join(piece[:1] for piece in firsts) == "xz、東<"
    assert not all(starts)


def test_places_number_the_runs_of_a_segment_and_the_tokens_in_them() -> None:
    found = places(pl.Series(["control", "user", "user", "control", "final"]))
    assert found["segment_index"].to_list() == [0, 1, 1, 2, 3]
    assert found["pos_in_segment"].to_list() == [0, 0, 1, 0, 0]
