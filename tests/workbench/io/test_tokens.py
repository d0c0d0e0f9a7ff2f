"""Text to ids and back: exact, literal where asked, in whole characters, and refusing files that would be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_files import released_tokenizer, small_spec, small_tokenizer

from workbench.errors import TokenizerError
from workbench.io.tokenizer_file import BYTE_NAMES, CONTROL_NAMES, SPACE
from workbench.io.tokens import StreamDecoder, Tokenizer

LOOKALIKES = [
    "<|end|>",
    "<|start|>system",
    "<|unk|>",
    "<|reserved_006|>",
    "<0x41>",
    "<0x0A><0xE3>",
    "<|",
    "|>",
    "\ue000",
]
literal_texts = st.lists(
    st.text(max_size=6) | st.sampled_from([*LOOKALIKES, "日本の首都", " ", "\n", "𓆏🦑", "é"]), max_size=6
).map(lambda parts: "".join(parts).replace(SPACE, ""))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Id lists with many special and byte tokens in them."""
    return st.lists(st.integers(0, tokenizer.d_vocab - 1) | st.integers(0, 15) | st.integers(200, 271), max_size=30)


def write(folder: Path, spec: object) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def test_from_file_takes_the_file_or_its_directory(tmp_path: Path) -> None:
    write(tmp_path, small_spec())
    from_directory, from_file = Tokenizer.from_file(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert from_directory.hash == from_file.hash == expected
    assert from_directory.d_vocab == len(small_spec()["model"]["vocab"])


def test_control_ids_carry_their_names(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.constrain_id]
    ids += [tokenizer.channel_id, tokenizer.start_id, tokenizer.end_id, tokenizer.message_id, tokenizer.call_id]
    names = ["unk", "startoftext", "return", "endoftext", "constrain", "channel", "start", "end", "message", "call"]
    assert tokenizer.to_str_tokens(ids) == [f"<|{name}|>" for name in names]
    assert tokenizer.special_ids == {
        name: i for i, name in enumerate([*CONTROL_NAMES, *LOOKALIKES[3:4], "<|reserved_007|>"])
    }


def test_bos_is_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.to_tokens("日本の", bos=True) == [1, *tokenizer.to_tokens("日本の", bos=False)]
    assert tokenizer.to_tokens("", bos=False) == []
    assert tokenizer.to_tokens("", bos=True) == [1]


def test_batches_are_the_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["日本", "", " the world\n"]
    batch = tokenizer.to_tokens(texts, bos=True)
    assert batch == [tokenizer.to_tokens(text, bos=True) for text in texts]
    assert tokenizer.to_string(batch, skip_special=True) == texts
    assert tokenizer.to_tokens([], bos=True) == []


def test_special_names_in_text_are_special_only_for_to_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.to_tokens("<|end|>the", bos=False)[0] == tokenizer.end_id
    assert not any(map(tokenizer.is_special, tokenizer.encode_literal("<|end|>the")))


@given(literal_texts)
@example("<|unk|>")
@example("𓆏 <0xF0>")
@settings(deadline=None, derandomize=True)
def test_literal_text_is_never_special_and_comes_back(text: str) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode_literal(text)
    assert not any(map(tokenizer.is_special, ids))
    assert tokenizer.to_string(ids) == text


@given(literal_texts.filter(lambda text: "<|" not in text and "<0x" not in text))
@settings(deadline=None, derandomize=True)
def test_literal_and_plain_encoding_agree_on_ordinary_text(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.encode_literal(text) == tokenizer.to_tokens(text, bos=False)


def test_text_of_byte_names_gives_byte_tokens_only_for_to_tokens(tokenizer: Tokenizer) -> None:
    byte_a = 16 + 0x41
    assert byte_a in tokenizer.to_tokens("<0x41>", bos=False)
    assert byte_a not in tokenizer.encode_literal("<0x41>")
    assert tokenizer.to_string(tokenizer.encode_literal("<0x41>")) == "<0x41>"


def test_the_space_sign_is_the_one_text_that_changes(tokenizer: Tokenizer) -> None:
    assert tokenizer.to_string(tokenizer.encode_literal(f"a{SPACE}b")) == "a b"


@pytest.mark.parametrize("text", ["the", " the", "  the", "\nthe", "\n the", " ", "the "])
def test_one_space_goes_after_each_special_token(tokenizer: Tokenizer, text: str) -> None:
    whole = f"{text}<|message|>{text}<|end|>{text}"
    assert tokenizer.to_string(tokenizer.to_tokens(whole, bos=False)) == whole


def test_continuing_text_keeps_its_first_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_literal("the world")
    assert tokenizer.to_string(ids[1:]) == "world"
    assert tokenizer.to_string(ids[1:], text_start=False) == " world"


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor])
def test_ids_may_come_in_any_container(tokenizer: Tokenizer, convert: type) -> None:
    ids = tokenizer.to_tokens("日本の<|end|>", bos=True)
    assert tokenizer.to_string(convert(ids), skip_special=True) == "日本の"
    assert tokenizer.to_str_tokens(convert(ids)) == tokenizer.to_str_tokens(ids)
    assert tokenizer.to_string(convert([ids, ids])) == ["<|startoftext|>日本の<|end|>"] * 2


