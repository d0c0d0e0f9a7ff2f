"""Conversation to text and to token ids."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.chat.harmony import write_harmony
from workbench.chat.jinja import run_template
from workbench.chat.messages import Message, Options, map_message, map_strings, read_conversation
from workbench.io.tokens import Tokenizer

# Free text goes through a rendering with every "<|" broken by a mark, so that the special tokens found in the result
# are the rendering's own.  The mark's first character, should a text hold it, is marked as well: undoing is exact.
_ESCAPE = "\ue000"
_MARKED_ESCAPE, _MARK = _ESCAPE + "0", _ESCAPE + "1"


def render(
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    effort: str | None = "medium",
    identity: str | None = None,
    knowledge_cutoff: str | None = None,
    date: str | datetime.date | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    builtin_tools: Sequence[str] | None = None,
    add_generation_prompt: bool = True,
    dialect: str = "1.1",
    template: str | None = None,
) -> str:
    """The conversation as the text that the model reads; no BOS, no line breaks between messages.

    A first system or developer message becomes the developer message; `thinking` shows only in a last assistant
    message without generation prompt, or before a tool call that is not answered yet.

    effort: "low", "medium" or "high"; None leaves the line out, as for the instruct model, which has none.
    identity, knowledge_cutoff: first lines of the system message; None for the published ones.
    date: "YYYY-MM-DD"; None for today. Fix it wherever a run must be repeatable.
    tools: function schemas in the form of the OpenAI chat API; builtin_tools: some of "browser", "python".
    dialect: "1.0" (4.0 models), "1.1" (4.1 models) or "2.0"; they differ only around tools.
    template: text of a chat_template.jinja to use instead; then None for effort means the template's own default.

    Raises ChatError for messages or arguments that do not fit.  Text that looks like a special token stands in the
    result as it is; use `render_tokens` when it must stay text.
    """
    options = Options(
        effort=effort,
        identity=identity,
        knowledge_cutoff=knowledge_cutoff,
        date=date,
        tools=tools,
        builtin_tools=builtin_tools,
        add_generation_prompt=add_generation_prompt,
        dialect=dialect,
    )
    return _write(read_conversation(messages, options), options, template)


def render_tokens(
    messages: Sequence[Message | Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    **arguments: Any,
) -> list[int]:
    """The conversation as token ids, with the arguments of `render`.

    Equal to encoding the rendered text, except that text inside messages, tools and arguments never becomes a
    special token or a byte token, whatever it looks like.
    """
    options = Options(**arguments)
    conversation = [map_message(message, _escape) for message in read_conversation(messages, options)]
    escaped = replace(
        options,
        identity=map_strings(options.identity, _escape),
        knowledge_cutoff=map_strings(options.knowledge_cutoff, _escape),
        tools=map_strings(options.tools, _escape),
    )
    parts = tokenizer.split_specials(_write(conversation, escaped, template))
    ids: list[int] = []
    for position, part in enumerate(parts):
        is_special = position % 2 == 1
        ids += [tokenizer.special_ids[part]] if is_special else tokenizer.encode_literal(_unescape(part))
    return ids


def _write(conversation: Sequence[Message], options: Options, template: str | None) -> str:
    return write_harmony(conversation, options) if template is None else run_template(template, conversation, options)


def _escape(text: str) -> str:
    return text.replace(_ESCAPE, _MARKED_ESCAPE).replace("<|", f"<{_MARK}|")


def _unescape(text: str) -> str:
    return text.replace(_MARK, "").replace(_MARKED_ESCAPE, _ESCAPE)
