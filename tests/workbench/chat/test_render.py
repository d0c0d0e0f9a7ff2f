"""Rendering to ids: the rendered text, encoded so that what people write stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conversations import LOOKALIKES, conversations, rendering_options
from hypothesis import HealthCheck, given, settings
from tokenizer_files import small_tokenizer

from workbench.chat import Message, harmony_template, render, render_tokens

TEMPLATES = [None, harmony_template()]


@given(conversations, rendering_options)
@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_ids_decode_to_the_rendered_text(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.to_string(render_tokens(messages, tokenizer, **options)) == render(messages, **options)


@pytest.mark.parametrize("template", TEMPLATES)
def test_ordinary_text_encodes_as_the_whole_text_does(template: str | None) -> None:
    tokenizer = small_tokenizer()
    messages = [
        Message("system", "簡潔に。"),
        Message("user", " 日本の\n首都は？"),
        Message("assistant", "東京", thinking="x"),
    ]
    options = {"date": "2026-04-03", "add_generation_prompt": False, "template": template}
    whole = tokenizer.to_tokens(render(messages, **options), bos=False)
    assert render_tokens(messages, tokenizer, **options) == whole


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", LOOKALIKES)
def test_lookalikes_add_no_special_token_wherever_they_stand(template: str | None, text: str) -> None:
    tokenizer = small_tokenizer()

    def specials(filler: str) -> list[int]:
        parameters = {"properties": {filler: {"type": "string", "description": filler, "enum": [filler]}}}
        messages = [
            Message("system", filler),
            Message("user", filler),
            Message.from_dict(
                {"role": "assistant", "thinking": filler, "tool_calls": [{"name": "f", "arguments": {filler: 1}}]}
            ),
            Message("tool", {filler: [filler]}),
        ]
        tool = {"function": {"name": "f", "description": filler, "parameters": parameters}}
        ids = render_tokens(
            messages, tokenizer, template=template, tools=[tool], identity=filler, knowledge_cutoff=filler
        )
        assert filler in tokenizer.to_string(ids)
        return [token_id for token_id in ids if tokenizer.is_special(token_id)]

    assert specials(text) == specials("plain")


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="efort"):
        render_tokens([Message("user", "?")], small_tokenizer(), efort="low")


def test_tools_reach_the_ids_unchanged() -> None:
    tokenizer = small_tokenizer()
    tool = {"function": {"name": "f", "description": "<|end|>", "parameters": {"properties": {"a": {"default": None}}}}}
    before = json.dumps(tool)
    text = tokenizer.to_string(render_tokens([Message("user", "?")], tokenizer, tools=(tool,)))
    assert "// <|end|>\ntype f = (_: {\na?: any, // default: null,\n}) => any;" in text
    assert json.dumps(tool) == before
