"""Text to token ids and back, with the tokenizer.json of the LLM-jp-4 family.

The file is read by the `tokenizers` library alone: no remote code, and none of the conversions that turn this Unigram
vocabulary into a BPE without merges.  Three facts about the vocabulary shape this module:

- Every run of text, also the one after a special token, gets one dummy space in front, which decoding removes again.
- Characters outside the vocabulary become one token per UTF-8 byte.
- The names of special and byte tokens are ordinary pieces of the vocabulary, so `<|end|>` or `<0x41>` typed by a user
  would become control or byte tokens; `Tokenizer.encode_literal` keeps them text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import tokenizers

from workbench.errors import TokenizerError
from workbench.io.tokenizer_file import BYTE_NAMES, SPACE, build, read_spec


class Tokenizer:
    """The tokenizer of one checkpoint; `Tokenizer.from_file` reads it.

    `special_ids` maps the name of every special token to its id, `data` is the file as bytes, `hash` its SHA-256.
    """

    unk_id, bos_id, eos_id, pad_id = 0, 1, 2, 4
    constrain_id, channel_id, start_id, end_id, message_id, call_id = 8, 9, 10, 11, 12, 13

    def __init__(self, data: bytes, source: str = "tokenizer.json") -> None:
        """`data` is the content of a tokenizer.json, `source` names it in errors; raises TokenizerError."""
        spec = read_spec(data, source)
        self.source = source
        self.hash = hashlib.sha256(data).hexdigest()
        self.data = data
        self._tokenizer = build(data, source)
        self.d_vocab: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids: dict[str, int] = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self._pieces: list[str] = [piece for piece, _ in spec["model"]["vocab"]]
        self._pieces += [""] * (self.d_vocab - len(self._pieces))
        for name, token_id in self.special_ids.items():
            self._pieces[token_id] = name
        self._specials = frozenset(self.special_ids.values())
        self._byte_ids = tuple(self._pieces.index(name) for name in BYTE_NAMES)
        self._byte_values = {token_id: value for value, token_id in enumerate(self._byte_ids)}
        self._split_pattern = re.compile("(" + "|".join(map(re.escape, self.special_ids)) + ")")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a checkpoint directory; raises TokenizerError."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(f"{file}: expected a tokenizer.json, got no such file. Pass it or its directory.")
        return cls(file.read_bytes(), str(file))

    def __repr__(self) -> str:
        return f"Tokenizer({self.source!r}, d_vocab={self.d_vocab}, hash={self.hash[:12]})"

    @overload
    def to_tokens(self, text: str, bos: bool) -> list[int]: ...
    @overload
    def to_tokens(self, text: list[str], bos: bool) -> list[list[int]]: ...
    def to_tokens(self, text: str | list[str], bos: bool) -> list[int] | list[list[int]]:
        """Encode one text, or each text of a list, exactly as the checkpoint's own tokenizer does.

        Names of special tokens in the text become those tokens (see `encode_literal` for the contrary).  `bos` puts
        `<|startoftext|>` in front: pre-training documents begin with it, rendered chats do not.
        """
        texts = list(text) if isinstance(text, list | tuple) else [text]
        for entry in texts:
            _check_text(entry)
        prefix = [self.bos_id] if bos else []
        batch = [prefix + found.ids for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        return batch if isinstance(text, list | tuple) else batch[0]

    def encode_literal(self, text: str) -> list[int]:
        """Encode a text in which nothing is special: the ids decode to exactly `text` and name no special token.

        The one exception is U+2581, the vocabulary's own sign for a space, which decodes to a space.
        """
        _check_text(text)
        found = self._literal_tokenizer.encode(text, add_special_tokens=False)
        if self.unk_id not in found.ids:
            return list(found.ids)
        ids: list[int] = []
        for token_id, piece in zip(found.ids, found.tokens, strict=True):
            unknown = token_id == self.unk_id
            ids += [self._byte_ids[value] for value in piece.encode()] if unknown else [token_id]
        return ids

    @overload
    def to_string(self, ids: Sequence[int], *, skip_special: bool = False, text_start: bool = True) -> str: ...
    @overload
    def to_string(
        self, ids: Sequence[Sequence[int]], *, skip_special: bool = False, text_start: bool = True
    ) -> list[str]: ...
    def to_string(self, ids: Any, *, skip_special: bool = False, text_start: bool = True) -> str | list[str]:
        """Decode ids (list, array or tensor; [pos], or [batch pos] for a list of strings).

        The dummy space is removed once at the start and once after every special token.  `text_start=False` keeps the
        first one, for ids that continue a text; `skip_special` leaves special tokens out.  Bytes that form no
        character decode to U+FFFD.  Raises TokenizerError for ids outside the vocabulary.
        """
        rows = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(rows, list | tuple) and rows and isinstance(rows[0], list | tuple):
            return [self._decode(row, skip_special, text_start) for row in rows]
        return self._decode(rows, skip_special, text_start)

    def stream(self, *, text_start: bool = True) -> StreamDecoder:
        """A decoder that takes ids one at a time and never returns half a character."""
        return StreamDecoder(self, text_start=text_start)

    def to_str_tokens(self, ids: Iterable[int]) -> list[str]:
        """One readable string per token, spaces as spaces (the dummy one too).

        When several byte tokens make up one character, the first carries the character and the others are empty;
        a byte that belongs to no character shows as its name, like `<0xE3>`.
        """
        checked = self.check_ids(ids)
        shown: list[str] = []
        for span in self.group_bytes(checked):
            shown += [self._show(checked[span.start : span.stop])] + [""] * (len(span) - 1)
        return shown

    def group_bytes(self, ids: Iterable[int]) -> list[range]:
        """Positions grouped into readable units: the byte tokens of one character together, any other token alone."""
        checked = self.check_ids(ids)
        spans: list[range] = []
        while (start := spans[-1].stop if spans else 0) < len(checked):
            values = [self._byte_values.get(token_id, -1) for token_id in checked[start : start + 4]]
            spans.append(range(start, start + _character_width(values)))
        return spans

    def split_specials(self, text: str) -> list[str]:
        """The text cut at names of special tokens; even entries are plain text, odd entries such names."""
        return self._split_pattern.split(text)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._specials

    def is_byte(self, token_id: int) -> bool:
        return token_id in self._byte_values

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, its dummy or real spaces as spaces; raises TokenizerError as `check_ids`."""
        (token_id,) = self.check_ids([token_id])
        if token_id in self._byte_values:
            return bytes([self._byte_values[token_id]])
        return self._pieces[token_id].replace(SPACE, " ").encode()

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        """The ids as plain integers; raises TokenizerError when one is no integer or outside the vocabulary."""
        try:
            checked = [operator.index(token_id) for token_id in ids]
        except TypeError:
            raise TokenizerError(
                "token ids: expected a flat list of integers, got other values. Pass one row."
            ) from None
        for token_id in checked:
            if not 0 <= token_id < self.d_vocab:
                raise TokenizerError(
                    f"token id: expected 0 to {self.d_vocab - 1}, got {token_id}. "
                    "Decode ids with the tokenizer of the model that produced them."
                )
        return checked

    def _decode(self, ids: Iterable[int], skip_special: bool, text_start: bool) -> str:
        stream = StreamDecoder(self, skip_special=skip_special, text_start=text_start)
        return "".join(map(stream.push, self.check_ids(ids))) + stream.finish()

    def _show(self, unit: list[int]) -> str:
        if len(unit) == 1 and unit[0] in self._byte_values:
            character = chr(self._byte_values[unit[0]])
            readable = character.isascii() and (character.isprintable() or character in "\t\n\r")
            return character if readable else self._pieces[unit[0]]
        return b"".join(map(self.piece_bytes, unit)).decode()

    @cached_property
    def _literal_tokenizer(self) -> tokenizers.Tokenizer:
        # `encode_special_tokens` is not enough: the names would still match as pieces.  A piece with a space in it
        # never matches, because the normalizer has replaced every space by then.  Byte fallback needs the names of
        # the byte pieces, so here unknown characters stay unknown and encode_literal writes their bytes.
        spec = json.loads(self.data)
        vocab = spec["model"]["vocab"]
        for token_id in self._specials.union(self._byte_ids):
            if token_id < len(vocab):
                vocab[token_id][0] = f" {token_id}"
        spec["added_tokens"] = []
        spec["model"]["byte_fallback"] = False
        return build(json.dumps(spec).encode(), self.source)


class StreamDecoder:
    """Decodes ids one at a time; what it returns joins to exactly `Tokenizer.to_string` of all of them.

    A character is returned once its last byte has arrived, never in halves.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False, text_start: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self._at_start = text_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        (token_id,) = self.tokenizer.check_ids([token_id])
        piece = self.tokenizer.piece_bytes(token_id)
        if self.tokenizer.is_special(token_id):
            self._at_start = True
            return self.finish() + ("" if self.skip_special else piece.decode())
        if self._at_start:
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is still held back: nothing, or U+FFFD for a character that never became complete."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text: expected a string, got {type(text).__name__}. Pass a string or a list of strings.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text: expected Unicode, got half a surrogate pair at position {error.start}. Clean the text first."
        ) from None


def _character_width(values: list[int]) -> int:
    """How many of these byte values (-1 where a token is no byte) make up the first character; 1 if none do."""
    for width in range(2, len(values) + 1):
        unit = values[:width]
        if min(unit) >= 0:
            with suppress(UnicodeDecodeError):
                if len(bytes(unit).decode()) == 1:
                    return width
    return 1
