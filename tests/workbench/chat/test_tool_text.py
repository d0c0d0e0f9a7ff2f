"""Signatures of tools, character for character; the odd cases were compared with the published templates."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.chat.tool_text import builtin_text, namespace_text, type_text
from workbench.errors import ChatError

INDENT = "\n" + " " * 16


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "string"),
        ({"type": "string", "nullable": True}, "string | null"),
        ({"type": "string", "enum": ["a", "b"]}, '"a" | "b"'),
        ({"type": "integer"}, "number"),
        ({"type": "number", "nullable": True}, "number"),
        ({"type": "boolean"}, "boolean"),
        ({"type": "null"}, "any"),
        ({}, "any"),
        ({"type": []}, "any"),
        ({"type": ["string"]}, "string"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": "array"}, "any[]"),
        ({"type": "array", "nullable": True}, "any[] | null"),
        ({"type": "array", "items": {"type": "integer"}, "nullable": True}, "number[] | null"),
        ({"type": "array", "items": {"type": "string", "enum": ["a"]}}, "string[]"),
        ({"type": "array", "items": {"type": ["object", "object"]}}, "any[]"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}}, "boolean[][]"),
        ({"type": "array", "items": {"type": ["string"] * 9}}, "any[]"),
        ({"type": "object"}, "object"),
        (
            {"type": "object", "properties": {"a": {"type": "string"}, "b": {}}, "required": ["b"]},
            f"{{\na?: {INDENT}string, b: {INDENT}any}}",
        ),
        ({"oneOf": [{"type": "string"}, {"type": "object"}]}, "string | \nobject"),
        ({"oneOf": [{"type": "string", "description": "D", "default": "x"}]}, f'string// D{" " * 20}// default: "x"'),
    ],
)
def test_types(schema: dict[str, Any], expected: str) -> None:
    assert type_text(schema) == expected


def test_a_namespace() -> None:
    properties = {
        "city": {"type": "string", "description": "The city."},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "days": {"type": "integer", "default": 3},
        "when": {"oneOf": [{"type": "string"}], "default": "now"},
    }
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    tools = [
        {"function": {"name": "weather", "description": "天気。", "parameters": parameters}},
        {"function": {"name": "now", "description": "Time."}},
    ]
    assert namespace_text(tools, json_defaults=True) == (
        "## functions\n\nnamespace functions {\n\n"
        "// 天気。\ntype weather = (_: {\n"
        "// The city.\ncity: string,\n"
        'unit?: "C" | "F", // default: "C",\n'
        "days?: number, // default: 3,\n"
        'when?: string// default: "now",\n'
        "}) => any;\n\n"
        "// Time.\ntype now = () => any;\n\n"
        "} // namespace functions"
    )
    assert '"C" | "F", // default: C,\n' in namespace_text(tools, json_defaults=False)


def test_no_builtin_tools_no_text() -> None:
    assert builtin_text([]) == ""
    assert builtin_text(["python"]).startswith("# Tools\n\n## python\n\nUse this tool")


@pytest.mark.parametrize("value", [5, "ab"])
def test_what_must_be_a_list_is_one(value: Any) -> None:
    for schema in ({"oneOf": value}, {"type": "string", "enum": value}):
        with pytest.raises(ChatError, match=f"to be a list, got {value!r}"):
            type_text(schema)
    parameters = {"type": "object", "properties": {"a": {}}, "required": value}
    tool = {"function": {"name": "f", "description": "", "parameters": parameters}}
    for write in (lambda: type_text(parameters), lambda: namespace_text([tool], json_defaults=True)):
        with pytest.raises(ChatError, match=f"expected 'required' to be a list, got {value!r}"):
            write()


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("weather", r"tools\[0\]: expected a 'function'"),
        ({"name": "weather"}, r"tools\[0\]: expected a 'function'"),
        ({"function": {"name": "weather"}}, "with name and description"),
        ({"function": {"name": "f", "description": "", "parameters": ["a"]}}, "expected a JSON schema object"),
        ({"function": {"name": "f", "description": "", "parameters": {"properties": {"a": 1}}}}, "got 1"),
        ({"function": {"name": "f", "description": "", "parameters": {"properties": {"a": {"default": {1}}}}}}, "JSON"),
    ],
)
def test_malformed_tools_are_refused(tool: Any, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        namespace_text([tool], json_defaults=True)
