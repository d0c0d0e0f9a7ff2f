"""Foreign templates: Hugging Face's settings, a sandbox around them, one clear error when they fail."""

from __future__ import annotations

import pytest

from workbench.chat import Message, ToolCall, render
from workbench.errors import ChatError

USER = [Message("user", "<日本> & 'x'")]


def test_blocks_leave_no_blank_lines_and_json_keeps_its_characters() -> None:
    template = "{% for m in messages %}\n    {% if true %}\n{{ m.content | tojson }}\n    {% endif %}\n{% endfor %}"
    assert render(USER, template=template) == "\"<日本> & 'x'\"\n"


def test_tojson_takes_the_arguments_of_json_dumps() -> None:
    assert render(USER, template="{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True) }}") == (
        r'{"a": 1, "b": "\u00e9"}'
    )


@pytest.mark.parametrize("template", [None, "{{ messages[1].tool_calls[0].function.arguments | tojson }}"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_refused(template: str | None, value: float) -> None:
    call = Message("assistant", tool_calls=(ToolCall("f", {"x": value}),))
    with pytest.raises(ChatError, match="Out of range float values are not JSON compliant"):
        render([*USER, call], template=template)


def test_the_date_reaches_both_ways_of_asking_for_it() -> None:
    template = "{{ strftime_now('%d %m %Y') }} {{ conversation_start_date }}"
    assert render(USER, template=template, date="2026-04-03") == "03 04 2026 2026-04-03"


def test_only_given_arguments_are_defined() -> None:
    template = "{{ model_identity is defined }} {{ tools is defined }} {{ reasoning_effort }} {{ eos_token }}"
    assert render(USER, template=template) == "False False medium <|return|>"
    assert render(USER, template=template, identity="X", effort=None) == "True False  <|return|>"


def test_loop_controls_work() -> None:
    assert (
        render(USER, template="{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[5].content }}", "has no element 5"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_what_a_template_must_not_do_is_one_error(template: str, expected: str) -> None:
    with pytest.raises(ChatError, match=rf"chat template: .*({expected})"):
        render(USER, template=template)


def test_explicit_channels_and_templates_exclude_each_other() -> None:
    with pytest.raises(ChatError, match="expected none with an explicit channel"):
        render([Message("assistant", "A", channel="final")], template="{{ messages }}")