@given(ids_of(small_tokenizer()), st.booleans(), st.booleans())
@settings(deadline=None, derandomize=True)
def test_streamed_text_joins_to_the_whole(ids: list[int], skip_special: bool, text_start: bool) -> None:
    tokenizer = small_tokenizer()
    stream = StreamDecoder(tokenizer, skip_special=skip_special, text_start=text_start)
    chunks = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    assert "".join(chunks) == tokenizer.to_string(ids, skip_special=skip_special, text_start=text_start)


@given(st.text(alphabet="𓆏🦑é世 the\n", max_size=8))
@settings(deadline=None, derandomize=True)
def test_streaming_real_text_gives_whole_characters_only(text: str) -> None:
    tokenizer = small_tokenizer()
    stream = StreamDecoder(tokenizer)
    seen = ""
    for token_id in tokenizer.encode_literal(text):
        seen += stream.push(token_id)
        assert text.startswith(seen)
    assert seen == text
    assert stream.finish() == ""


def test_a_character_cut_off_is_held_back_until_the_end(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    *first, last = tokenizer.encode_literal("𓆏")
    assert [stream.push(token_id) for token_id in first] == [""] * len(first)
    assert stream.finish() == "\ufffd"
    assert tokenizer.to_string([*first, last]) == "𓆏"
    assert tokenizer.to_string([*first, tokenizer.end_id]) == "\ufffd<|end|>"


def test_str_tokens_show_one_character_per_group_of_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_literal("日本の𓆏\nthe")
    assert tokenizer.to_str_tokens(ids) == [" ", "日本の", "𓆏", "", "", "", "\n", "t", "h", "e"]
    assert tokenizer.group_bytes(ids)[2] == range(2, 6)


def test_bytes_without_a_character_show_their_names(tokenizer: Tokenizer) -> None:
    broken = [16 + value for value in (0xE3, 0x81, 0x41, 0x00, 0xFF, 0xC3)]
    assert tokenizer.to_str_tokens(broken) == ["<0xE3>", "<0x81>", "A", "<0x00>", "<0xFF>", "<0xC3>"]
    surrogate = [16 + value for value in (0xED, 0xA0, 0x80)]
    assert tokenizer.to_str_tokens(surrogate) == ["<0xED>", "<0xA0>", "<0x80>"]


@given(ids_of(small_tokenizer()))
@settings(deadline=None, derandomize=True)
def test_groups_cover_every_position_once(ids: list[int]) -> None:
    tokenizer = small_tokenizer()
    assert [position for group in tokenizer.group_bytes(ids) for position in group] == list(range(len(ids)))
    assert len(tokenizer.to_str_tokens(ids)) == len(ids)


@given(literal_texts)
@settings(deadline=None, derandomize=True)
def test_str_tokens_join_to_the_text_behind_its_dummy_space(text: str) -> None:
    tokenizer = small_tokenizer()
    joined = "".join(tokenizer.to_str_tokens(tokenizer.encode_literal(text)))
    printable = all(character.isprintable() or not character.isascii() or character in "\t\n\r" for character in text)
    assert joined == (" " + text if text else "") or not printable


@pytest.mark.parametrize("bad", [[-1], [10**6], [1.5], ["1"], [[1], 2], [2, [1]], [None], 3, "text"])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, bad: list[object]) -> None:
    with pytest.raises(TokenizerError, match=r"token ids?: expected"):
        tokenizer.to_string(bad)
    with pytest.raises(TokenizerError, match=r"token ids?: expected"):
        tokenizer.to_str_tokens(bad)


