"""What a token is written in and where it stands: the columns of a tokens frame that follow from ids and labels."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import polars as pl

from workbench.io.tokens import Tokenizer

_SCRIPTS = {"CJK": "kanji", "HIRAGANA": "hiragana", "KATAKANA": "katakana", "LATIN": "latin"}
_KANJI_MARKS = "々〆〇ヶヵ"
_WORD_CLASSES = ("kanji", "hiragana", "katakana", "latin", "digit")


def token_classes(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The class of every token, one of axes.TOKEN_CLASSES; raises TokenizerError for ids outside the vocabulary.

    It follows from the id alone. Spaces count only in tokens that hold nothing else, so that " the" is latin.
    """
    known = {token_id: _token_class(token_id, tokenizer) for token_id in set(tokenizer.check_ids(ids))}
    return [known[token_id] for token_id in ids]


def word_starts(ids: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """Whether a word begins with each token, as spaces and scripts show it.

    False where the first character is of the same script (or a digit like the one before) as the last character of the
    token before, without a space between. Japanese writes no spaces: there this finds changes of script, not words.
    Punctuation and special tokens stand alone, so they begin one; space alone and byte tokens do not.
    """
    starts, before = [], ""
    for token_id in tokenizer.check_ids(ids):
        kinds = [_character_class(character) for character in _text(token_id, tokenizer)]
        if kinds:
            continues = kinds[0] in _WORD_CLASSES and kinds[0] == before
            starts.append(set(kinds) != {"space"} and not continues)
        else:
            starts.append(tokenizer.is_special(token_id))
        before = kinds[-1] if kinds else ""
    return starts


def character_classes(text: str) -> set[str]:
    """The classes of a text's characters, spaces left out."""
    return {_character_class(character) for character in text} - {"space"}


def places(segments: pl.Series) -> pl.DataFrame:
    """segment_index and pos_in_segment of one sequence, from the segment label of each of its tokens."""
    runs = pl.DataFrame({"segment_index": segments.rle_id()})
    within = pl.int_range(pl.len(), dtype=pl.Int32).over("segment_index")
    return runs.select(pl.col("segment_index").cast(pl.Int16), pos_in_segment=within)


def _token_class(token_id: int, tokenizer: Tokenizer) -> str:
    if tokenizer.is_special(token_id):
        return "special"
    if tokenizer.is_byte(token_id):
        return "byte"
    found = character_classes(_text(token_id, tokenizer))
    return "space" if not found else found.pop() if len(found) == 1 else "mixed"


def _text(token_id: int, tokenizer: Tokenizer) -> str:
    opaque = tokenizer.is_special(token_id) or tokenizer.is_byte(token_id)
    return "" if opaque else tokenizer.piece_bytes(token_id).decode()


def _character_class(character: str) -> str:
    """Full-width letters and digits count as what they stand for."""
    if character.isspace():
        return "space"
    if character in _KANJI_MARKS:
        return "kanji"
    standard = unicodedata.normalize("NFKC", character)[:1] or character
    category = unicodedata.category(standard)
    if category.startswith("N") and not unicodedata.name(standard, "").startswith("CJK"):
        return "digit"
    script = unicodedata.name(standard, "").split(" ")[0].split("-")[0]
    if category.startswith("L") and script in _SCRIPTS:
        return _SCRIPTS[script]
    return "mixed" if category.startswith("L") else "punct"
