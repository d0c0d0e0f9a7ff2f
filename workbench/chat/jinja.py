"""Chat templates that checkpoints bring along, run in Jinja2's sandbox with the settings of Hugging Face's loaders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workbench.chat.messages import Message, Options
from workbench.errors import ChatError


def run_template(template: str, conversation: Sequence[Message], options: Options) -> str:
    """Render through a template text; raises ChatError when the template is broken or refuses the conversation."""
    if any(message.is_explicit for message in conversation):
        raise ChatError(
            "messages: expected none with an explicit channel, got one. A template decides on headers itself; "
            "render without `template`."
        )
    try:
        return compile_template(template).render(_variables(conversation, options))
    except Exception as error:  # a template is foreign code and may fail in any way
        raise ChatError(f"chat template: expected to render this conversation, got: {error}") from error


def _variables(conversation: Sequence[Message], options: Options) -> dict[str, Any]:
    """Only what was given, so that the template's own defaults hold for the rest."""
    given = {
        "reasoning_effort": options.effort,
        "model_identity": options.identity,
        "knowledge_cutoff": options.knowledge_cutoff,
        "tools": options.tools,
        "builtin_tools": options.builtin_tools,
    }
    return {key: value for key, value in given.items() if value is not None} | {
        "messages": [message.to_dict() for message in conversation],
        "conversation_start_date": options.day.isoformat(),
        "strftime_now": options.day.strftime,
        "add_generation_prompt": options.add_generation_prompt,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
    }


@lru_cache(maxsize=32)
def compile_template(template: str) -> jinja2.Template:
    """The template inside the sandbox; raises jinja2.TemplateError for a text that is none."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja2's own filter escapes <, > and & for web pages, which would change what the model reads.
    # NaN and infinity are no JSON: refused, as where the built-in format writes a call.
    return json.dumps(value, ensure_ascii=ensure_ascii, **{"allow_nan": False, **options})


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
