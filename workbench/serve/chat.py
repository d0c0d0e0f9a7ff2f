"""/v1/chat/completions: a conversation in, channels of a Harmony answer out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from workbench.chat import Message, ToolCall, render_tokens
from workbench.errors import ChatError
from workbench.serve.answer import Channels, Delta, join
from workbench.serve.choice import Ask, Choice, Ended, Logprob, Written
from workbench.serve.errors import invalid, naming
from workbench.serve.logprobs import chat_logprob
from workbench.serve.mailbox import Mailbox
from workbench.serve.schema import ChatMessage, ChatRequest, TextPart
from workbench.serve.service import Service, new_id, stops


class Chat:
    """One request, checked. Raises ApiError naming the field that is wrong."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service, self.body = service, body
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs: expected logprobs to be true beside it, got false.")
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise invalid("max_tokens", "max_tokens: expected the same as max_completion_tokens, got another. Drop it.")
        service.check_choices(1, body.n or 1)
        self.prompt = self._prompt()
        limit_name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        (ask,) = service.asks(body, [self.prompt], body.max_completion_tokens or body.max_tokens, limit_name)
        self.ask = replace(
            ask,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            max_thinking_tokens=body.max_thinking_tokens,
        )
        self.channels: list[Channels] = []
        self._n_streamed: Counter[int] = Counter()  # tokens of each choice whose log-probability was sent

    def choices(self, mailbox: Mailbox) -> list[Choice]:
        def writer(ask: Ask) -> Channels:
            self.channels.append(Channels(self.service.tokenizer, stops(self.body)))
            return self.channels[-1]

        return self.service.choices([self.ask], self.body.n or 1, writer, mailbox)

    async def whole(self, choices: Sequence[Choice], events: AsyncIterator[Written | Ended]) -> dict[str, Any]:
        """The answer, once all choices have ended."""
        deltas: list[list[Delta]] = [[] for _ in choices]
        logprobs: list[list[Logprob]] = [[] for _ in choices]
        async for event in events:
            deltas[event.index] += event.deltas
            if isinstance(event, Written) and event.logprob is not None:
                logprobs[event.index].append(event.logprob)
        found = zip(choices, deltas, logprobs, strict=True)
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.service.identity.name,
            "choices": [self._choice(*one) for one in found],
            "usage": self.usage(choices),
        }

    async def stream(
        self, choices: Sequence[Choice], events: AsyncIterator[Written | Ended]
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces, each with what one token made certain; the usage last, if it was asked for."""
        for choice in choices:
            yield self._chunk(choice.index, {"role": "assistant", "content": ""})
        async for event in events:
            logprob = event.logprob if isinstance(event, Written) else None
            shown = None if logprob is None else self._logprobs([logprob], [self._kind(event)])
            for delta in event.deltas:
                yield self._chunk(event.index, _shown(delta), shown)
                shown = None
            if shown is not None and (shown["content"] or shown["reasoning_content"]):
                yield self._chunk(event.index, {}, shown)
            if isinstance(event, Ended):
                choice = choices[event.index]
                routing = self.service.routing(choice)
                extra = {} if routing is None else {"routing": routing}
                yield self._chunk(event.index, {}, None, self._finish_reason(choice), **extra)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield {**self._head(), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        n_prompt, n_written = len(self.prompt), sum(len(choice.written) for choice in choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_written,
            "total_tokens": n_prompt + n_written,
            "completion_tokens_details": {"reasoning_tokens": sum(one.n_reasoning for one in self.channels)},
        }

    def _prompt(self) -> list[int]:
        service, body = self.service, self.body
        if service.model.chat_template is None:
            raise invalid("model", "model: expected one with a chat template, got one without. Use /v1/completions.")
        tools = None if body.tool_choice == "none" else [_tool(tool.model_dump()) for tool in body.tools or ()] or None
        effort = {} if body.reasoning_effort is None else {"effort": body.reasoning_effort}
        with naming("messages"):
            messages = _conversation(body.messages)
        with naming("tools" if tools else "messages"):
            ids = render_tokens(
                messages,
                service.tokenizer,
                template=service.model.chat_template,
                tools=tools,
                date=self._date(),
                **effort,
            )
        service.check_ids("messages", ids)
        return ids

    def _date(self) -> str | None:
        if self.body.date is None:
            return self.service.identity.date
        try:
            return time.strftime("%Y-%m-%d", time.strptime(self.body.date, "%Y-%m-%d"))
        except ValueError:
            raise invalid("date", f"date: expected a day as YYYY-MM-DD, got {self.body.date!r}.") from None

    def _choice(self, choice: Choice, deltas: list[Delta], logprobs: list[Logprob]) -> dict[str, Any]:
        whole = join(deltas)
        message = {
            "role": "assistant",
            "content": whole["content"] or (None if whole["calls"] else ""),
            "reasoning_content": whole["reasoning"] or None,
            "refusal": None,
        }
        if whole["calls"]:
            message["tool_calls"] = [
                {"id": new_id("call"), "type": "function", "function": call} for call in whole["calls"]
            ]
        routing = self.service.routing(choice)
        kinds = self.channels[choice.index].kinds
        return {
            "index": choice.index,
            "message": message,
            "finish_reason": self._finish_reason(choice),
            "logprobs": self._logprobs(logprobs, kinds) if self.body.logprobs else None,
            **({} if routing is None else {"routing": routing}),
        }

    def _finish_reason(self, choice: Choice) -> str:
        called = self.channels[choice.index].n_calls and choice.reason == "stop"
        return "tool_calls" if called else choice.reason

    def _kind(self, event: Written | Ended) -> str | None:
        """Where the token of an event was shown; its channels may be further on by now."""
        self._n_streamed[event.index] += 1
        return self.channels[event.index].kinds[self._n_streamed[event.index] - 1]

    def _logprobs(self, found: Sequence[Logprob], kinds: Sequence[str | None]) -> dict[str, Any]:
        by_kind: dict[str | None, list[dict[str, Any]]] = {"content": [], "reasoning": []}
        for one, kind in zip(found, kinds, strict=True):
            if kind in by_kind:
                by_kind[kind].append(chat_logprob(self.service.tokenizer, one))
        return {"content": by_kind["content"], "reasoning_content": by_kind["reasoning"], "refusal": None}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.service.identity.name,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None, **extra: Any
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **extra}
        return {**self._head(), "choices": [choice]}


def _shown(delta: Delta) -> dict[str, Any]:
    if delta.kind != "tool":
        return {{"content": "content", "reasoning": "reasoning_content"}[delta.kind]: delta.text}
    call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.text}}
    if delta.name is not None:
        call |= {"id": new_id("call"), "type": "function"}
        call["function"]["name"] = delta.name
    return {"tool_calls": [call]}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Without what is null; a description is what templates expect."""
    function = {key: value for key, value in tool["function"].items() if value is not None and key != "strict"}
    return {"type": "function", "function": {"description": "", **function}}


def _conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """Raises ChatError for what does not fit, naming the message."""
    names: dict[str, str] = {}  # of the functions called, by the id of the call
    found = []
    for position, message in enumerate(messages):
        for call in message.tool_calls or ():
            if call.id is not None:
                names[call.id] = call.function.name
        try:
            found.append(_message(message, names))
        except ChatError as error:
            raise ChatError(f"messages[{position}]: {error}") from None
    return found


def _message(message: ChatMessage, names: dict[str, str]) -> Message:
    if message.content is None and not message.tool_calls:
        raise ChatError(f"{message.role} content: expected text, got none. Pass '' for an empty one.")
    calls = tuple(ToolCall(call.function.name, call.function.arguments) for call in message.tool_calls or ())
    content = message.content or ""
    if isinstance(content, list):
        content = "".join(part.text for part in content if isinstance(part, TextPart))
    is_result = message.role == "tool"
    return Message(
        message.role,
        content,
        thinking=message.reasoning_content,
        tool_calls=calls,
        name=names.get(message.tool_call_id or "", message.name) if is_result else None,
    )
