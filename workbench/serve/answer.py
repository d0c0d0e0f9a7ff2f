"""From the ids of an answer to what clients are shown: plain text, or the channels of a Harmony answer.

Both are writers of a `Choice`: `push` gives what became certain with a token (whole characters, no part of a stop
string), `finish` the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.chat import ParsedMessage, parse
from workbench.io.tokens import StreamDecoder, Tokenizer
from workbench.models.stopping import TextWatch


class Text:
    """A raw continuation: special tokens by name, but not the one of `stop_ids` that ends it.

    `ids` is what it continues; after an `echo` of them it may begin with the rest of their last character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        stop_strings: Sequence[str],
        stop_ids: Sequence[int] = (),
        echo: bool = False,
    ) -> None:
        decoder = tokenizer.stream(text_start=echo or not ids or tokenizer.is_special(ids[-1]))
        for token_id in ids if echo else ():
            decoder.push(token_id)
        self._watch, self._stop_ids = TextWatch(decoder, stop_strings), tuple(stop_ids)

    @property
    def stopped(self) -> bool:
        return self._watch.stopped

    def push(self, token_id: int) -> list[str]:
        if token_id in self._stop_ids:
            return []
        return [text] if (text := self._watch.push(token_id)) else []

    def finish(self) -> list[str]:
        return [text] if (text := self._watch.finish()) else []


def echoed(tokenizer: Tokenizer, ids: Sequence[int], hidden: int) -> str:
    """The text of a prompt but for its first `hidden` tokens, up to its last whole character; `Text` has the rest."""
    decoder = tokenizer.stream(text_start=True)
    return "".join([decoder.push(token_id) for token_id in ids][hidden:])


@dataclass(frozen=True)
class Delta:
    """A piece of a chat answer: `kind` is "content", "reasoning" or "tool"; a tool call begins with its `name`."""

    kind: str
    text: str = ""
    call: int = 0  # which tool call
    name: str | None = None


class Channels:
    """A chat answer, after a prompt that ends with <|start|>assistant.

    The analysis channel is reasoning; messages to a recipient are tool calls, whose arguments are the message; final,
    commentary to nobody, and messages without a channel are content. What the model writes in another role's name is
    not shown. Stop strings are looked for in the content. `n_reasoning` counts the tokens of the reasoning itself,
    `kinds` tells of each token written where it was shown, None for headers and closing tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._openings = (tokenizer.start_id, tokenizer.channel_id, tokenizer.constrain_id, tokenizer.message_id)
        self._closings = (tokenizer.end_id, tokenizer.eos_id, tokenizer.call_id)
        self._header: list[int] | None = tokenizer.to_tokens("<|start|>assistant", bos=False)
        self._kind: str | None = None  # of the message that is open
        self._watches = {
            kind: TextWatch(StreamDecoder(tokenizer, skip_special=True), stops)
            for kind, stops in (("content", stop_strings), ("reasoning", ()), ("tool", ()))
        }
        self.n_calls = self.n_reasoning = 0
        self.kinds: list[str | None] = []

    @property
    def stopped(self) -> bool:
        return self._watches["content"].stopped

    def push(self, token_id: int) -> list[Delta]:
        self.kinds.append(None)
        if token_id in self._openings or token_id in self._closings:
            return self._bracket(token_id)
        if self._header is not None:
            self._header.append(token_id)
            return []
        if self._kind is None:
            return []
        self.kinds[-1] = self._kind
        self.n_reasoning += self._kind == "reasoning"
        return self._show(self._kind, token_id)

    def finish(self) -> list[Delta]:
        rest = {kind: watch.finish() for kind, watch in self._watches.items()}
        return [Delta(kind, text, max(self.n_calls - 1, 0)) for kind, text in rest.items() if text]

    def _bracket(self, token_id: int) -> list[Delta]:
        """A token of a header, or one that closes a message."""
        deltas = [] if self._kind is None else self._show(self._kind, token_id)  # ends a character that was not whole
        if token_id in self._closings:
            self._header, self._kind = None, None
        elif self._kind is not None or self._header is None or token_id == self._tokenizer.start_id:
            self._header, self._kind = [token_id], None
        else:
            self._header.append(token_id)
        if token_id == self._tokenizer.message_id:
            deltas += self._open(parse(self._header or [], self._tokenizer)[-1])
            self._header = None
        return deltas

    def _open(self, message: ParsedMessage) -> list[Delta]:
        if message.role not in ("assistant", None):
            self._kind = None
        elif message.recipient not in (None, "user", "assistant"):
            self._kind = "tool"
            self.n_calls += 1
            return [Delta("tool", "", self.n_calls - 1, str(message.recipient).removeprefix("functions."))]
        else:
            self._kind = "reasoning" if message.channel == "analysis" else "content"
        return []

    def _show(self, kind: str, token_id: int) -> list[Delta]:
        text = self._watches[kind].push(token_id)
        return [Delta(kind, text, max(self.n_calls - 1, 0))] if text else []


def join(deltas: Sequence[Delta]) -> dict[str, Any]:
    """A whole chat message: content, reasoning_content, tool_calls (name, arguments)."""
    texts = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("content", "reasoning")}
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        if delta.kind == "tool":
            call = calls.setdefault(delta.call, {"name": delta.name or "", "arguments": ""})
            call["arguments"] += delta.text
    return {**texts, "calls": [calls[number] for number in sorted(calls)]}
