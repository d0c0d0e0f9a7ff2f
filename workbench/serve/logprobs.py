"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.io.tokens import BYTE_NAMES, StreamDecoder, Tokenizer
from workbench.serve.choice import Logprob


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's own text, different for every token: the name of a byte or special token, else its piece."""
    data = tokenizer.piece_bytes(token_id)
    return BYTE_NAMES[data[0]] if tokenizer.is_byte(token_id) else data.decode()


def chat_logprob(tokenizer: Tokenizer, one: Logprob) -> dict[str, Any]:
    def shown(token_id: int, value: float) -> dict[str, Any]:
        data = None if tokenizer.is_special(token_id) else list(tokenizer.piece_bytes(token_id))
        return {"token": token_text(tokenizer, token_id), "logprob": value, "bytes": data}

    return {**shown(one.token_id, one.logprob), "top_logprobs": [shown(*other) for other in one.top]}


def text_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[Logprob | None], offsets: Sequence[int]
) -> dict[str, Any]:
    """Of a completion: `found` is None at a token that nothing comes before."""
    return {
        "tokens": [token_text(tokenizer, token_id) for token_id in ids],
        "token_logprobs": [None if one is None else one.logprob for one in found],
        "top_logprobs": [None if one is None else _alternatives(tokenizer, one) for one in found],
        "text_offset": list(offsets),
    }


def _alternatives(tokenizer: Tokenizer, one: Logprob) -> dict[str, float]:
    return {token_text(tokenizer, token_id): value for token_id, value in one.top}


class Offsets:
    """Where each token's text begins in what a client is shown, `start` characters in; `hidden` tokens show nothing."""

    def __init__(self, tokenizer: Tokenizer, text_start: bool, start: int = 0, hidden: int = 0) -> None:
        self._decoder = StreamDecoder(tokenizer, text_start=text_start)
        self._n_shown, self._hidden = start, hidden

    def next(self, token_id: int) -> int:
        offset = self._n_shown
        text = self._decoder.push(token_id)
        if self._hidden:
            self._hidden -= 1
        else:
            self._n_shown += len(text)
        return offset
