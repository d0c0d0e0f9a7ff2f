"""The chat format as a Jinja2 template, for checkpoints of our own: what `render` does without a template."""

import json

from workbench.chat.messages import IDENTITY, KNOWLEDGE_CUTOFF
from workbench.chat.tool_text import BROWSER, PYTHON

_TEMPLATE = r"""{#- chat_format=llm-jp-harmony-v1 -#}
{#-
  Besides messages, tools and add_generation_prompt: reasoning_effort ("low", "medium", "high"), model_identity,
  knowledge_cutoff, conversation_start_date ("YYYY-MM-DD"), builtin_tools (some of "browser", "python").
-#}

{%- macro message(header, text, end="end") -%}
    {{ "<|start|>" ~ header ~ "<|message|>" ~ text ~ "<|" ~ end ~ "|>" }}
{%- endmacro -%}

{#- Types of tool parameters -#}
{%- macro item_type(items) -%}
    {%- if items.type == "string" or items.type == "boolean" -%}
        {{ items.type ~ "[]" }}
    {%- elif items.type == "number" or items.type == "integer" -%}
        {{ "number[]" }}
    {%- else -%}
        {%- set inner = type_text(items) -%}
        {{ "any[]" if inner == "object | object" or inner|length > 50 else inner ~ "[]" }}
    {%- endif -%}
{%- endmacro -%}

{%- macro union_type(variants) -%}
    {%- for variant in variants -%}
        {{ type_text(variant) }}
        {%- if variant.description -%}{{ "// " ~ variant.description }}{%- endif -%}
        {%- if variant.default is defined -%}{{ " " * 20 ~ "// default: " ~ variant.default|tojson }}{%- endif -%}
        {{ "" if loop.last else " | \n" }}
    {%- endfor -%}
{%- endmacro -%}

{%- macro object_type(spec) -%}
    {{ "{\n" }}
    {%- for name, entry in spec.properties.items() -%}
        {{ name ~ ("" if name in (spec.required or []) else "?") ~ ": \n" ~ " " * 16 ~ type_text(entry) }}
        {{- "" if loop.last else ", " }}
    {%- endfor -%}
    {{ "}" }}
{%- endmacro -%}

{%- macro type_text(spec) -%}
    {%- set kind = spec.type -%}
    {%- if kind == "array" -%}
        {{ (item_type(spec["items"]) if spec["items"] else "any[]") ~ (" | null" if spec.nullable else "") }}
    {%- elif kind and kind is sequence and kind is not string -%}
        {{ kind|join(" | ") }}
    {%- elif spec.oneOf -%}
        {{ union_type(spec.oneOf) }}
    {%- elif kind == "string" and spec.enum -%}
        {{ '"' ~ spec.enum|join('" | "') ~ '"' }}
    {%- elif kind == "string" -%}
        {{ "string | null" if spec.nullable else "string" }}
    {%- elif kind == "object" -%}
        {{ object_type(spec) if spec.properties else "object" }}
    {%- elif kind == "number" or kind == "integer" -%}
        {{ "number" }}
    {%- else -%}
        {{ "boolean" if kind == "boolean" else "any" }}
    {%- endif -%}
{%- endmacro -%}

{%- macro signature(tool) -%}
    {{ "// " ~ tool.description ~ "\ntype " ~ tool.name ~ " = " }}
    {%- if tool.parameters and tool.parameters.properties -%}
        {{ "(_: {\n" }}
        {%- for name, spec in tool.parameters.properties.items() -%}
            {{ "// " ~ spec.description ~ "\n" if spec.description else "" }}
            {{- name ~ ("" if name in (tool.parameters.required or []) else "?") ~ ": " ~ type_text(spec) }}
            {%- if spec.default is defined -%}
                {{ ("" if spec.oneOf and not spec.enum else ", ") ~ "// default: " ~ spec.default|tojson }}
            {%- endif -%}
            {{ ",\n" }}
        {%- endfor -%}
        {{ "}) => any;\n\n" }}
    {%- else -%}
        {{ "() => any;\n\n" }}
    {%- endif -%}
{%- endmacro -%}

{#- System message -#}
{%- macro system_text() -%}
    {{ (model_identity if model_identity is defined else @identity@) ~ "\n" }}
    {{- "Knowledge cutoff: " ~ (knowledge_cutoff if knowledge_cutoff is defined else @cutoff@) ~ "\n" }}
    {{- "Current date: " }}
    {{- conversation_start_date if conversation_start_date is defined else strftime_now("%Y-%m-%d") }}
    {{- "\n\nReasoning: " ~ (reasoning_effort if reasoning_effort is defined else "medium") ~ "\n\n" }}
    {%- if builtin_tools -%}
        {{ "# Tools\n\n" }}
        {{- @browser@ if "browser" in builtin_tools else "" }}
        {{- @python@ if "python" in builtin_tools else "" }}
    {%- endif -%}
    {{ "# Valid channels: analysis, commentary, final. Channel must be included for every message." }}
    {{- "\nCalls to these tools must go to the commentary channel: 'functions'." if tools else "" }}
{%- endmacro -%}

{#- Developer message: what the caller wrote as its first system or developer message, and the tools -#}
{%- macro developer_text(instructions) -%}
    {{ "# Instructions\n\n" ~ instructions ~ "\n\n" if instructions else "" }}
    {%- if tools -%}
        {{ "# Tools\n\n## functions\n\nnamespace functions {\n\n" }}
        {%- for tool in tools -%}{{ signature(tool.function) }}{%- endfor -%}
        {{ "} // namespace functions" }}
    {%- endif -%}
{%- endmacro -%}

{{- message("system", system_text()) }}
{%- set instructions, turns = "", messages -%}
{%- if messages[0].role in ["system", "developer"] -%}
    {%- set instructions, turns = messages[0].content, messages[1:] -%}
{%- endif -%}
{%- if instructions or tools -%}
    {{ message("developer", developer_text(instructions)) }}
{%- endif -%}

{%- set calls = namespace(names=[], seen=0, last=none) -%}
{%- for turn in turns -%}
    {%- set ends_here = loop.last and not add_generation_prompt -%}
    {%- for text in [turn.content, turn.thinking] if turn.role == "assistant" and text -%}
        {%- if "<|channel|>analysis<|message|>" in text or "<|channel|>final<|message|>" in text -%}
            {{ raise_exception("Expected plain text, got channel tags: pass `thinking` and `content` apart.") }}
        {%- endif -%}
    {%- endfor -%}
    {%- if turn.role == "user" -%}
        {{ message("user", turn.content) }}
    {%- elif turn.role == "tool" -%}
        {%- set in_order = calls.names[calls.seen] if calls.seen < calls.names|length else calls.last -%}
        {%- set calls.seen = calls.seen + 1 -%}
        {%- if not turn.name and not in_order -%}
            {{ raise_exception("A tool message needs a tool call before it, or a name.") }}
        {%- endif -%}
        {%- set header = "functions." ~ (turn.name or in_order) ~ " to=assistant<|channel|>commentary" -%}
        {{ message(header, turn.content|tojson) }}
    {%- elif turn.role == "assistant" and turn.tool_calls -%}
        {#- Reasoning before a call stays until an answer follows that is not itself the last message -#}
        {%- set answers = turns[loop.index:-1]|rejectattr("tool_calls")|selectattr("role", "equalto", "assistant") -%}
        {%- if (turn.content or turn.thinking) and not answers|list -%}
            {{ message("assistant<|channel|>analysis", turn.content or turn.thinking) }}
        {%- endif -%}
        {%- set calls.names, calls.seen = [], 0 -%}
        {%- for entry in turn.tool_calls -%}
            {%- set call = entry.function or entry -%}
            {%- set calls.names = calls.names + [call.name] -%}
            {%- set calls.last = call.name -%}
            {%- set kind = call.content_type or "<|constrain|> json" -%}
            {%- set header = "assistant to=functions." ~ call.name ~ "<|channel|>commentary " ~ kind -%}
            {%- set text = call.arguments if call.arguments is string else call.arguments|tojson -%}
            {{ message(header, text, "call" if loop.last else "end") }}
        {%- endfor -%}
    {%- elif turn.role == "assistant" -%}
        {%- if ends_here and turn.thinking is defined -%}
            {{ message("assistant<|channel|>analysis", turn.thinking) }}
        {%- endif -%}
        {{ message("assistant<|channel|>final", turn.content, "return" if ends_here else "end") }}
        {%- set calls.last = none -%}
    {%- else -%}
        {{ raise_exception("Expected user, assistant or tool after the first message, got " ~ turn.role ~ ".") }}
    {%- endif -%}
{%- endfor -%}
{{- "<|start|>assistant" if add_generation_prompt else "" }}
"""


def harmony_template() -> str:
    """Text for a checkpoint's chat_template.jinja: renders as `render` does in dialect 1.1, with every argument.

    The one difference: without `reasoning_effort` it writes "medium"; it cannot leave the line out.
    """
    filled = _TEMPLATE
    for name, text in (
        ("@identity@", IDENTITY),
        ("@cutoff@", KNOWLEDGE_CUTOFF),
        ("@browser@", BROWSER),
        ("@python@", PYTHON),
    ):
        filled = filled.replace(name, json.dumps(text, ensure_ascii=False))
    return filled.rstrip("\n")
