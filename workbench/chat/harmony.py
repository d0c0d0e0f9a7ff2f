"""The chat format of LLM-jp-4 (Harmony), written directly: conversation to text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from workbench.chat.messages import DIALECTS, IDENTITY, KNOWLEDGE_CUTOFF, Message, Options
from workbench.chat.tool_text import builtin_text, namespace_text, to_json
from workbench.errors import ChatError

GENERATION_PROMPT = "<|start|>assistant"


def write_harmony(conversation: Sequence[Message], options: Options) -> str:
    """The conversation as the published template of `options.dialect` renders it."""
    first, turns = conversation[0], conversation
    instructions = ""
    if first.role in ("system", "developer") and not first.is_explicit:
        instructions, turns = first.content, conversation[1:]
    parts = [_message("system", _system_text(options))]
    if instructions or options.tools:
        parts.append(_message("developer", _developer_text(instructions, options)))
    parts += _turns(turns, options)
    if options.add_generation_prompt:
        parts.append(GENERATION_PROMPT)
    return "".join(parts)


def _message(header: str, content: str, end: str = "end") -> str:
    return f"<|start|>{header}<|message|>{content}" + ("" if end == "truncated" else f"<|{end}|>")


def _system_text(options: Options) -> str:
    identity = IDENTITY if options.identity is None else options.identity
    cutoff = KNOWLEDGE_CUTOFF if options.knowledge_cutoff is None else options.knowledge_cutoff
    return "".join(
        [
            f"{identity}\nKnowledge cutoff: {cutoff}\nCurrent date: {options.day.isoformat()}\n\n",
            f"Reasoning: {options.effort}\n\n" if options.effort else "",
            builtin_text(options.builtin_tools or ()),
            "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
            "\nCalls to these tools must go to the commentary channel: 'functions'." if options.tools else "",
        ]
    )


def _developer_text(instructions: str, options: Options) -> str:
    text = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
    if options.tools:
        text += "# Tools\n\n" + namespace_text(options.tools, DIALECTS[options.dialect].json_defaults)
    return text


def _turns(turns: Sequence[Message], options: Options) -> Iterator[str]:
    results = _ResultNames(options.dialect)
    for position, turn in enumerate(turns):
        ends_here = position == len(turns) - 1 and not options.add_generation_prompt
        if turn.is_explicit:
            yield _explicit(turn)
        elif turn.role == "user":
            yield _message("user", turn.content)
        elif turn.role == "tool":
            header = f"functions.{results.next_name(turn)} to=assistant<|channel|>commentary"
            yield _message(header, to_json(turn.content))
        elif turn.tool_calls:
            analysis = turn.content or turn.thinking
            if analysis and _keeps_analysis(turns, position, ends_here, options):
                yield _message("assistant<|channel|>analysis", analysis)
            yield from _calls(turn, results, options)
        else:
            if ends_here and turn.thinking is not None:
                yield _message("assistant<|channel|>analysis", turn.thinking)
            yield _message("assistant<|channel|>final", turn.content, "return" if ends_here else "end")
            results.close()


def _explicit(turn: Message) -> str:
    header = turn.role
    if turn.recipient:
        header += f" to={turn.recipient}"
    if turn.channel:
        header += f"<|channel|>{turn.channel}"
    if turn.constrain:
        header += f" <|constrain|> {turn.constrain}"
    return _message(header, turn.content if isinstance(turn.content, str) else to_json(turn.content), turn.end)


def _keeps_analysis(turns: Sequence[Message], position: int, ends_here: bool, options: Options) -> bool:
    """Whether the reasoning before a tool call is still shown, or already dropped because an answer came."""
    policy = DIALECTS[options.dialect].keep_analysis
    if policy == "never":
        return ends_here
    later = turns[position + 1 :] if policy == "until_final" else turns[position + 1 : -1]
    return not any(turn.role == "assistant" and not turn.tool_calls for turn in later)


def _calls(turn: Message, results: _ResultNames, options: Options) -> Iterator[str]:
    dialect = DIALECTS[options.dialect]
    calls = turn.tool_calls if dialect.parallel_calls else turn.tool_calls[:1]
    results.open([call.name for call in calls])
    for position, call in enumerate(calls):
        header = f"assistant to=functions.{call.name}<|channel|>commentary {call.content_type or dialect.content_type}"
        verbatim = dialect.parallel_calls and isinstance(call.arguments, str)
        arguments = call.arguments if verbatim else to_json(call.arguments)
        yield _message(header, arguments, "call" if position == len(calls) - 1 else "end")


class _ResultNames:
    """Which function a tool message answers: its own name, else by order among the last calls."""

    def __init__(self, dialect: str) -> None:
        self._by_order = DIALECTS[dialect].parallel_calls
        self._names: list[str] = []
        self._last: str | None = None
        self._seen = 0

    def open(self, names: list[str]) -> None:
        self._names, self._last, self._seen = names, names[-1], 0

    def close(self) -> None:
        self._last = None

    def next_name(self, turn: Message) -> str:
        name = self._last
        if self._by_order:
            name = turn.name or (self._names[self._seen] if self._seen < len(self._names) else name)
            self._seen += 1
        if name is None:
            raise ChatError("tool message: expected a tool call before it, got none. Add the call or the tool's name.")
        return name