@pytest.mark.parametrize("bad", [-1, 99_999, 1.5, None])
def test_only_ids_of_the_vocabulary_have_bytes(tokenizer: Tokenizer, bad: int) -> None:
    assert tokenizer.piece_bytes(16 + 0xE3) == b"\xe3"
    with pytest.raises(TokenizerError, match=r"token ids?: expected"):
        tokenizer.piece_bytes(bad)


@pytest.mark.parametrize("bad", [b"bytes", 3, None, "half \ud83d"])
def test_text_that_is_no_text_is_refused(tokenizer: Tokenizer, bad: str) -> None:
    for encode in (
        tokenizer.encode_literal,
        lambda text: tokenizer.to_tokens(text, bos=False),
        lambda text: tokenizer.to_tokens([text], bos=False),
    ):
        with pytest.raises(TokenizerError, match="text: expected"):
            encode(bad)


def test_a_bpe_is_refused_with_the_reason(tmp_path: Path) -> None:
    spec = small_spec()
    spec["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    with pytest.raises(TokenizerError, match=r"expected a Unigram model, got BPE.*published with the checkpoint"):
        Tokenizer.from_file(write(tmp_path, spec))


def test_files_that_would_give_wrong_ids_are_refused(tmp_path: Path) -> None:
    no_fallback, renamed, no_byte, no_prefix, gap = (small_spec() for _ in range(5))
    gap["added_tokens"].append({**gap["added_tokens"][0], "id": 99_999, "content": "<|far|>"})
    no_fallback["model"]["byte_fallback"] = False
    renamed["added_tokens"][11]["content"] = "</s>"
    no_byte["model"]["vocab"][16][0] = "zero"
    no_prefix["normalizer"] = None
    for spec, message in [
        (no_fallback, "byte_fallback to be on"),
        (renamed, r"expected id 11 to be <\|end\|>, got '<\|end\|>' in the vocabulary and '</s>'"),
        (no_byte, f"got none for {BYTE_NAMES[0]}"),
        (no_prefix, "expected a normalizer"),
        (gap, "ids that follow the .* pieces without a gap, got 99999"),
        ({"model": {}}, "expected the JSON of a tokenizer.json"),
        ({"model": []}, "expected the JSON of a tokenizer.json"),
        ([], "expected the JSON of a tokenizer.json"),
    ]:
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_file(write(tmp_path, spec))
    with pytest.raises(TokenizerError, match=r"expected the JSON of a tokenizer.json, got RecursionError"):
        Tokenizer(b"[" * 100_000)


def test_what_is_no_tokenizer_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="got no such file"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(TokenizerError, match=r"expected the JSON of a tokenizer\.json"):
        Tokenizer(b"\xff\xfe not JSON")
    broken = small_spec()
    broken["model"]["unk_id"] = 10**6
    with pytest.raises(TokenizerError, match="the library can build"):
        Tokenizer(json.dumps(broken).encode())


def test_limits_saved_in_the_file_do_not_cut_texts() -> None:
    spec = small_spec()
    spec["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    assert len(Tokenizer(json.dumps(spec).encode()).to_tokens("日本の首都は東京です。", bos=False)) > 2


@pytest.mark.shared
def test_released_encodings_are_met(shared_tokenizer_dir: Path) -> None:
    tokenizer = released_tokenizer(shared_tokenizer_dir)
    goldens = json.loads((shared_tokenizer_dir / "golden_encodings.json").read_text("utf-8"))
    assert tokenizer.d_vocab == 196_608
    assert tokenizer.hash == "a35f390c6489427e4dcac7d957f34d9dacd7332972c990f4b4eb6b724c8873f4"
    for text, golden in goldens.items():
        assert tokenizer.to_tokens(text, bos=False) == golden["ids"]
        assert tokenizer.to_string(golden["ids"]) == text


@pytest.mark.shared
def test_released_vocabulary_encodes_lookalikes_as_text(shared_tokenizer_dir: Path) -> None:
    tokenizer = released_tokenizer(shared_tokenizer_dir)
    ids = tokenizer.encode_literal("<|end|><|start|>system")
    assert tokenizer.to_str_tokens(ids) == [" <", "|", "end", "|", "><", "|", "start", "|>", "system"]
    for text in [*LOOKALIKES, "".join(CONTROL_NAMES), "".join(BYTE_NAMES), "𓆏<|reserved_343|>\r\n\t 日本"]:
        assert not any(map(tokenizer.is_special, tokenizer.encode_literal(text)))
        assert tokenizer.to_string(tokenizer.encode_literal(text)) == text
