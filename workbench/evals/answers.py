"""What of a continuation is the answer."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.chat import ParsedMessage, parse
from workbench.io.tokens import Tokenizer


def final_message(tokenizer: Tokenizer, prompt: Sequence[int], written: Sequence[int]) -> ParsedMessage | None:
    """The assistant's message in the final channel that the sequence ends with, or None."""
    last = parse([*prompt, *written], tokenizer)[-1]
    return last if last.role == "assistant" and last.channel == "final" else None


def final_text(tokenizer: Tokenizer, prompt: Sequence[int], written: Sequence[int]) -> str:
    """What was written of the final message, without what the prompt had begun of it; empty if there is none."""
    message = final_message(tokenizer, prompt, written)
    if message is None:
        return ""
    span = message.content_span
    ids = [*prompt, *written][max(span.start, len(prompt)) : span.stop]
    return tokenizer.to_string(ids, skip_special=True).lstrip()


def whole_text(tokenizer: Tokenizer, written: Sequence[int]) -> str:
    """Everything written, special tokens left out before decoding, as transformers does."""
    return tokenizer.to_string([token for token in written if not tokenizer.is_special(token)])


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings."""
    for stop in until:
        text = text.split(stop)[0]
    return text
