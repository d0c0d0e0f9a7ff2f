"""The renderer against the published templates' goldens, and the parts no golden covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import released_tokenizer

from workbench.chat import Message, render, render_tokens
from workbench.errors import ChatError

DATE = "2026-04-03"
CALL = {"function": {"name": "get_weather", "arguments": {"city": "東京"}}}
WEATHER = {"function": {"name": "get_weather", "description": "Weather.", "parameters": {}}}
RENAMED = {"reasoning_effort": "effort", "model_identity": "identity", "conversation_start_date": "date"}
DIALECTS = ["1.0", "1.1", "2.0"]


def golden_arguments(case: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    arguments = dict(case["args"])
    return arguments.pop("messages"), {RENAMED.get(key, key): value for key, value in arguments.items()}


def turns(messages: list[dict[str, Any] | Message], **arguments: Any) -> str:
    """The rendering after the system message."""
    return render(messages, date=DATE, **arguments).split("<|end|>", 1)[1]


@pytest.mark.shared
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_golden_is_met_in_text_and_ids(shared_tokenizer_dir: Path, dialect: str) -> None:
    tokenizer = released_tokenizer(shared_tokenizer_dir)
    goldens = json.loads((shared_tokenizer_dir / "chat_goldens.json").read_text("utf-8"))
    assert len(goldens) == 12
    for name, case in goldens.items():
        messages, arguments = golden_arguments(case)
        golden = case[f"alpha_{dialect}"]
        text = render(messages, dialect=dialect, **arguments)
        assert text == golden["text"], name
        assert tokenizer.to_tokens(text, bos=False) == golden["ids"], name
        # the one golden whose text holds names of special tokens: there the template's ids are what must not happen
        literal = render_tokens(messages, tokenizer, dialect=dialect, **arguments)
        assert (literal == golden["ids"]) == (name != "special_like_user_text"), name
        assert tokenizer.to_string(literal) == golden["text"], name


def test_a_whole_rendering() -> None:
    text = render([{"role": "user", "content": "日本の首都は？"}], date=DATE)
    assert text == (
        "<|start|>system<|message|>You are LLM-jp-4, a large language model trained by LLM-jp.\n"
        "Knowledge cutoff: 2025-12\nCurrent date: 2026-04-03\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>user<|message|>日本の首都は？<|end|><|start|>assistant"
    )


def test_without_effort_the_line_is_left_out() -> None:
    text = render([Message("user", "Hi")], date=DATE, effort=None)
    assert f"Current date: {DATE}\n\n# Valid channels" in text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_first_system_message_becomes_the_developer_message(role: str) -> None:
    expected = "<|start|>developer<|message|># Instructions\n\n簡潔に。\n\n<|end|><|start|>user<|message|>Hi<|end|>"
    messages = [Message(role, "簡潔に。"), Message("user", "Hi")]
    assert turns(messages, add_generation_prompt=False) == expected
    assert "developer" not in turns([Message(role, ""), Message("user", "Hi")])


def test_thinking_shows_only_in_the_last_turn_without_prompt() -> None:
    messages = [Message("user", "?"), Message("assistant", "A", thinking="T")]
    final = "<|start|>assistant<|channel|>final<|message|>A"
    assert turns(messages) == f"<|start|>user<|message|>?<|end|>{final}<|end|><|start|>assistant"
    analysis = "<|start|>assistant<|channel|>analysis<|message|>T<|end|>"
    assert (
        turns(messages, add_generation_prompt=False) == f"<|start|>user<|message|>?<|end|>{analysis}{final}<|return|>"
    )


@pytest.mark.parametrize(
    ("dialect", "before_answer", "with_last_answer", "with_later_question"),
    [("1.0", True, False, False), ("1.1", True, True, False), ("2.0", False, False, False)],
)
def test_when_reasoning_before_a_call_is_dropped(
    dialect: str, before_answer: bool, with_last_answer: bool, with_later_question: bool
) -> None:
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "thinking": "WHY", "tool_calls": [CALL]},
        {"role": "tool", "content": "晴れ"},
        {"role": "assistant", "content": "晴れです"},
        {"role": "user", "content": "!"},
    ]
    shown = ["WHY" in turns(messages[:n], dialect=dialect, add_generation_prompt=False) for n in (3, 4, 5)]
    assert shown == [before_answer, with_last_answer, with_later_question]
    assert "WHY" in turns(messages[:2], dialect=dialect, add_generation_prompt=False)


def test_results_go_by_name_then_by_order() -> None:
    calls = [{"name": name, "arguments": "{}"} for name in ("first", "second")]
    results = [
        {"role": "tool", "content": 1},
        {"role": "tool", "content": 2},
        {"role": "tool", "content": 3, "name": "x"},
    ]
    text = turns([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}, *results])
    headers = [part.split("<|channel|>")[0] for part in text.split("<|start|>") if part.startswith("functions.")]
    assert headers == ["functions.first to=assistant", "functions.second to=assistant", "functions.x to=assistant"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_result_without_a_call_is_refused(dialect: str) -> None:
    with pytest.raises(ChatError, match="expected a tool call before it"):
        render([Message("user", "?"), Message("tool", "晴れ")], dialect=dialect)


def test_builtin_tools_stand_in_the_system_message() -> None:
    text = render([Message("user", "?")], builtin_tools=["python", "browser"])
    system = text.split("<|end|>")[0]
    assert system.index("# Tools\n\n## browser") < system.index("## python") < system.index("# Valid channels")


def test_explicit_messages_stand_as_they_are() -> None:
    messages = [
        Message("user", "?"),
        Message("assistant", "{}", channel="commentary", recipient="functions.f", constrain="json", end="call"),
        Message("functions.f", "晴れ", channel="commentary", recipient="assistant"),
        Message("assistant", "Let me", channel="analysis", end="truncated"),
    ]
    assert turns(messages, add_generation_prompt=False) == (
        "<|start|>user<|message|>?<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|> json<|message|>{}<|call|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>晴れ<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Let me"
    )


def test_tools_are_announced_in_both_messages() -> None:
    text = render([Message("user", "?")], tools=[WEATHER])
    assert "to the commentary channel: 'functions'.<|end|><|start|>developer<|message|># Tools\n\n## functions" in text
