"""Our own template text against the renderer."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from conversations import conversations, rendering_options
from hypothesis import HealthCheck, given, settings
from tokenizer_files import small_tokenizer

from workbench.chat import harmony_template, render, render_tokens
from workbench.chat.jinja import compile_template
from workbench.errors import ChatError

TEMPLATE = harmony_template()


def outcome(messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return render(messages, **options)
    except ChatError:
        return "refused"


@given(conversations, rendering_options)
@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_the_template_renders_as_the_renderer_does(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    assert render(messages, template=TEMPLATE, **options) == render(messages, **options)
    tokenizer = small_tokenizer()
    assert render_tokens(messages, tokenizer, template=TEMPLATE, **options) == render_tokens(
        messages, tokenizer, **options
    )


def test_the_template_refuses_a_result_without_a_call() -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "tool", "content": "x"}]
    assert outcome(messages, template=TEMPLATE) == outcome(messages) == "refused"


@pytest.mark.slow
def test_transformers_renders_the_template_alike() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tool = {"type": "function", "function": {"name": "f", "description": "<x> & 日本", "parameters": {}}}
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    messages = [
        {"role": "developer", "content": "簡潔に。"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "thinking": "T", "tool_calls": [call]},
        {"role": "tool", "content": "'晴れ' & <雨>"},
        {"role": "assistant", "content": "A", "thinking": "U"},
    ]
    for prompt in (True, False):
        (theirs,), _ = utils.render_jinja_template(
            conversations=[messages],
            tools=[tool],
            chat_template=TEMPLATE,
            add_generation_prompt=prompt,
            reasoning_effort="high",
            conversation_start_date="2026-04-03",
        )
        ours = render(messages, tools=[tool], effort="high", date="2026-04-03", add_generation_prompt=prompt)
        assert theirs == ours


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "assistant", "content": "<|channel|>final<|message|>"}, "channel tags"),
        ({"role": "assistant", "content": "", "thinking": "<|channel|>analysis<|message|>"}, "channel tags"),
        ({"role": "system", "content": "later"}, "got system"),
    ],
)
def test_the_template_alone_refuses_what_the_renderer_does(turn: dict[str, Any], expected: str) -> None:
    messages = [{"role": "user", "content": "?"}, turn]
    with pytest.raises(jinja2.TemplateError, match=expected):
        compile_template(TEMPLATE).render(messages=messages, conversation_start_date="2026-04-03")
