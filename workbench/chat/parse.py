"""Token ids to messages: what was said, by whom, in which channel, at exactly which positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from workbench.axes import CHANNELS
from workbench.io.tokens import Tokenizer

EndReason = Literal["end", "return", "call", "truncated", "outside"]


@dataclass(frozen=True)
class ParsedMessage:
    """One message found in a token sequence, or a run of tokens outside any message.

    `span` is the whole message; `header` runs from `<|start|>` to `<|message|>` and `content_span` from there to the
    closing token, which is the last of `span` unless `end` is "truncated": the sequence stopped, or the next message
    began.  A message whose header lacks `<|start|>` (a continuation of a generation prompt) has role None.
    `constrain` is the content type ("json").  A run outside has end "outside", an empty header, and its text without
    special tokens as content.  Spans are ranges of positions; those of a whole sequence follow each other gaplessly.
    """

    role: str | None
    channel: str | None
    recipient: str | None
    constrain: str | None
    content: str
    end: EndReason
    span: range
    header: range
    content_span: range

    @property
    def segment(self) -> str:
        """The label of its content tokens, one of workbench.axes.SEGMENTS."""
        if self.role in ("system", "developer", "user"):
            return self.role
        if self.role in ("assistant", None) and self.channel in CHANNELS:
            return str(self.channel)
        is_tool = self.role == "tool" or self.recipient == "assistant" or (self.role or "").startswith("functions.")
        return "tool" if is_tool else "plain"


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> list[ParsedMessage]:
    """Every message in the ids, in order, with what lies between them; spans cover all positions exactly once.

    Any ids of the vocabulary parse: broken headers give messages with None where something is missing, and a header
    token inside content begins a new message.  Raises TokenizerError only for ids outside the vocabulary.
    """
    checked = tokenizer.check_ids(ids)
    return [_read(checked, span, tokenizer) for span in _message_spans(checked, tokenizer)]


def label_tokens(ids: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """The segment of every token, one of workbench.axes.SEGMENTS.

    Headers and special tokens are "control", a BOS outside messages is "bos", text outside messages or by an unknown
    role is "plain"; content carries its role or, for the assistant, its channel.  Raises TokenizerError as `parse`.
    """
    checked = tokenizer.check_ids(ids)
    labels: list[str] = []
    for message in parse(checked, tokenizer):
        for position in message.span:
            token_id = checked[position]
            if token_id == tokenizer.bos_id and message.end == "outside":
                labels.append("bos")
            elif tokenizer.is_special(token_id) or position not in message.content_span:
                labels.append("control")
            else:
                labels.append(message.segment)
    return labels


def _message_spans(ids: list[int], tokenizer: Tokenizer) -> Iterator[range]:
    """Cut the sequence: before a header that begins, after a token that closes."""
    opening, closing = _opening_ids(tokenizer), _end_reasons(tokenizer)
    begin, state = 0, "outside"
    for position, token_id in enumerate(ids):
        if token_id in opening:
            begins = token_id == tokenizer.start_id or state != "header"
            if begins and position > begin:
                yield range(begin, position)
                begin = position
            state = "content" if token_id == tokenizer.message_id else "header"
        elif token_id in closing and state != "outside":
            yield range(begin, position + 1)
            begin, state = position + 1, "outside"
    if begin < len(ids):
        yield range(begin, len(ids))


def _read(ids: list[int], span: range, tokenizer: Tokenizer) -> ParsedMessage:
    if ids[span.start] not in _opening_ids(tokenizer):
        text = tokenizer.to_string(ids[span.start : span.stop], skip_special=True)
        return ParsedMessage(None, None, None, None, text, "outside", span, range(span.start, span.start), span)
    end = _end_reasons(tokenizer).get(ids[span.stop - 1], "truncated")
    stop = span.stop if end == "truncated" else span.stop - 1
    split = next((position + 1 for position in span if ids[position] == tokenizer.message_id), stop)
    role, channel, recipient, constrain = _read_header(ids[span.start : split], tokenizer)
    content = tokenizer.to_string(ids[split:stop])
    header, content_span = range(span.start, split), range(split, stop)
    return ParsedMessage(role, channel, recipient, constrain, content, end, span, header, content_span)


def _read_header(ids: list[int], tokenizer: Tokenizer) -> tuple[str | None, str | None, str | None, str | None]:
    """Role, channel, recipient and content type; the recipient may stand after the role or after the channel."""
    sections: dict[int, list[int]] = {}
    current: list[int] = []
    for token_id in ids:
        if token_id in _opening_ids(tokenizer):
            current = sections[token_id] = []
        else:
            current.append(token_id)
    role_words, channel_words, constrain_words = (
        tokenizer.to_string(sections.get(token_id, []), skip_special=True).split()
        for token_id in (tokenizer.start_id, tokenizer.channel_id, tokenizer.constrain_id)
    )
    recipients = [word[3:] for word in role_words + channel_words if word.startswith("to=") and word != "to="]
    role_words = [word for word in role_words if not word.startswith("to=")]
    channel_words = [word for word in channel_words if not word.startswith("to=")]
    # The 4.0 models write the content type as a second word of the channel.
    constrain = " ".join(constrain_words or channel_words[1:])
    return (
        role_words[0] if role_words else None,
        channel_words[0] if channel_words else None,
        recipients[0] if recipients else None,
        constrain or None,
    )


def _opening_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tokenizer.start_id, tokenizer.channel_id, tokenizer.constrain_id, tokenizer.message_id


def _end_reasons(tokenizer: Tokenizer) -> dict[int, EndReason]:
    return {tokenizer.end_id: "end", tokenizer.eos_id: "return", tokenizer.call_id: "call"}
