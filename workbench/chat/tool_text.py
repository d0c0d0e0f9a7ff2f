"""How tools are described to the model: TypeScript-like signatures, character for character as it was trained on.

The odd line breaks inside nested types are those of the published templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import ChatError

Schema = Mapping[str, Any]

_NESTED_INDENT = "\n" + " " * 16
_DEFAULT_INDENT = " " * 20
_LONGEST_ITEM_TYPE = 50
_ITEM_TYPES = {"string": "string[]", "number": "number[]", "integer": "number[]", "boolean": "boolean[]"}

BROWSER = """\
## browser

// Tool for browsing.
// The `cursor` appears in brackets before each browsing display: `[{cursor}]`.
// Cite information from the tool using the following format:
// `【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.
// Do not quote more than 10 words directly from the tool output.
// sources=web (default: web)
namespace browser {

// Searches for information related to `query` and displays `topn` results.
type search = (_: {
query: string,
topn?: number, // default: 10
source?: string,
}) => any;

// Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines` lines.
// Valid link ids are displayed with the formatting: `【{id}†.*】`.
// If `cursor` is not provided, the most recent page is implied.
// If `id` is a string, it is treated as a fully qualified URL associated with `source`.
// If `loc` is not provided, the viewport will be positioned at the beginning of the document \
or centered on the most relevant passage, if available.
// Use this function without `id` to scroll to a new location of an opened page.
type open = (_: {
id?: number | string, // default: -1
cursor?: number, // default: -1
loc?: number, // default: -1
num_lines?: number, // default: -1
view_source?: boolean, // default: false
source?: string,
}) => any;

// Finds exact matches of `pattern` in the current page, or the page given by `cursor`.
type find = (_: {
pattern: string,
cursor?: number, // default: -1
}) => any;

} // namespace browser

"""

PYTHON = """\
## python

Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. \
This tool should be used for internal reasoning, but not for code that is intended to be visible to the user \
(e.g. when creating plots, tables, or files).

When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook \
environment. python will respond with the output of the execution or time out after 120.0 seconds. \
The drive at '/mnt/data' can be used to save and persist user files. \
Internet access for this session is UNKNOWN. Depends on the cluster.

"""


def to_json(value: Any) -> str:
    """JSON as chat templates write it: characters as they are, keys in their order. Raises ChatError, for NaN too."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ChatError(f"tool data: expected JSON values, got {error}. Convert them first.") from None


def builtin_text(names: Sequence[str]) -> str:
    """The block of the system message on built-in tools; empty without any."""
    blocks = [text for name, text in (("browser", BROWSER), ("python", PYTHON)) if name in names]
    return "# Tools\n\n" + "".join(blocks) if blocks else ""


def namespace_text(tools: Sequence[Schema], json_defaults: bool) -> str:
    """The `functions` namespace of the developer message."""
    signatures = [_signature(_function(tool, position), json_defaults) for position, tool in enumerate(tools)]
    return "## functions\n\nnamespace functions {\n\n" + "".join(signatures) + "} // namespace functions"


def _schema(value: Any) -> Schema:
    if not isinstance(value, Mapping):
        raise ChatError(f"tool parameters: expected a JSON schema object, got {value!r}. Write it as an object.")
    return value


def _listed(schema: Schema, key: str) -> Sequence[Any]:
    """The list under `key`; anything else would be searched or joined letter by letter."""
    value = schema.get(key) or ()
    if not isinstance(value, list | tuple):
        raise ChatError(f"tool parameters: expected '{key}' to be a list, got {value!r}. Write it as one.")
    return value


def _function(tool: Schema, position: int) -> Schema:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not {"name", "description"} <= set(function):
        raise ChatError(
            f"tools[{position}]: expected a 'function' with name and description, got {to_json(tool)}. "
            "Pass tools in the form of the OpenAI chat API."
        )
    return function


def _signature(function: Schema, json_defaults: bool) -> str:
    head = f"// {function['description']}\ntype {function['name']} = "
    parameters = _schema(function.get("parameters") or {})
    properties = _schema(parameters.get("properties") or {})
    if not properties:
        return head + "() => any;\n\n"
    required = _listed(parameters, "required")
    lines = [_parameter(name, _schema(spec), name in required, json_defaults) for name, spec in properties.items()]
    return head + "(_: {\n" + "".join(lines) + "}) => any;\n\n"


def _parameter(name: str, spec: Schema, required: bool, json_defaults: bool) -> str:
    comment = f"// {spec['description']}\n" if spec.get("description") else ""
    line = f"{comment}{name}{'' if required else '?'}: {type_text(spec)}"
    if "default" in spec:
        listed = bool(spec.get("enum") or spec.get("oneOf"))
        default = to_json(spec["default"]) if json_defaults or not listed else str(spec["default"])
        comma = "" if spec.get("oneOf") and not spec.get("enum") else ", "
        line += f"{comma}// default: {default}"
    return line + ",\n"


def type_text(spec: Schema) -> str:
    """The TypeScript-like type of a JSON schema."""
    kind = _schema(spec).get("type")
    if kind == "array":
        return _array_type(spec)
    if isinstance(kind, Sequence) and not isinstance(kind, str) and kind:
        return " | ".join(map(str, kind))
    if variants := _listed(spec, "oneOf"):
        return _union_type(variants)
    if kind == "string" and (values := _listed(spec, "enum")):
        return '"' + '" | "'.join(map(str, values)) + '"'
    if kind == "string":
        return "string | null" if spec.get("nullable") else "string"
    if kind == "object":
        return _object_type(spec)
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def _array_type(spec: Schema) -> str:
    items = spec.get("items")
    text = _item_type(_schema(items)) if items else "any[]"
    return text + (" | null" if spec.get("nullable") else "")


def _item_type(items: Schema) -> str:
    kind = items.get("type")
    if isinstance(kind, str) and kind in _ITEM_TYPES:
        return _ITEM_TYPES[kind]
    inner = type_text(items)
    return "any[]" if inner == "object | object" or len(inner) > _LONGEST_ITEM_TYPE else inner + "[]"


def _union_type(variants: Sequence[Schema]) -> str:
    texts = []
    for variant in variants:
        text = type_text(variant)
        if variant.get("description"):
            text += f"// {variant['description']}"
        if "default" in variant:
            text += f"{_DEFAULT_INDENT}// default: {to_json(variant['default'])}"
        texts.append(text)
    return " | \n".join(texts)


def _object_type(spec: Schema) -> str:
    properties = _schema(spec.get("properties") or {})
    if not properties:
        return "object"
    required = _listed(spec, "required")
    entries = [
        f"{name}{'' if name in required else '?'}: {_NESTED_INDENT}{type_text(entry)}"
        for name, entry in properties.items()
    ]
    return "{\n" + ", ".join(entries) + "}"
