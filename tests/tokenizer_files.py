"""Tokenizers for tests: a small one of the released construction, and the released one where its file is at hand."""

from __future__ import annotations

import json
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from workbench.io.tokenizer_file import BYTE_NAMES, CONTROL_NAMES, SPACE
from workbench.io.tokens import Tokenizer

_ENGLISH = "assistant user system developer analysis commentary final json to the world"
_JAPANESE = "日本 日本の 首都 東京 です 世界"
_WORDS = [*(SPACE + word for word in _ENGLISH.split()), *_JAPANESE.split(), "functions", "end", SPACE * 2, SPACE * 3]
_CHARACTERS = [SPACE, *map(chr, range(0x21, 0x7F)), *map(chr, range(0x3041, 0x3097)), *"日本首都東京は。？"]


def small_spec() -> dict[str, Any]:
    """The content of a tokenizer.json with 14 control, 2 reserved and 256 byte tokens and about 200 pieces."""
    specials = [*CONTROL_NAMES, "<|reserved_006|>", "<|reserved_007|>"]
    normalizers = [
        {"type": "Replace", "pattern": {"Regex": "(?<!\\n)^"}, "content": SPACE},
        {"type": "Replace", "pattern": {"Regex": " "}, "content": SPACE},
    ]
    vocab = [[name, 0.0] for name in [*specials, *BYTE_NAMES]]
    vocab += [[word, -4.0] for word in _WORDS] + [[character, -6.0] for character in _CHARACTERS]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": token_id, "content": name, **flags} for token_id, name in enumerate(specials)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": vocab},
    }


@lru_cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer(json.dumps(small_spec()).encode(), "small tokenizer.json")


@lru_cache
def released_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(lzma.decompress((folder / "tokenizer.json.xz").read_bytes()), "released tokenizer.json")
