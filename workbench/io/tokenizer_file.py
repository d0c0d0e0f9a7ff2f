"""What a tokenizer.json of the LLM-jp-4 family must hold: everything whose ids would be silently wrong is refused."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from workbench.errors import TokenizerError

SPACE = "\u2581"
_CONTROL_WORDS = "unk startoftext return mask endoftext cls eod sep constrain channel start end message call"  # 0-13
CONTROL_NAMES = tuple(f"<|{word}|>" for word in _CONTROL_WORDS.split())
BYTE_NAMES = tuple(f"<0x{value:02X}>" for value in range(256))


def build(data: bytes, source: str) -> tokenizers.Tokenizer:
    """The library's tokenizer; `source` names the file in errors. Raises TokenizerError."""
    try:
        built = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise TokenizerError(f"{source}: expected a tokenizer the library can build, got {error}.") from None
    # encode_literal and decoding rely on both: one dummy space in front, and no space left as it is
    normalized = built.normalizer.normalize_str("a b") if built.normalizer else "a b"
    if normalized != f"{SPACE}a{SPACE}b":
        raise TokenizerError(
            f"{source}: expected a normalizer that turns 'a b' into '{SPACE}a{SPACE}b', got {normalized!r}. "
            "Use the tokenizer.json published with the checkpoint."
        )
    built.no_truncation()
    built.no_padding()
    return built


def read_spec(data: bytes, source: str) -> dict[str, Any]:
    """Parse the file and refuse everything whose ids would be silently wrong."""
    try:
        spec = json.loads(data)
        kind, byte_fallback = spec["model"]["type"], spec["model"].get("byte_fallback")
        pieces = [piece for piece, _ in spec["model"]["vocab"]] if kind == "Unigram" else []
        added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{source}: expected the JSON of a tokenizer.json, got {error!r}.") from None
    if kind != "Unigram":
        raise TokenizerError(
            f"{source}: expected a Unigram model, got {kind}. A BPE saved from this vocabulary has no merges "
            "and cuts words into characters; use the tokenizer.json published with the checkpoint."
        )
    if not byte_fallback:
        raise TokenizerError(f"{source}: expected byte_fallback to be on, got off. Use the published tokenizer.json.")
    for token_id, (name, piece) in enumerate(zip(CONTROL_NAMES, pieces, strict=False)):
        if not name == piece == added.get(token_id):
            raise TokenizerError(
                f"{source}: expected id {token_id} to be {name}, got {piece!r} in the vocabulary and "
                f"{added.get(token_id)!r} as added token. This is not a tokenizer of the LLM-jp-4 family."
            )
    beyond = [token_id for token_id in added if not 0 <= token_id < len(pieces) + len(added)]
    if beyond:
        raise TokenizerError(
            f"{source}: expected added tokens with ids that follow the {len(pieces)} pieces without a gap, "
            f"got {beyond[0]}. Use the published tokenizer.json."
        )
    missing = sorted(set(BYTE_NAMES).difference(pieces))
    if missing:
        raise TokenizerError(f"{source}: expected 256 byte pieces, got none for {missing[0]}. Rebuild the vocabulary.")
    return spec
