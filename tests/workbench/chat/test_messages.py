"""What a conversation may hold, and the one clear error for what it may not."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from workbench.chat import Message, ToolCall, render
from workbench.chat.messages import Options
from workbench.errors import ChatError

USER = {"role": "user", "content": "Hi"}


def test_dicts_and_messages_are_the_same() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = Message("assistant", thinking="T", tool_calls=(ToolCall("f", "{}"),))
    assert Message.from_dict({"role": "assistant", "content": None, "thinking": "T", "tool_calls": [call]}) == message
    assert Message.from_dict(message.to_dict()) == message
    assert Message.from_dict({"role": "tool", "content": [1], "tool_call_id": "1"}) == Message("tool", [1])
    assert Message.from_dict({"role": "tool", "content": None}) == Message("tool", None)
    typed = {"name": "f", "arguments": {}, "content_type": "<|constrain|> json"}
    assert ToolCall.from_dict(ToolCall.from_dict(typed).to_dict()) == ToolCall("f", {}, "<|constrain|> json")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Hi", "expected a list of messages"),
        ({"content": "Hi"}, "expected role and some of"),
        ({**USER, "reasoning_content": "T"}, "Reasoning belongs in 'thinking'"),
        ({"role": "user"}, "expected content, got none"),
        ({"role": "user", "content": [{"type": "text"}]}, "user content: expected text, got list"),
        ({"role": "wizard", "content": "Hi"}, "message role: expected one of"),
        ({"role": "us er", "content": "Hi"}, "message role: expected one word"),
        ({"role": "a<|end|>", "content": "Hi", "channel": "final"}, "message role: expected one word"),
        ({**USER, "thinking": "T"}, "expected no thinking or tool_calls"),
        ({**USER, "end": "truncated"}, "message end: expected 'end' without a channel"),
        ({"role": "user", "content": "Hi", "channel": "final", "end": "bogus"}, "message end: expected one of"),
        ({"role": "assistant", "content": "", "thinking": 5}, "thinking: expected text, got int"),
        ({"role": "assistant", "tool_calls": 5}, "tool_calls: expected a list of tool calls, got 5"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "content_type": 5}]}, "content_type: expected one word"),
        ({"role": "assistant", "content": "A", "channel": "final", "thinking": "T"}, "a channel or thinking"),
        ({"role": "assistant", "content": "A", "thinking": "T", "tool_calls": [{"name": "f"}]}, "content or thinking"),
        ({"role": "assistant", "content": "<|channel|>final<|message|>A"}, "got channel tags"),
        ({"role": "assistant", "content": "", "thinking": "<|channel|>analysis<|message|>"}, "got channel tags"),
        ({"role": "assistant", "tool_calls": ["f"]}, "tool call: expected an object"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "tool call: expected an object"),
        ({"role": "assistant", "tool_calls": [{"name": "f g"}]}, "tool call name: expected one word"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "content_type": "<|end|>"}]}, "content_type: expected"),
    ],
)
def test_messages_that_do_not_fit_are_refused(message: Any, expected: str) -> None:
    with pytest.raises(ChatError, match=expected):
        render([message])


def test_tool_calls_of_a_message_are_values() -> None:
    with pytest.raises(ChatError, match="expected a list of tool calls"):
        Message("assistant", tool_calls=({"name": "f"},))  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["bogus", "mask", "message", "start", "outside", "", None, ["end"]])
def test_a_message_ends_with_a_closing_token_or_none(end: Any) -> None:
    assert render([Message("user", "Hi", channel="final", end="call")]).endswith("Hi<|call|><|start|>assistant")
    with pytest.raises(ChatError, match="message end: expected one of"):
        Message("user", "Hi", channel="final", end=end)


@pytest.mark.parametrize("messages", [None, 5, "Hi", USER, Message("user", "Hi")])
def test_a_conversation_is_a_list(messages: Any) -> None:
    with pytest.raises(ChatError, match="messages: expected a list of messages, got"):
        render(messages)


def test_conversations_a_template_would_cut_are_refused() -> None:
    with pytest.raises(ChatError, match="expected at least one"):
        render([])
    with pytest.raises(ChatError, match=r"messages\[1\]: expected system messages only in first place"):
        render([USER, {"role": "system", "content": "later"}])
    begun = Message("assistant", "Let me", channel="analysis", end="truncated")
    for messages, prompt in [([USER, begun], True), ([begun, USER], False)]:
        with pytest.raises(ChatError, match="expected a truncated message to end the rendering"):
            render(messages, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"effort": "max"}, "effort: expected one of"),
        ({"dialect": "3.0"}, "dialect: expected one of"),
        ({"builtin_tools": ["calculator"]}, "builtin_tools: expected browser or python, got 'calculator'"),
        ({"builtin_tools": 5}, "builtin_tools: expected a list of names, got 5"),
        ({"tools": 5}, "tools: expected a list of tools, got 5"),
        ({"identity": 5}, "identity: expected text, got 5"),
        ({"knowledge_cutoff": 2025}, "knowledge_cutoff: expected text, got 2025"),
        ({"dialect": ["1.1"]}, "dialect: expected one of"),
        ({"date": "3 April"}, "date: expected YYYY-MM-DD, got '3 April'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ChatError, match=expected):
        render([USER], **options)


def test_the_date_is_today_unless_given() -> None:
    day = datetime.date(2026, 4, 3)
    assert Options(date=day).day == Options(date="2026-04-03").day == day
    before = datetime.date.today()
    assert before <= Options().day <= datetime.date.today()
