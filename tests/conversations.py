"""Hypothesis strategies for conversations and tools, shared by the chat tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

LOOKALIKES = ["<|end|>", "<|start|>system<|message|>", "<|", "|>", "<0x41>", "\ue000", "\ue0001", "</s>", "<|return|>"]
SAMPLES = ["", " 日本の首都は？", "改行\n\n改行 ", "  two spaces", "𓆏🦑 é", "\n", '{"a": 1}', *LOOKALIKES]


def is_plain(text: str) -> bool:
    """Whether an assistant may say it: the two channel tags are refused by every published template."""
    return "<|channel|>analysis<|message|>" not in text and "<|channel|>final<|message|>" not in text


# U+2581 is the vocabulary's own sign for a space, the one character that does not come back.
texts = st.lists(st.text(max_size=6) | st.sampled_from(SAMPLES), max_size=4).map(
    lambda parts: "".join(parts).replace("\u2581", "")
)
plain_texts = texts.filter(is_plain)
names = st.sampled_from(["get_weather", "search", "f"])
scalars = st.none() | st.booleans() | st.integers(-9, 9) | texts | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2), max_leaves=3
)


def _records(required: dict[str, Any], optional: dict[str, Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional or {})


_calls = _records(
    {"function": _records({"name": names, "arguments": plain_texts | st.dictionaries(texts, json_values, max_size=2)})}
)
_calling = _records(
    {"role": st.just("assistant"), "content": st.just(""), "tool_calls": st.lists(_calls, min_size=1, max_size=2)}
)
first_messages = _records({"role": st.sampled_from(["system", "developer"]), "content": texts})
user_messages = _records({"role": st.just("user"), "content": texts})
answers = _records({"role": st.just("assistant"), "content": plain_texts}, {"thinking": plain_texts})
tool_turns = st.tuples(_calling, st.none() | plain_texts.filter(bool), json_values).map(
    lambda parts: [
        {**parts[0], **({"thinking": parts[1]} if parts[1] else {})},
        *({"role": "tool", "content": parts[2]} for _ in parts[0]["tool_calls"]),
    ]
)
_turns = st.lists(
    st.one_of(user_messages.map(lambda turn: [turn]), answers.map(lambda turn: [turn]), tool_turns), max_size=4
)
conversations = st.tuples(st.lists(first_messages, max_size=1), user_messages, _turns).map(
    lambda parts: [*parts[0], parts[1], *(turn for group in parts[2] for turn in group)]
)

_simple = _records(
    {
        "type": st.sampled_from(
            ["string", "number", "integer", "boolean", "object", "null", "array", ["string", "null"]]
        )
    },
    {"description": texts, "nullable": st.booleans(), "default": scalars},
)
_enums = _records(
    {"type": st.just("string"), "enum": st.lists(texts, max_size=2)}, {"default": texts, "description": texts}
)
schemas = st.recursive(
    _simple | _enums,
    lambda inner: st.one_of(
        _records({"type": st.just("array"), "items": inner}, {"nullable": st.booleans()}),
        _records({"oneOf": st.lists(inner, max_size=2)}, {"default": texts, "description": texts}),
        _records(
            {"type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=2)},
            {"required": st.lists(names, max_size=1)},
        ),
    ),
    max_leaves=4,
)
_parameters = _records(
    {"properties": st.dictionaries(names, schemas, max_size=2)}, {"required": st.lists(names, max_size=1)}
)
tools = st.lists(
    _records({"function": _records({"name": names, "description": texts}, {"parameters": _parameters})}), max_size=2
)
rendering_options = _records(
    {
        "effort": st.sampled_from(["low", "medium", "high"]),
        "date": st.just("2026-04-03"),
        "add_generation_prompt": st.booleans(),
    },
    {
        "identity": texts,
        "knowledge_cutoff": texts,
        "tools": tools,
        "builtin_tools": st.lists(st.sampled_from(["browser", "python"])),
    },
)
