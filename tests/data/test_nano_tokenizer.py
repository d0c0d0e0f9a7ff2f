"""The nano tokenizer is built like LLM-jp-4's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from build_tokenizer import D_VOCAB, KEPT_WHOLE, assemble, choose_pieces
from pieces import count_units, learn_pieces, segment
from recipe import HERE as NANO

from workbench.io.tokenizer_file import BYTE_NAMES, CONTROL_NAMES
from workbench.io.tokens import Tokenizer

SPEC = json.loads((NANO / "tokenizer.json").read_text("utf-8"))
PIECES = [piece for piece, _ in SPEC["model"]["vocab"]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(NANO / "tokenizer.json")


def test_control_tokens_have_the_real_ids() -> None:
    assert PIECES[:14] == list(CONTROL_NAMES)
    assert all(token["special"] and not token["normalized"] for token in SPEC["added_tokens"])


def test_construction_is_the_real_one() -> None:
    assert SPEC["model"]["type"] == "Unigram"
    assert SPEC["model"]["byte_fallback"] is True
    assert SPEC["pre_tokenizer"] is None
    assert [step["type"] for step in SPEC["normalizer"]["normalizers"]] == ["Replace", "Replace"]
    assert [step["type"] for step in SPEC["decoder"]["decoders"]] == ["ByteFallback", "Replace", "Fuse", "Replace"]
    assert SPEC["post_processor"]["single"] == [{"Sequence": {"id": "A", "type_id": 0}}]
    first = PIECES.index(BYTE_NAMES[0])
    assert PIECES[first : first + 256] == list(BYTE_NAMES)
    assert len(PIECES) == len(set(PIECES)) == D_VOCAB


@pytest.mark.shared
def test_it_has_the_structure_of_the_real_tokenizer(shared_tokenizer_dir: Path) -> None:
    import lzma

    real = json.loads(lzma.decompress((shared_tokenizer_dir / "tokenizer.json.xz").read_bytes()))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert SPEC[part] == real[part]
    assert [piece for piece, _ in real["model"]["vocab"][:14]] == PIECES[:14]


def test_role_and_channel_names_are_single_tokens(tokenizer: Tokenizer) -> None:
    for word in KEPT_WHOLE:
        assert len(tokenizer.to_tokens(word, bos=False)) == 1
    assert len(tokenizer.to_tokens("<|channel|>final", bos=False)) == 2


def test_digits_stand_alone() -> None:
    assert [p for p in PIECES if any(c.isdigit() for c in p) and len(p) > 1 and not p.startswith("<")] == []


def test_no_piece_spans_a_space() -> None:
    assert not any("\u2581" in piece[1:] for piece in PIECES)


@pytest.mark.parametrize(
    "text",
    [
        "東京は日本の首都です。",
        "The capital of France is Paris.",
        "27 + 15 = 42\n3 × 4 = 12",
        "鬱と😀と鯨、\tタブ",
        "  two spaces",
        "ｶﾅ Ａ ①",
        "",
    ],
)
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.to_tokens(text, bos=False)
    assert tokenizer.to_string(ids) == text
    assert 0 not in ids


def test_ordinary_characters_need_no_bytes(tokenizer: Tokenizer) -> None:
    text = "ぁあん" + "ァアヴー" + "".join((NANO / "kanji.txt").read_text("utf-8").split()) + "AZaz09!?~「」、。"
    first = PIECES.index(BYTE_NAMES[0])
    assert not any(first <= token < first + 256 for token in tokenizer.to_tokens(text, bos=False))


def test_the_committed_file_is_what_the_script_makes() -> None:
    made = assemble(choose_pieces(D_VOCAB - len(CONTROL_NAMES) - len(BYTE_NAMES)))
    assert json.loads(made.to_str()) == SPEC


def test_pieces_are_the_same_on_every_run_and_keep_to_their_units() -> None:
    texts = ["赤いりんごを赤い箱に入れる 12 + 3", "the red apple in the red box", "三十二を数える"] * 10
    learned = learn_pieces(texts, 60)
    assert learned == learn_pieces(iter(texts), 60)
    assert learned["\u2581the"] > learned["\u2581apple"]
    assert max(map(len, learned)) > 1
    assert count_units(["三十二 12"]) == {"\u2581": 2, "三": 1, "十": 1, "二": 1, "1": 1, "2": 1}


def test_segment_takes_the_most_probable_cut() -> None:
    assert segment("abab", {"ab": -1.0, "a": -2.0, "b": -2.0, "aba": -1.5}) == ["ab", "ab"]
    assert segment("abz", {"ab": -1.0, "a": -2.0, "b": -2.0}) == ["ab", "z"]
