"""A conversation as values: messages, tool calls, the options of a rendering, and what differs between releases."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from workbench.axes import EFFORTS
from workbench.errors import ChatError

ROLES = ("system", "developer", "user", "assistant", "tool")
BUILTIN_TOOLS = ("browser", "python")
IDENTITY = "You are LLM-jp-4, a large language model trained by LLM-jp."
KNOWLEDGE_CUTOFF = "2025-12"
End = Literal["end", "return", "call", "truncated"]

# The published templates refuse these: they show that a raw generation was passed instead of its parts.
_CHANNEL_TAGS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
_HEADER_WORD = re.compile(r"(?:(?!<\|)\S)+")
_CONTENT_TYPE = re.compile(r"(?:<\|constrain\|> ?)?(?:(?!<\|)\S)+")
_OPTION_KINDS = (
    ("identity", str, "text"),
    ("knowledge_cutoff", str, "text"),
    ("tools", list | tuple, "a list of tools"),
    ("builtin_tools", list | tuple, "a list of names"),
)


@dataclass(frozen=True)
class Dialect:
    """What one published chat template does differently from the others; all agree when there are no tools."""

    json_defaults: bool  # write the default of an enum parameter as JSON, not bare
    content_type: str  # follows "commentary " in the header of a tool call
    parallel_calls: bool  # every call of a message with verbatim string arguments, not the first one as JSON
    keep_analysis: Literal["until_final", "until_answered", "never"]  # how long reasoning before a tool call stays


DIALECTS = {
    "1.0": Dialect(False, "json", False, "until_final"),
    "1.1": Dialect(True, "<|constrain|> json", True, "until_answered"),
    "2.0": Dialect(True, "<|constrain|> json", True, "never"),
}


@dataclass(frozen=True)
class ToolCall:
    """A call the assistant makes: function name and arguments (JSON text, or an object to be written as JSON)."""

    name: str
    arguments: Any = field(default_factory=dict)
    content_type: str | None = None

    def __post_init__(self) -> None:
        _check_word("tool call name", self.name)
        kind = self.content_type
        if kind is not None and not (isinstance(kind, str) and _CONTENT_TYPE.fullmatch(kind)):
            raise ChatError(f"content_type: expected one word like 'json', got {kind!r}. Shorten it.")

    @classmethod
    def from_dict(cls, call: Mapping[str, Any]) -> ToolCall:
        """Read `{"function": {"name", "arguments"}}`, the form of API clients, or the inner part alone."""
        inner = call.get("function") or call if isinstance(call, Mapping) else call
        if not isinstance(inner, Mapping) or "name" not in inner:
            raise ChatError(f"tool call: expected an object with a function name, got {inner!r}. Add 'name'.")
        return cls(inner["name"], inner.get("arguments", {}), inner.get("content_type"))

    def to_dict(self) -> dict[str, Any]:
        extra = {} if self.content_type is None else {"content_type": self.content_type}
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments, **extra}}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; raises ChatError for contradictory fields.

    Usually `role` is one of ROLES and the rendering decides on headers.  With a `channel`, `recipient` or `constrain`
    the message is written as it stands, any role allowed, and `end` says how it stops ("truncated": not at all, for
    the model to continue).  `content` of a tool message may be any JSON value.
    """

    role: str
    content: Any = ""
    channel: str | None = None
    recipient: str | None = None
    constrain: str | None = None
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    end: End = "end"

    def __post_init__(self) -> None:
        for key in ("role", "channel", "recipient", "constrain", "name"):
            if getattr(self, key) is not None:
                _check_word(f"message {key}", getattr(self, key))
        if not self.is_explicit and self.role not in ROLES:
            raise ChatError(f"message role: expected one of {ROLES}, got {self.role!r}. Give other roles a channel.")
        if not isinstance(self.content, str) and self.role != "tool":
            raise ChatError(f"{self.role} content: expected text, got {type(self.content).__name__}. Pass one string.")
        if self.end not in get_args(End):
            raise ChatError(f"message end: expected one of {get_args(End)}, got {self.end!r}. Choose one.")
        if self.end != "end" and not self.is_explicit:
            raise ChatError(f"message end: expected 'end' without a channel, got {self.end!r}. Give the channel too.")
        if self.role == "assistant":
            self._check_assistant()
        elif self.thinking is not None or self.tool_calls:
            raise ChatError(f"{self.role} message: expected no thinking or tool_calls, got some. Remove them.")

    def _check_assistant(self) -> None:
        calls = self.tool_calls
        if not isinstance(calls, list | tuple) or not all(isinstance(call, ToolCall) for call in calls):
            raise ChatError(f"tool_calls: expected a list of tool calls, got {calls!r}. Pass ToolCall values in one.")
        if not isinstance(self.thinking, str | None):
            raise ChatError(f"thinking: expected text, got {type(self.thinking).__name__}. Pass one string.")
        if self.is_explicit and (self.thinking is not None or self.tool_calls):
            raise ChatError("assistant message: expected a channel or thinking/tool_calls, got both. Split it.")
        if self.tool_calls and self.content and self.thinking:
            raise ChatError("assistant message: expected content or thinking before tool calls, got both. Keep one.")
        for text in (self.content, self.thinking or ""):
            if any(tag in text for tag in _CHANNEL_TAGS):
                raise ChatError(
                    "assistant message: expected plain text, got channel tags. "
                    "Pass what was analysed as `thinking` and the answer as `content`."
                )

    @property
    def is_explicit(self) -> bool:
        """Whether the header is spelled out by this message and not decided by the rendering."""
        return any(part is not None for part in (self.channel, self.recipient, self.constrain))

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> Message:
        """Read the form of API clients; an unknown key raises ChatError, `tool_call_id` is not needed and ignored."""
        if not isinstance(message, Mapping):
            raise ChatError(f"messages: expected a list of messages, got {message!r} in it. Pass dicts or Message.")
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(message) - known - {"tool_call_id"})
        if unknown or "role" not in message:
            raise ChatError(
                f"message: expected role and some of {sorted(known)}, got {sorted(message)}. "
                "Reasoning belongs in 'thinking'."
            )
        is_result = message["role"] == "tool"  # for which null is a value like any other
        values = {key: message[key] for key in known & set(message) if message[key] is not None or is_result}
        if "content" not in values and not message.get("tool_calls"):
            raise ChatError(
                f"{message['role']} message: expected content, got none. Pass the text, '' for an empty one."
            )
        calls = values.get("tool_calls") or ()
        values["tool_calls"] = tuple(map(ToolCall.from_dict, calls)) if isinstance(calls, list | tuple) else calls
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The form that chat templates expect; only fields that are set."""
        values: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking is not None:
            values["thinking"] = self.thinking
        if self.name is not None:
            values["name"] = self.name
        if self.tool_calls:
            values["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return values


@dataclass(frozen=True)
class Options:
    """The arguments of `render`, checked; see there for their meaning."""

    effort: str | None = "medium"
    identity: str | None = None
    knowledge_cutoff: str | None = None
    date: str | datetime.date | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    builtin_tools: Sequence[str] | None = None
    add_generation_prompt: bool = True
    dialect: str = "1.1"

    def __post_init__(self) -> None:
        if self.effort is not None and self.effort not in EFFORTS:
            raise ChatError(f"effort: expected one of {EFFORTS} or None, got {self.effort!r}. Choose one.")
        if self.dialect not in list(DIALECTS):
            raise ChatError(f"dialect: expected one of {sorted(DIALECTS)}, got {self.dialect!r}. Choose one.")
        for key, kind, expected in _OPTION_KINDS:
            value = getattr(self, key)
            if value is not None and not isinstance(value, kind):
                raise ChatError(f"{key}: expected {expected}, got {value!r}. Pass None for the default.")
        for name in self.builtin_tools or ():
            if name not in BUILTIN_TOOLS:
                raise ChatError(
                    f"builtin_tools: expected {' or '.join(BUILTIN_TOOLS)}, got {name!r}. Others go in `tools`."
                )
        self.day  # noqa: B018 - raises when the date is malformed

    @property
    def day(self) -> datetime.date:
        """The date of the conversation, today if none was given."""
        return as_day(self.date)


def as_day(date: str | datetime.date | None) -> datetime.date:
    """A day as conversations bear it, today for None. Raises ChatError for a text that is none."""
    if date is None:
        return datetime.date.today()
    try:
        return datetime.date.fromisoformat(str(date))
    except ValueError:
        raise ChatError(f"date: expected YYYY-MM-DD, got {date!r}. Write it that way.") from None


def read_conversation(messages: Sequence[Message | Mapping[str, Any]], options: Options) -> list[Message]:
    """Messages in checked form; raises ChatError for what every published template would drop without a word."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ChatError(
            f"messages: expected a list of messages, got {messages!r}. Pass dicts or Message values in a list."
        )
    conversation = [entry if isinstance(entry, Message) else Message.from_dict(entry) for entry in messages]
    if not conversation:
        raise ChatError("messages: expected at least one, got none. Add a user message.")
    for position, message in enumerate(conversation):
        if position and message.role in ("system", "developer") and not message.is_explicit:
            raise ChatError(
                f"messages[{position}]: expected {message.role} messages only in first place, got one later. "
                "Chat templates drop it; merge it into the first."
            )
        last = position == len(conversation) - 1
        if message.end == "truncated" and (not last or options.add_generation_prompt):
            raise ChatError(
                f"messages[{position}]: expected a truncated message to end the rendering, got more after it. "
                "Put it last and pass add_generation_prompt=False."
            )
    return conversation


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON-like value with every string in it (keys too) changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(entry, change) for entry in value]
    return value


def map_message(message: Message, change: Callable[[str], str]) -> Message:
    """The message with its free text changed; what ends up in headers stays."""
    calls = tuple(replace(call, arguments=map_strings(call.arguments, change)) for call in message.tool_calls)
    thinking = None if message.thinking is None else change(message.thinking)
    return replace(message, content=map_strings(message.content, change), thinking=thinking, tool_calls=calls)


def _check_word(what: str, value: object) -> None:
    if not isinstance(value, str) or not _HEADER_WORD.fullmatch(value):
        raise ChatError(f"{what}: expected one word without '<|', got {value!r}. Headers hold single words.")
